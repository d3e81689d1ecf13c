"""What does a loss get to see? A few numbers per completion.

PairStats        a chosen and a rejected completion
UnpairedStats    a completion and a label
ListStats        the completions of a prompt, ranked
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PairStats:
    """Sums over the scored tokens of B pairs; fields are (B,) float32 but for `baseline`; log-probs in nats, lengths in tokens.

    Fields that default to None are there for a method whose entry in `LOSSES` asks for them.
    """

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
    chosen_public_logps: Tensor | None = None
    """`chosen_logps` over the first `min(chosen_lengths, rejected_lengths)` tokens only, for a `public_part`."""
    rejected_public_logps: Tensor | None = None
    reference_chosen_public_logps: Tensor | None = None
    reference_rejected_public_logps: Tensor | None = None
    chosen_confidence: Tensor | None = None
    """`mean_t(log pi(y_t) - log sum_v pi(v)**2)`, without gradient, of the extra output "log_sum_squares"."""
    rejected_confidence: Tensor | None = None
    chosen_kl: Tensor | None = None
    """`sum_t KL(reference || policy)` over the vocabulary, at the places of the scored tokens, for `token_kl`."""
    rejected_kl: Tensor | None = None
    weights: Tensor | None = None
    """What each pair's loss counts in a step's mean; None: 1. For whoever averages: no loss reads it."""
    shares: Tensor | None = None
    """What part of its tree a pair is: 1 over the tree's pairs; None: 1. For whoever averages metrics."""
    k3: Tensor | None = None
    """`sum_t expm1(d_t) - d_t`, d = log pi - log reference, mean of both completions; for metrics."""
    baseline: Tensor | None = None
    """() what rewards are compared with, for a method that has a `baseline`; None: what the pairs given here say of it."""

    with_gradient: ClassVar[tuple[str, ...]] = (
        "chosen_logps", "rejected_logps", "chosen_public_logps", "rejected_public_logps", "chosen_kl", "rejected_kl",
    )  # fmt: skip
    """Fields of the policy that a loss is differentiated by."""

    def __len__(self) -> int:
        return len(self.chosen_logps)


@dataclass(frozen=True, kw_only=True)
class UnpairedStats:
    """Sums over the scored tokens of B completions, of any prompts; fields are (B,) but for `baseline`; nats, tokens."""

    logps: Tensor
    """`sum_t log pi(y_t)` under the policy."""
    reference_logps: Tensor | None = None
    lengths: Tensor
    desirable: Tensor
    """bool: whether the completion is one to be made likelier."""
    weights: Tensor | None = None
    shares: Tensor | None = None
    """What part of its tree a completion is: 1 over the tree's completions; None: 1."""
    k3: Tensor | None = None
    baseline: Tensor | None = None
    """() `z0`: how far policy and reference are apart, without gradient; for a method that has `mismatched` completions."""

    with_gradient: ClassVar[tuple[str, ...]] = ("logps",)

    def __len__(self) -> int:
        return len(self.logps)


@dataclass(frozen=True, kw_only=True)
class ListStats:
    """Sums over the scored tokens of C completions of T prompts, prompt by prompt, best first; fields are (C,) but for two."""

    logps: Tensor
    """`sum_t log pi(y_t)` under the policy."""
    reference_logps: Tensor | None = None
    lengths: Tensor
    list_ids: Tensor
    """int64, whose list a completion is in: ascending from 0, each of `[0, lists)` at least once."""
    ranks: Tensor
    """int64, 0 for a list's best; ascending within it, equal where two tie."""
    lists: int
    """T."""
    weights: Tensor | None = None
    """(T,) what each list's loss counts in a step's mean; None: 1."""
    k3: Tensor | None = None

    with_gradient: ClassVar[tuple[str, ...]] = ("logps",)

    def __len__(self) -> int:
        return self.lists
