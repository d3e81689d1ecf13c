"""What does a method do, in plain lines? Every sequence by itself, full logits, float32, two models; nothing of the engine but the
loss function, which is held to its formula elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.losses import ListStats, Method, PairStats, UnpairedStats


@dataclass
class NaiveRun:
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    baselines: list[float] = field(default_factory=list)


@dataclass
class Completion:
    """One completion under both models; (T,) each."""

    policy: Tensor
    reference: Tensor
    kl: Tensor
    log_sum_squares: Tensor

    @property
    def length(self) -> int:
        return len(self.policy)


def completions_of(policy: nn.Module, reference: nn.Module, tree: Any) -> list[Completion]:
    found = []
    for ids in tree.completions:
        row = torch.tensor([[*tree.prompt_ids, *ids]])
        first = len(tree.prompt_ids) - 1
        mine = policy(input_ids=row).logits[0, first:-1].float().log_softmax(-1)
        with torch.no_grad():
            its = reference(input_ids=row).logits[0, first:-1].float().log_softmax(-1)
        labels = torch.tensor(ids)[:, None]
        found.append(
            Completion(
                policy=mine.gather(-1, labels)[:, 0],
                reference=its.gather(-1, labels)[:, 0],
                kl=(its.exp() * (its - mine)).sum(-1),
                log_sum_squares=(2 * mine).logsumexp(-1).detach(),
            )
        )
    return found


def pairs_of(ranks: Sequence[int], which: str) -> list[tuple[int, int]]:
    """Places of a ranked list's pairs."""
    if which == "best_worst":
        return [(0, len(ranks) - 1)]
    pairs = [(i, j) for i, j in combinations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
    if which == "all":
        return pairs
    steps = sorted(set(ranks))
    return [(i, j) for i, j in pairs if steps.index(ranks[j]) == steps.index(ranks[i]) + 1]


def pair_stats(trees: Sequence[Any], scored: Sequence[list[Completion]], which: str) -> tuple[PairStats, Tensor]:
    """The pairs of all trees, and what part of its tree each is."""
    columns: dict[str, list[Any]] = {}
    shares = []
    for tree, completions in zip(trees, scored, strict=True):
        ranks = getattr(tree, "ranks", None) or (0, 1)
        places = pairs_of(ranks, which)
        for pair in places:
            shares.append(1 / len(places))
            shared = min(completions[place].length for place in pair)
            for side, place in zip(("chosen", "rejected"), pair, strict=True):
                one = completions[place]
                values = {
                    f"{side}_logps": one.policy.sum(),
                    f"reference_{side}_logps": one.reference.sum(),
                    f"{side}_lengths": torch.tensor(float(one.length)),
                    f"{side}_public_logps": one.policy[:shared].sum(),
                    f"reference_{side}_public_logps": one.reference[:shared].sum(),
                    f"{side}_confidence": (one.policy.detach() - one.log_sum_squares).mean(),
                    f"{side}_kl": one.kl.sum(),
                }
                for name, value in values.items():
                    columns.setdefault(name, []).append(value)
    return PairStats(**{name: torch.stack(values) for name, values in columns.items()}), torch.tensor(shares)


def step_loss(
    method: Method, config: Any, policy: nn.Module, reference: nn.Module, trees: Sequence[Any], seen: list[Tensor]
) -> tuple[Tensor, float]:
    """The mean over the step's trees, and the baseline if there is one.

    Args:
        seen: rewards of earlier steps, for a running mean; this step's are added.
    """
    scored = [completions_of(policy, reference, tree) for tree in trees]
    if method.needs is PairStats:
        stats, weights = pair_stats(trees, scored, config.ranked_pairs)
        baseline = 0.0
        if method.baseline is not None:
            seen.append(method.baseline(stats, method.settings(config)))
            mean = torch.cat(seen).mean()
            stats = PairStats(**{**vars(stats), "baseline": mean})
            baseline = float(mean)
        return (method(stats, config) * weights).sum() / len(trees), baseline
    if method.needs is UnpairedStats:
        own = [completions[: len(tree.desirable)] for tree, completions in zip(trees, scored, strict=True)]
        others = [completions[-1] for completions in scored]
        mean = torch.stack([(one.policy - one.reference).sum() for one in others]).mean().detach()
        flat = [one for completions in own for one in completions]
        weights = torch.tensor([1 / len(completions) for completions in own for _ in completions])
        unpaired = UnpairedStats(
            logps=torch.stack([one.policy.sum() for one in flat]),
            reference_logps=torch.stack([one.reference.sum() for one in flat]),
            lengths=torch.tensor([float(one.length) for one in flat]),
            desirable=torch.tensor([label for tree in trees for label in tree.desirable]),
            baseline=mean.clamp(min=0),
        )
        return (method(unpaired, config) * weights).sum() / len(trees), float(mean.clamp(min=0))
    flat = [one for completions in scored for one in completions]
    lists = ListStats(
        logps=torch.stack([one.policy.sum() for one in flat]),
        reference_logps=torch.stack([one.reference.sum() for one in flat]),
        lengths=torch.tensor([float(one.length) for one in flat]),
        list_ids=torch.tensor([index for index, completions in enumerate(scored) for _ in completions]),
        ranks=torch.tensor([rank for tree in trees for rank in tree.ranks]),
        lists=len(trees),
    )
    return method(lists, config).mean(), 0.0


def train_naively(
    method: Method, config: Any, policy: nn.Module, reference: nn.Module, steps: Sequence[Sequence[Any]], *, lr: float
) -> NaiveRun:
    """One AdamW step for each batch with a constant learning rate."""
    policy, reference = copy.deepcopy(policy), copy.deepcopy(reference).eval()
    settings = method.settings(config)
    parameters = dict(policy.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
    run, seen = NaiveRun(), []
    for number, trees in enumerate(steps, start=1):
        loss, baseline = step_loss(method, config, policy, reference, trees, seen)
        optimizer.zero_grad()
        loss.backward()
        run.losses.append(loss.item())
        run.baselines.append(baseline)
        run.gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        optimizer.step()
        if method.moving_reference and number % settings["ref_model_sync_steps"] == 0:
            alpha = settings["ref_model_mixup_alpha"]
            with torch.no_grad():
                for its, mine in zip(reference.parameters(), policy.parameters(), strict=True):
                    its.copy_(alpha * mine + (1 - alpha) * its)
    return run
