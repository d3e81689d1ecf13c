"""What is logged about a batch? Sums and counts that stay on the device until they are read.

Names are the same whatever the data: of unpaired data "chosen" are the desirable completions and "rejected" the others, of a
ranked list the best and the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_engine.losses import ListStats, Method, PairStats, UnpairedStats
from dpo_engine.losses.method import Stats

_TIE = 2.0**-19  # of the sums' sizes: two packings of one pair differ by about 2**-21 of them in float32

Sums = dict[str, Tensor]
"""(2,) each: a sum, and what it is divided by to be a mean."""


def stats_metrics(
    method: Method, stats: Stats, losses: Tensor, config: Any, by_part: Mapping[str, Tensor] | None = None
) -> Sums:
    """Every logged quantity of a batch, without gradient; the same names for every batch of a run.

    `rewards/chosen = beta * (logps - reference_logps)`; without a reference, `beta * logps`; means over tokens where the method
    compares those (but `ipo`'s are of sums, as TRL's). `rewards/accuracies` counts completions whose rewards are equal, to
    float32's rounding of the sums that they are differences of, as half: before the first step every pair is such a tie, also
    where policy and reference were computed in other batches. `logps/chosen_shift` is the chosen log-prob less the
    reference's. `kl` is KL(reference || policy) of a completion, in nats: exact where the method has the whole distribution,
    else `sum_t expm1(d_t) - d_t` (k3) at the data's tokens, of which that is the mean where they are the reference's own.

    Args:
        by_part: of a mixture, each method's losses (B,).
    """
    with torch.no_grad():
        settings = method.settings(config)
        scale = settings.get("beta", 1.0)
        if isinstance(stats, PairStats):
            compared = stats
            if method.sums is not None:
                names = ("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
                compared = replace(stats, **dict(zip(names, method.sums(stats, settings), strict=True)))
            metrics = _pair_metrics(method, compared, stats, losses, scale)
        elif isinstance(stats, UnpairedStats):
            metrics = _unpaired_metrics(stats, losses, scale)
        else:
            metrics = _list_metrics(stats, losses, scale)
        shares = None if isinstance(stats, ListStats) else stats.shares
        for name, values in (by_part or {}).items():
            metrics[f"loss/{name}"] = _mean(values, shares)
        return metrics


def _mean(values: Tensor, shares: Tensor | None = None, where: Tensor | None = None) -> Tensor:
    """(2,): the sum of `values` and their number, each counting its share, those that `where` names only."""
    counts = torch.ones_like(values) if shares is None else shares.to(values)
    if where is not None:
        counts = counts * where
        values = torch.where(where, values, 0.0)
    return torch.stack([(values * counts).sum(), counts.sum()]).detach()


def _won(margins: Tensor, sizes: Tensor) -> Tensor:
    """1 where a margin is above 0, 1/2 where it is 0 to the rounding of numbers of these sizes."""
    tie = _TIE * sizes
    return 0.5 * ((margins > tie).to(margins) + (margins >= -tie).to(margins))


def _pair_metrics(method: Method, stats: PairStats, plain: PairStats, losses: Tensor, beta: float) -> Sums:
    """
    Args:
        stats: with the sums that the method compares.
        plain: with those of all tokens alike, whose sizes decide what rounding makes of them.
    """
    sides = []
    for side in ("chosen", "rejected"):
        logps, lengths = getattr(stats, f"{side}_logps"), getattr(stats, f"{side}_lengths")
        reference = getattr(stats, f"reference_{side}_logps")
        scale = beta / lengths if method.reward_per_token else torch.full_like(logps, beta)
        under = torch.zeros_like(logps) if reference is None else reference
        sizes = [getattr(plain, name) for name in (f"{side}_logps", f"reference_{side}_logps")]
        size = torch.stack([sums.abs() for sums in sizes if sums is not None]).sum(0)
        sides.append((side, logps, lengths, scale * (logps - under), scale * size))
    shares = stats.shares
    metrics = {"loss": _mean(losses, shares)}
    for side, logps, lengths, rewards, _ in sides:
        metrics |= {
            f"logps/{side}": _mean(logps, shares),
            f"rewards/{side}": _mean(rewards, shares),
            f"lengths/{side}": _mean(lengths, shares),
        }
    margins = sides[0][3] - sides[1][3]
    metrics["rewards/margins"] = _mean(margins, shares)
    metrics["rewards/accuracies"] = _mean(_won(margins, sides[0][4] + sides[1][4]), shares)
    reference = stats.reference_chosen_logps
    if method.needs_reference and reference is not None:
        metrics["logps/chosen_shift"] = _mean(stats.chosen_logps - reference, shares)
        kl = stats.k3
        if stats.chosen_kl is not None and stats.rejected_kl is not None:
            kl = (stats.chosen_kl + stats.rejected_kl) / 2
        metrics["kl"] = _none(losses) if kl is None else _mean(kl, shares, ~kl.isnan())
    return metrics


def _unpaired_metrics(stats: UnpairedStats, losses: Tensor, beta: float) -> Sums:
    assert stats.reference_logps is not None
    shares, ratios = stats.shares, stats.logps - stats.reference_logps
    rewards, baseline = beta * ratios, 0.0 if stats.baseline is None else stats.baseline
    signs = torch.where(stats.desirable, 1.0, -1.0)
    distances = signs * (ratios - baseline)
    chosen, rejected = _mean(rewards, shares, stats.desirable), _mean(rewards, shares, ~stats.desirable)
    metrics = {"loss": _mean(losses, shares), "rewards/chosen": chosen, "rewards/rejected": rejected}
    for side, where in (("chosen", stats.desirable), ("rejected", ~stats.desirable)):
        metrics[f"logps/{side}"] = _mean(stats.logps, shares, where)
        metrics[f"lengths/{side}"] = _mean(stats.lengths, shares, where)
    sizes = stats.logps.abs() + stats.reference_logps.abs()
    metrics["rewards/accuracies"] = _mean(_won(distances, sizes), shares)
    metrics["logps/chosen_shift"] = _mean(ratios, shares, stats.desirable)
    metrics["kl"] = _none(losses) if stats.k3 is None else _mean(stats.k3, shares)
    if stats.baseline is not None:
        metrics["kl/baseline"] = torch.stack([stats.baseline, torch.ones_like(stats.baseline)]).to(losses)
    return metrics


def _list_metrics(stats: ListStats, losses: Tensor, beta: float) -> Sums:
    """Accuracy is the share of a list's pairs, of different ranks, that are in the right order."""
    assert stats.reference_logps is not None
    ratios = stats.logps - stats.reference_logps
    rewards, ids, ranks = beta * ratios, stats.list_ids, stats.ranks
    sizes = beta * (stats.logps.abs() + stats.reference_logps.abs())
    is_first, is_last = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    is_first[1:] = is_last[:-1] = ids[1:] != ids[:-1]
    metrics = {"loss": _mean(losses)}
    for side, where in (("chosen", is_first), ("rejected", is_last)):
        metrics |= {
            f"logps/{side}": _mean(stats.logps, None, where),
            f"rewards/{side}": _mean(rewards, None, where),
            f"lengths/{side}": _mean(stats.lengths, None, where),
        }
    ends = torch.where(is_first, rewards, 0.0) - torch.where(is_last, rewards, 0.0)
    metrics["rewards/margins"] = _mean(torch.zeros_like(losses).index_add(0, ids, ends.to(losses)))
    better = (ids[:, None] == ids[None, :]) & (ranks[:, None] < ranks[None, :])
    won = torch.where(better, _won(rewards[:, None] - rewards[None, :], sizes[:, None] + sizes[None, :]), 0.0)
    pairs = torch.zeros_like(losses).index_add(0, ids, better.to(losses).sum(1))
    right = torch.zeros_like(losses).index_add(0, ids, won.sum(1).to(losses))
    metrics["rewards/accuracies"] = _mean(torch.where(pairs > 0, right / pairs.clamp(min=1), 0.5))
    metrics["logps/chosen_shift"] = _mean(ratios, None, is_first)
    metrics["kl"] = _none(losses) if stats.k3 is None else _mean(stats.k3)
    return metrics


def _none(like: Tensor) -> Tensor:
    """Of a quantity that is not known: a mean over nothing."""
    return like.new_zeros(2)


class MetricSums:
    """Running sums of metrics, each with what it is divided by."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(self, sums: Sums) -> None:
        """Add a batch's; nothing is read from the device."""
        for name, value in sums.items():
            value = value.double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def stacked(self) -> Tensor:
        """(names, 2) float64, ready to be added over ranks."""
        return torch.stack(list(self.sums.values()))

    def means(self, stacked: Tensor) -> dict[str, float]:
        """Means by name from what `stacked` gave (added over ranks); the one place that reads the device.

        What nothing was counted of is left out.
        """
        means = {name: total / count for name, (total, count) in zip(self.sums, stacked.tolist(), strict=True) if count}
        if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means
