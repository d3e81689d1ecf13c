"""What does a pairwise loss get to see? A few numbers per completion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PairStats:
    """Sums over the scored tokens of B pairs; fields are (B,) float32 but for `baseline`; log-probs in nats, lengths in tokens."""

    chosen_logps: Tensor
    """`sum_t log pi(y_t)` of the chosen completion under the policy."""
    rejected_logps: Tensor
    """The same of the rejected completion."""
    reference_chosen_logps: Tensor | None = None
    """The chosen completion under the reference; None for a method that needs no reference."""
    reference_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor
    """Scored tokens of the chosen completion, its end-of-sequence token included."""
    rejected_lengths: Tensor
    weights: Tensor | None = None
    """What each pair's loss counts in a step's mean; None: 1. For whoever averages: no loss reads it."""
    baseline: Tensor | None = None
    """() what rewards are compared with, for a method that has a `baseline`; None: what the pairs given here say of it."""
