"""How is a policy trained towards a reward, and how far is it after so many updates? DPO by the engine, and a small PPO beside it.

Every trainer is an iterator: it yields `(updates, log-probs of all responses)` now and then along the way, and at its end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.frontier.world import END, PROMPT_LENGTH, Pairs, World, response_logps

Points = Iterator[tuple[int, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is trained, alike for all methods where it can be."""

    epochs: int = 5
    """Of DPO and of the reward model, over the pairs."""
    batch: int = 128
    """Pairs of a DPO or reward model update; half the responses of a PPO update."""
    learning_rate: float = 2e-3
    """The highest; of Adam, after a warm-up of 10 updates, down to 0 along half a cosine. All methods, the reward model too."""
    rollouts: int = 60
    """Times that PPO samples."""
    sampled: int = 512
    """Responses that it samples each time."""
    passes: int = 3
    """Times that it uses each of them."""
    clip: float = 0.2
    points: int = 5
    """Places along a run at which KL and reward are taken."""


def train_dpo(world: World, pairs: Pairs, beta: float, seed: int, settings: Settings) -> Points:
    """`dpo_engine.losses.dpo_loss` of forests that `forest_token_logps` scores.

    Sequences are of six tokens, so the padded layout is the fastest, and one sheet faster than four: responses have unscored tokens
    after their end.
    """
    from dpo_engine import Tree, build_forest, forest_token_logps, prepare_model
    from dpo_engine.batch import sum_by_completion
    from dpo_engine.losses import dpo_loss

    policy = copy.deepcopy(world.reference).train()
    prepare_model(policy)
    reference = world.reference_logps.float()
    tokens, scored = world.space.tokens.tolist(), world.space.is_token.tolist()
    batches = _batches(len(pairs.prompts), seed, settings)
    optimizer, schedule = _optimizer(policy, len(batches), settings)
    for update, rows in enumerate(batches, 1):
        prompts, chosen, rejected = pairs.prompts[rows], pairs.chosen[rows], pairs.rejected[rows]
        trees = [
            Tree(
                prompt_ids=world.space.prompts[prompt],
                completions=(tokens[better], tokens[worse]),
                scored=(scored[better], scored[worse]),
            )
            for prompt, better, worse in zip(prompts.tolist(), chosen.tolist(), rejected.tolist(), strict=True)
        ]
        forest = build_forest(trees, "padded")
        logps = sum_by_completion(forest_token_logps(policy, forest), forest.lengths).view(-1, 2)
        known = reference[prompts, chosen], reference[prompts, rejected]
        _step(policy, optimizer, schedule, dpo_loss(logps[:, 0], logps[:, 1], *known, beta).mean())
        if _is_point(update, len(batches), settings):
            yield update, response_logps(policy, world.space)


def train_reward_model(world: World, pairs: Pairs, seed: int, settings: Settings) -> Tensor:
    """(P, R) float64: what a model like the policy, with one output, learnt from the pairs by Bradley-Terry."""
    space = world.space
    model = copy.deepcopy(world.reference).train()
    torch.manual_seed(seed)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    prompt_ids, last = torch.tensor(space.prompts), space.is_token.sum(-1) + PROMPT_LENGTH - 1

    def scores(prompts: Tensor, responses: Tensor) -> Tensor:
        rows = torch.cat([prompt_ids[prompts], space.tokens[responses]], 1)
        outputs = model(input_ids=rows, use_cache=False).logits[..., 0]
        return outputs.gather(1, last[responses, None])[:, 0]

    batches = _batches(len(pairs.prompts), seed, settings)
    optimizer, schedule = _optimizer(model, len(batches), settings)
    for rows in batches:
        prompts = pairs.prompts[rows]
        chosen, rejected = scores(prompts.repeat(2), torch.cat([pairs.chosen[rows], pairs.rejected[rows]])).chunk(2)
        _step(model, optimizer, schedule, -logsigmoid(chosen - rejected).mean())
    model.eval()
    every = torch.arange(len(space.responses))
    with torch.no_grad():
        found = [scores(torch.full_like(every, prompt), every) for prompt in range(len(space.prompts))]
    return torch.stack(found).double()


def train_ppo(world: World, reward: Tensor, beta: float, seed: int, settings: Settings) -> Points:
    """PPO on `reward - beta * log(pi / ref)`, (P, R): clipped ratios by token, one advantage for a whole response.

    The baseline, in place of a value network, is the mean over the other responses to the same prompt.
    """
    space = world.space
    policy = copy.deepcopy(world.reference).train()
    updates = settings.rollouts * settings.passes * (settings.sampled // (2 * settings.batch))
    optimizer, schedule = _optimizer(policy, updates, settings)
    draw = torch.Generator().manual_seed(seed)
    prompt_ids, each = torch.tensor(space.prompts), settings.sampled // len(space.prompts)
    prompts = torch.arange(len(space.prompts)).repeat_interleave(each)
    update = 0
    by_code = torch.zeros((space.letters + 1) ** space.longest, dtype=torch.long)  # letters as digits -> response
    powers = (space.letters + 1) ** torch.arange(space.longest - 1, -1, -1)
    by_code[(space.tokens * powers).sum(-1)] = torch.arange(len(space.responses))

    def token_logps(rows: Tensor, responses: Tensor) -> Tensor:
        ids = torch.cat([prompt_ids[rows], space.tokens[responses, :-1]], 1)
        logits = policy(input_ids=ids, use_cache=False).logits[:, PROMPT_LENGTH - 1 :]
        return logits.log_softmax(-1).gather(-1, space.tokens[responses][..., None])[..., 0]

    def sample() -> Tensor:
        """(N,) responses, drawn token by token from the policy as it is."""
        rows, ended, found = prompt_ids[prompts], torch.zeros(len(prompts), dtype=torch.bool), torch.zeros_like(prompts)
        with torch.no_grad():
            for _ in range(space.longest):
                logits = policy(input_ids=rows, use_cache=False).logits[:, -1]
                following = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0].masked_fill(ended, END)
                ended |= following == END
                rows = torch.cat([rows, following[:, None]], 1)
                found = found * (space.letters + 1) + following
        return by_code[found]

    for _ in range(settings.rollouts):
        responses = sample()
        counts = space.is_token[responses]
        with torch.no_grad():
            before = token_logps(prompts, responses)
        log_ratio = (before * counts).sum(-1) - world.reference_logps[prompts, responses]
        gained = (reward[prompts, responses] - beta * log_ratio).view(-1, each)
        advantage = (gained - (gained.sum(-1, keepdim=True) - gained) / (each - 1)).flatten()
        advantage = (advantage / advantage.std().clamp(min=1e-8)).float()
        for _ in range(settings.passes):
            for rows in torch.randperm(len(prompts), generator=draw).split(2 * settings.batch):
                ratio = (token_logps(prompts[rows], responses[rows]) - before[rows]).exp()
                clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
                gain = torch.minimum(ratio * advantage[rows, None], clipped * advantage[rows, None])
                _step(policy, optimizer, schedule, -(gain * counts[rows]).sum(-1).mean())
                update += 1
                if _is_point(update, updates, settings):
                    yield update, response_logps(policy, space)


def _batches(count: int, seed: int, settings: Settings) -> list[Tensor]:
    """Rows of each update: every epoch all of them in another order, but for what does not fill a batch."""
    draw = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=draw) for _ in range(settings.epochs)]
    return [rows for order in orders for rows in order.split(settings.batch) if len(rows) == settings.batch]


def _optimizer(model: Any, updates: int, settings: Settings) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    def rate(done: int) -> float:
        return min(1.0, (done + 1) / 10) * 0.5 * (1 + math.cos(math.pi * done / updates))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _step(model: Any, optimizer: Any, schedule: Any, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def _is_point(update: int, updates: int, settings: Settings) -> bool:
    """The last update, and `points - 1` before it, at equal distances."""
    return update in {round(updates * part / settings.points) for part in range(1, settings.points + 1)}
