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

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo_engine.losses import PairStats
from dpo_engine.train.ranks import joined_over_ranks

_PER_PAIR = tuple(field.name for field in fields(PairStats) if field.name != "baseline")


@dataclass(frozen=True)
class StepPart:
    """What one forest must know of its step."""

    stats: PairStats
    losses: Tensor  # (B,) of its pairs, without gradient
    by_chosen: Tensor  # (B,) derivative of the objective by each chosen sum
    by_rejected: Tensor
    generators: tuple[Tensor, ...]

    def objective(self, stats: PairStats) -> Tensor:
        """() whose gradient is that of the step's objective through this forest."""
        return (self.by_chosen * stats.chosen_logps + self.by_rejected * stats.rejected_logps).sum()


def step_parts(
    scored: Sequence[PairStats],
    generators: Sequence[tuple[Tensor, ...]],
    objective: Callable[[PairStats], tuple[Tensor, Tensor]],
    accelerator: Accelerator,
) -> list[StepPart]:
    """One part for each forest.

    Args:
        scored: each forest's sums, without gradient; at least one, but it may be of no pairs.
        generators: their states before each forest was scored.
        objective: `(losses (B,), objective ())` of all pairs of the step, on all ranks.
    """
    sizes = [len(stats.chosen_logps) for stats in scored]
    whole, mine = joined_over_ranks(accelerator, stacked(joined(scored)))
    together = unstacked(whole, scored[0])
    chosen, rejected = (sums.detach().requires_grad_() for sums in (together.chosen_logps, together.rejected_logps))
    with torch.enable_grad():
        losses, total = objective(replace(together, chosen_logps=chosen, rejected_logps=rejected))
        by_chosen, by_rejected = torch.autograd.grad(total, (chosen, rejected))
    slices = [values[mine].split(sizes) for values in (losses.detach(), by_chosen, by_rejected)]
    return [StepPart(*part) for part in zip(scored, *slices, generators, strict=True)]


def joined(parts: Sequence[PairStats]) -> PairStats:
    """The pairs of several forests as one."""
    return unstacked(torch.cat([stacked(part) for part in parts], 1), parts[0])


def stacked(stats: PairStats) -> Tensor:
    """(F, B), without the fields that are None."""
    values = [getattr(stats, name) for name in _PER_PAIR]
    return torch.stack([value.detach().float() for value in values if value is not None])


def unstacked(values: Tensor, like: PairStats) -> PairStats:
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
