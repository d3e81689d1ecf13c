"""What is kept of a row's softmax, and what can be said from it?

Everything is relative to the row constant `c` of `tile_pass`: with `e_v = exp(z_v - c)` and y the row's label,

    S = sum_{v != y} e_v        t = e_y        logp = -log1p(S / t)        1 - p_y = S / (S + t)

so a row that is sure of its label (S near 0) loses nothing to cancellation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EXTRAS = ("entropy", "log_sum_squares", "is_top1")


class TokenExtras(NamedTuple):
    """What else a tile's pass can tell of each token's distribution, without gradient; None where not asked for."""

    entropy: Tensor | None = None
    """`-sum_v p_v log p_v`, nats."""
    log_sum_squares: Tensor | None = None
    """`log sum_v p_v**2`, the log-probability that two draws agree."""
    is_top1: Tensor | None = None
    """bool, whether no other id has a larger logit than the label (a tie counts)."""


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """All (N,) in the accumulation dtype."""

    constants: Tensor  # c
    sums: Tensor  # S
    label_logits: Tensor  # z_y
    label_slopes: Tensor  # dz/dx at the label; 1 without a softcap

    @property
    def label_weights(self) -> Tensor:
        """`t = exp(z_y - c)`, at most 1."""
        return (self.label_logits - self.constants).exp()

    @property
    def totals(self) -> Tensor:
        """`S + t`."""
        return self.sums + self.label_weights

    def logps(self) -> Tensor:
        """`-log1p(S / t)`; by `z_y - c - log(S + t)` where `t` is too small to divide by. NaN where `z_y` is +inf."""
        t = self.label_weights
        direct = self.label_logits - self.constants - (self.sums + t).log()
        divisible = (t > 1e-20) & t.isfinite()
        return torch.where(divisible, -(self.sums / t).log1p(), direct)

    def at(self, span: slice | Tensor) -> RowStatistics:
        """Those rows only."""
        return self.unstacked(self.stacked()[:, span])

    def stacked(self) -> Tensor:
        """(4, N)."""
        return torch.stack([self.constants, self.sums, self.label_logits, self.label_slopes])

    @staticmethod
    def unstacked(stacked: Tensor) -> RowStatistics:
        constants, sums, label_logits, label_slopes = stacked.unbind(0)
        return RowStatistics(constants=constants, sums=sums, label_logits=label_logits, label_slopes=label_slopes)


def new_moments(constants: Tensor) -> Tensor:
    """(4, R) what `tile_pass` fills for the extras: largest other logit, `sum e (z - c)`, `sum e**2`, label's logit."""
    moments = constants.new_zeros(4, constants.shape[0])
    moments[0::3] = float("-inf")
    return moments


def extras_from_moments(stats: RowStatistics, moments: Tensor) -> Tensor:
    """(3, N) entropy, `log sum p**2` and is-top-1 (1 or 0), in the order of `EXTRAS`.

    With `A = sum_{v != y} e_v (z_v - c)` and `Q = sum_{v != y} e_v**2`:
    `H = log(S + t) - (A + t (z_y - c)) / (S + t)` and `log sum p**2 = log(Q + t**2) - 2 log(S + t)`.
    """
    largest, first, squares, label_logits = moments.unbind(0)
    t, total = stats.label_weights, stats.totals
    behind = torch.where(t == 0, 0.0, t * (stats.label_logits - stats.constants))
    # log1p where the label leads, so that a row that is sure of it keeps its digits.
    leads = stats.label_logits == stats.constants
    log_total = torch.where(leads, stats.sums.log1p(), total.log())
    log_squares = torch.where(leads, squares.log1p(), (squares + t * t).log())
    entropy = log_total - (first + behind) / total
    return torch.stack([entropy, log_squares - 2 * log_total, (label_logits >= largest).to(entropy.dtype)])


def extras_by_definition(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from (N, V) logits."""
    logps = logits.log_softmax(-1)
    probabilities = logps.exp()
    entropy = -torch.where(probabilities == 0, 0.0, probabilities * logps).sum(-1)
    is_top1 = logits.gather(-1, labels[:, None]).squeeze(-1) >= logits.amax(-1)
    return torch.stack([entropy, (2 * logps).logsumexp(-1), is_top1.to(entropy.dtype)])


def named_extras(stacked: Tensor, names: tuple[str, ...], shape: torch.Size) -> TokenExtras:
    """The rows of `stacked` (3, N) that were asked for, in `shape`."""
    values = {name: stacked[EXTRAS.index(name)].view(shape) for name in names}
    if "is_top1" in values:
        values["is_top1"] = values["is_top1"].bool()
    return TokenExtras(**values)
