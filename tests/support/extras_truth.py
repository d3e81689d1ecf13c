"""What are the true extras of a token, and how far from them may an implementation be?

The truth is float64 from the same rounded inputs. With `o_v = z_v - max z` and the largest logit left out of the sums

    s = sum exp(o_v)        a = sum exp(o_v) o_v        q = sum exp(o_v)**2

    H = log1p(s) - a / (1 + s)        log sum p**2 = log1p(q) - 2 log1p(s)

all of which keep their digits where one word has nearly all of the probability.

The bound follows from how both move with the logits, `dH/dz_v = -p_v (log p_v + H)`, the sum of whose sizes is at most
`2 H`, and `d(log sum p**2)/dz_v = 2 (p_v**2 / sum p**2 - p_v)`, at most 4 in sum. A logit is right to `b_i` (`support.row_bound`),
which also holds the handful of roundings of what is added up: exponents reach `log V` and twice the largest logit.

    anywhere                  |e_H| <= 2 b_i (1 + H)        |e_L| <= 4 b_i
    label has p >= 1/2        |e_H| <= 4 b_i H              |e_L| <= 4 b_i |L|

The second line is for rows that are sure of their *label*: exponentials are taken relative to it, so nothing cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from support.oracle import Case
from support.row_bound import logits_in_float64

TINY = 1e-37  # float32 has no digits below


@dataclass(frozen=True, kw_only=True)
class TrueExtras:
    """All (N,); float64 but for the bools."""

    entropy: Tensor
    log_sum_squares: Tensor
    ahead: Tensor  # z_y - max_{v != y} z_v, nats
    sure: Tensor  # whether p_y >= 1/2

    @property
    def is_top1(self) -> Tensor:
        return self.ahead >= 0


def true_extras(case: Case) -> TrueExtras:
    z = logits_in_float64(case.hidden, case.weight, case.bias, case.logit_scale, case.softcap) / case.temperature
    largest, top = z.max(1, keepdim=True)
    others = (z - largest).scatter(1, top, float("-inf"))
    e = others.exp()
    s, q = e.sum(1), e.square().sum(1)
    a = torch.where(e == 0, 0.0, e * others).sum(1)
    at_label = case.labels[:, None]
    z_label = z.gather(1, at_label).squeeze(1)
    ahead = z_label - z.scatter(1, at_label, float("-inf")).amax(1)
    return TrueExtras(
        entropy=s.log1p() - a / (1 + s),
        log_sum_squares=q.log1p() - 2 * s.log1p(),
        ahead=ahead,
        sure=(z_label - z.logsumexp(1)).exp() >= 0.5,
    )


def assert_extras_within_bound(
    entropy: Tensor, log_sum_squares: Tensor, is_top1: Tensor, exact: TrueExtras, bound: Tensor
) -> None:
    """By the rules above; a tie, or a lead that rounding may turn, may be told either way."""
    allowed = {
        "entropy": torch.where(exact.sure, 4 * bound * exact.entropy, 2 * bound * (1 + exact.entropy)),
        "log_sum_squares": 4 * bound * torch.where(exact.sure, exact.log_sum_squares.abs(), 1.0),
    }
    for name, given in (("entropy", entropy), ("log_sum_squares", log_sum_squares)):
        want = getattr(exact, name)
        excess = (given.double() - want).abs() - allowed[name] - TINY
        row = int(torch.nan_to_num(excess, nan=torch.inf).argmax())
        assert bool(excess[row] <= 0), (
            f"{name}, row {row}: {given[row]:.9g}, truth {want[row]:.9g}, {excess[row]:.3g} more than is allowed"
        )
    clear = exact.ahead.abs() > 2 * bound
    assert torch.equal(is_top1[clear], exact.is_top1[clear])
