"""What is logged about a batch of pairs? Sums that stay on the device until they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_engine.losses import PairStats

_TIE = 2.0**-19  # of the four sums' sizes: two packings of one pair differ by about 2**-21 of them in float32


def pair_metrics(stats: PairStats, losses: Tensor, beta: float) -> dict[str, Tensor]:
    """Sums over the B pairs of every logged quantity, without gradient.

    `rewards/chosen = beta * (logps - reference_logps)`. `rewards/accuracies` counts a pair whose two rewards are equal, to
    float32's rounding of the sums that they are differences of, as half: before the first step every pair is such a tie,
    also where policy and reference were computed in other batches.
    """
    with torch.no_grad():
        metrics = {"loss": losses, "logps/chosen": stats.chosen_logps, "logps/rejected": stats.rejected_logps}
        if stats.reference_chosen_logps is not None and stats.reference_rejected_logps is not None:
            chosen = beta * (stats.chosen_logps - stats.reference_chosen_logps)
            rejected = beta * (stats.rejected_logps - stats.reference_rejected_logps)
            four = (
                stats.chosen_logps,
                stats.rejected_logps,
                stats.reference_chosen_logps,
                stats.reference_rejected_logps,
            )
            tie = _TIE * beta * torch.stack([sums.abs() for sums in four]).sum(0)
            metrics |= {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": 0.5 * ((chosen - rejected > tie).float() + (chosen - rejected >= -tie).float()),
            }
        return {name: values.detach().sum() for name, values in metrics.items()}


@dataclass
class RunningMean:
    """The mean of everything added since a run began; it stays on the device until it is read."""

    count: int = 0
    total: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Count `values` (B,) in."""
        self.total = self.total + values.detach().double().sum()
        self.count += len(values)

    def mean(self) -> Tensor | None:
        """() float32; None before anything was added."""
        return (torch.as_tensor(self.total) / self.count).float() if self.count else None


class MetricSums:
    """Running sums of metrics and the number of pairs they are over."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, sums: dict[str, Tensor], count: int) -> None:
        """Add sums over `count` pairs; nothing is read from the device."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += count

    def stacked(self, device: torch.device) -> Tensor:
        """(names + 1,) float64: every sum, then the count, ready to be added over ranks."""
        values = [value.double() for value in self.sums.values()]
        return torch.stack([*values, torch.tensor(float(self.count), dtype=torch.float64, device=device)])

    def means(self, stacked: Tensor) -> dict[str, float]:
        """Means by name from what `stacked` gave (added over ranks); the one place that reads the device."""
        *sums, count = stacked.tolist()
        return {name: value / count for name, value in zip(self.sums, sums, strict=True)}
