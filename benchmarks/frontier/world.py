"""Where can reward and KL be known exactly? A small world: prompts, all responses to them, a reference model, a true reward.

A prompt is two letters. A response is up to four letters, of which fewer than four are followed by the end token, so that with six
letters there are 1 + 6 + 36 + 216 + 1296 = 1555, and the probabilities that a model of seven words gives them add up to 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

END = 0  # letters are 1, 2, ...
PROMPT_LENGTH = 2


@dataclass(frozen=True, kw_only=True)
class Space:
    """Everything that can be asked and answered."""

    letters: int
    longest: int
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    """Token ids, the end token included where there is one."""
    strings: Tensor  # (S, longest - 1) all letters that a last token may come after
    string_of: Tensor  # (R, longest) which row of `strings` predicts each token of a response
    tokens: Tensor  # (R, longest) the response's tokens, 0 beyond its end
    is_token: Tensor  # (R, longest) bool

    def inputs(self) -> Tensor:
        """(P * S, PROMPT_LENGTH + longest - 1): each prompt before each of `strings`."""
        prompts, strings = torch.tensor(self.prompts), self.strings
        return torch.cat([prompts.repeat_interleave(len(strings), 0), strings.repeat(len(prompts), 1)], 1)


def make_space(*, prompts: int = 16, letters: int = 6, longest: int = 4) -> Space:
    """The first `prompts` of a fixed random order of all prompts, and every response."""
    every = list(itertools.product(range(1, letters + 1), repeat=PROMPT_LENGTH))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(7)).tolist()[:prompts]
    responses = []
    for length in range(longest + 1):
        for string in itertools.product(range(1, letters + 1), repeat=length):
            responses.append(string if length == longest else (*string, END))
    strings = list(itertools.product(range(1, letters + 1), repeat=longest - 1))
    row_of = {string: row for row, string in enumerate(strings)}
    tokens = torch.tensor([[*response, *[0] * (longest - len(response))] for response in responses])
    is_token = torch.tensor([[place < len(response) for place in range(longest)] for response in responses])
    # Token t of a response is predicted after its first t letters, so by any string that begins with them.
    string_of = torch.zeros_like(tokens)
    for index, response in enumerate(responses):
        for place in range(len(response)):
            string_of[index, place] = row_of[(*response[:place], *[1] * (longest - 1 - place))]
    return Space(
        letters=letters,
        longest=longest,
        prompts=tuple(every[index] for index in order),
        responses=tuple(responses),
        strings=torch.tensor(strings),
        string_of=string_of,
        tokens=tokens,
        is_token=is_token,
    )


def tiny_model(space: Space, seed: int, *, hidden: int = 48, layers: int = 2) -> Any:
    """A Llama of some 56 thousand parameters whose words are the end token and the letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=space.letters + 1,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=PROMPT_LENGTH + space.longest,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def response_logps(model: Any, space: Space) -> Tensor:
    """(P, R) float64: the log-probability of every response to every prompt, by the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=space.inputs(), use_cache=False).logits[:, PROMPT_LENGTH - 1 :]
    by_string = logits.double().log_softmax(-1).view(len(space.prompts), -1, space.longest, space.letters + 1)
    places = torch.arange(space.longest).expand_as(space.tokens)
    found = by_string[:, space.string_of, places, space.tokens]  # (P, R, longest)
    return (found * space.is_token).sum(-1)


def pretrain(space: Space, seed: int, *, steps: int, batch: int = 256) -> Any:
    """A model that has learnt some of a random Markov source, in eval mode: the reference.

    The source: each letter pair has its own distribution over the next letter and the end.
    """
    draw = torch.Generator().manual_seed(seed)
    words = space.letters + 1
    source = 2 * torch.randn(words, words, words, generator=draw)  # [before, last, next]
    probabilities = source.softmax(-1)
    model = tiny_model(space, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=3e-4)
    prompts = torch.tensor(space.prompts)
    model.train()
    for _ in range(steps):
        rows = prompts[torch.randint(len(prompts), (batch,), generator=draw)]
        labels = torch.full_like(rows, -100)
        ended = torch.zeros(batch, dtype=torch.bool)
        for _ in range(space.longest):
            following = torch.multinomial(probabilities[rows[:, -2], rows[:, -1]], 1, generator=draw)[:, 0]
            labels = torch.cat([labels, following.where(~ended, -100)[:, None]], 1)
            ended = ended | (following == END)
            rows = torch.cat([rows, following[:, None]], 1)
        loss = model(input_ids=rows, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def true_reward(space: Space, reference_logps: Tensor, seed: int) -> Tensor:
    """(P, R) float64: a random two-layer network of prompt and response.

    Shifted and scaled so that under the reference it has mean 0 for each prompt, and standard deviation 1 over all of them.
    """
    draw = torch.Generator().manual_seed(seed + 1000)
    words = space.letters + 2  # a place beyond the end of the response is a word of its own
    responses = torch.where(space.is_token, space.tokens, space.letters + 1)
    prompts = torch.tensor(space.prompts)
    count = len(prompts), len(responses)
    rows = torch.cat(
        [
            prompts[:, None].expand(*count, PROMPT_LENGTH),
            responses[None].expand(*count, space.longest),
        ],
        -1,
    )  # (P, R, places)
    features = torch.nn.functional.one_hot(rows, words).flatten(-2).double()
    first = torch.randn(features.shape[-1], 64, generator=draw, dtype=torch.float64)
    second = torch.randn(64, generator=draw, dtype=torch.float64)
    reward = torch.tanh(0.3 * features @ first) @ second
    weights = reference_logps.exp()
    reward = reward - (weights * reward).sum(-1, keepdim=True)
    return reward / (weights * reward**2).sum(-1).mean().sqrt()


@dataclass(frozen=True, kw_only=True)
class World:
    """A space, a reference model and a reward."""

    space: Space
    reference: Any
    reference_logps: Tensor  # (P, R)
    reward: Tensor  # (P, R)

    def place(self, logps: Tensor) -> tuple[float, float]:
        """`(KL(pi || ref), E_pi[r])`, exact, means over prompts; of log-probabilities (P, R)."""
        kl = (logps.exp() * (logps - self.reference_logps)).sum(-1).mean()
        return float(kl), float((logps.exp() * self.reward).sum(-1).mean())

    def optimum(self, beta: float, reward: Tensor | None = None) -> Tensor:
        """(P, R) `log(ref * exp(r / beta) / Z)`, of the true reward or another."""
        return (self.reference_logps + (self.reward if reward is None else reward) / beta).log_softmax(-1)

    def frontier(self, betas: Sequence[float] | None = None) -> list[tuple[float, float]]:
        """`(KL, reward)` of the optimum for each beta, by default from KL almost 0 to as good as greedy, KL ascending."""
        betas = torch.logspace(2, -2.5, 400).tolist() if betas is None else betas
        return [self.place(self.optimum(beta)) for beta in betas]


def make_world(seed: int, space: Space, *, pretrain_steps: int = 400) -> World:
    reference = pretrain(space, seed, steps=pretrain_steps)
    logps = response_logps(reference, space)
    return World(space=space, reference=reference, reference_logps=logps, reward=true_reward(space, logps, seed))


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of responses as indices into `space.responses`, the preferred first."""

    prompts: Tensor  # (N,)
    chosen: Tensor  # (N,)
    rejected: Tensor  # (N,)


def sample_pairs(world: World, count: int, seed: int) -> Pairs:
    """Two different responses of the reference to a random prompt, labelled by one Bradley-Terry draw."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(len(world.space.prompts), (count,), generator=draw)
    probabilities = world.reference_logps.exp()[prompts]
    both = torch.stack([torch.multinomial(probabilities, 1, generator=draw)[:, 0] for _ in range(2)])
    while bool((same := both[0] == both[1]).any()):
        both[1, same] = torch.multinomial(probabilities[same], 1, generator=draw)[:, 0]
    rewards = world.reward[prompts, both]
    first_wins = torch.rand(count, generator=draw) < (rewards[0] - rewards[1]).sigmoid()
    return Pairs(
        prompts=prompts,
        chosen=torch.where(first_wins, both[0], both[1]),
        rejected=torch.where(first_wins, both[1], both[0]),
    )
