"""How does a loss that couples examples train, when a step's trees are in several forests and on several ranks?

The loss is a function of a few numbers per completion, so its derivative by these numbers says all that a forest must
know of the others:

    1. score every forest of the step without gradient             S (C,)
    2. the loss of all of them at once, on all ranks alike         dL/dS (C,)
    3. forest by forest, backward of  sum_c dL/dS_c * S_c          the chain rule

The second scoring must be the first one again, so dropout draws the same masks: the state of the random generators is
kept before each forest and set again.

Source: the same two passes train contrastive losses, Gao et al. 2021, arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo_engine.batch import PreferenceForest
from dpo_engine.losses import PairStats
from dpo_engine.train.ranks import joined_over_ranks


class Judged(NamedTuple):
    """What a method says of statistics."""

    losses: Tensor  # (B,)
    by_part: dict[str, Tensor]  # (B,) each, without gradient: of a mixture, the losses of its methods
    objective: Tensor  # ()
    stats: Any
    """The statistics, with the baseline that the losses were found with."""


@dataclass(frozen=True)
class StepPart:
    """What one forest must know of its step."""

    forest: PreferenceForest
    """With the reference's log-probs, where they can be known."""
    stats: PairStats
    """Without gradient; with the baseline that the losses were found with."""
    losses: Tensor  # (B,) of its pairs, without gradient
    by_part: dict[str, Tensor]  # (B,) each: of a mixture, the losses of its methods
    slopes: dict[str, Tensor]  # (B,) each: derivative of the objective by a field of the policy's
    generators: tuple[Tensor, ...]

    def objective(self, stats: PairStats) -> Tensor:
        """() whose gradient is that of the step's objective through this forest."""
        parts = [(slope * getattr(stats, name)).sum() for name, slope in self.slopes.items()]
        return torch.stack(parts).sum()


def step_parts(
    forests: Sequence[PreferenceForest],
    scored: Sequence[PairStats],
    generators: Sequence[tuple[Tensor, ...]],
    objective: Callable[[PairStats], Judged],
    accelerator: Accelerator,
) -> list[StepPart]:
    """One part for each forest.

    Args:
        forests: at least one, but it may be of no pairs.
        scored: each forest's sums, without gradient.
        generators: their states before each forest was scored.
        objective: of all pairs of the step, on all ranks.
    """
    sizes = [len(stats) for stats in scored]
    whole, mine = joined_over_ranks(accelerator, stacked(joined(scored)))
    together = unstacked(whole, scored[0])
    leaves = {
        name: value.detach().requires_grad_()
        for name in PairStats.with_gradient
        if (value := getattr(together, name)) is not None
    }
    with torch.enable_grad():
        judged = objective(replace(together, **leaves))
        slopes = torch.autograd.grad(judged.objective, list(leaves.values()), allow_unused=True, materialize_grads=True)

    def by_forest(values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        split = {name: value.detach()[mine].split(sizes) for name, value in values.items()}
        return [{name: pieces[index] for name, pieces in split.items()} for index in range(len(sizes))]

    by_field, by_part = by_forest(dict(zip(leaves, slopes, strict=True))), by_forest(judged.by_part)
    losses = judged.losses.detach()[mine].split(sizes)
    with_baseline = [replace(stats, baseline=judged.stats.baseline) for stats in scored]
    return [StepPart(*part) for part in zip(forests, with_baseline, losses, by_part, by_field, generators, strict=True)]


_PER_PAIR = tuple(field.name for field in fields(PairStats) if field.name != "baseline")


def joined(parts: Sequence[PairStats]) -> PairStats:
    """The pairs of several forests as one."""
    return unstacked(torch.cat([stacked(part) for part in parts], 1), parts[0])


def stacked(stats: PairStats) -> Tensor:
    """(F, B), without the fields that are None."""
    values = [getattr(stats, name) for name in _PER_PAIR]
    return torch.stack([value.detach().float() for value in values if value is not None])


def unstacked(values: Tensor, like: PairStats) -> PairStats:
    """What was stacked, of fields that `like` has."""
    names = [name for name in _PER_PAIR if getattr(like, name) is not None]
    return replace(like, **dict(zip(names, values, strict=True)))


def generator_states(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the random generators that a forward on `device` draws from."""
    cuda = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *cuda)


@contextmanager
def generators_at(states: tuple[Tensor, ...], device: torch.device) -> Iterator[None]:
    """Within it, random numbers are drawn from `states` on; afterwards as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield
