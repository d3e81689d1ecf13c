"""How steep is a growth, and does it keep a claim?

The slope of log time over log size, by least squares: 1 is linear, 2 quadratic. That is a power law laid through points, and
three things bend it that are no growth:

- A fixed cost, however small the size. It lowers the slope, and may hide a true growth at the large end behind it. So sizes
  begin where it is small, and the slope between the two largest sizes stands beside (`slope_last`).
- A machine that is slower in one round than in another. All sizes take turns within a round, so the slope of each single
  round is sound; its least and its largest are `slope_low` and `slope_high`, and where they lie further apart than a claim
  is wide, the claim is not to be quoted.
- A step in the size of what is computed: caches that run full, tiles that are padded. It is not averaged away here; the
  points stand in the records.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import Timing


@dataclass(frozen=True, kw_only=True)
class Fit:
    slope: float
    slope_low: float
    slope_high: float
    slope_last: float  # between the two largest sizes
    points: int


@dataclass(frozen=True, kw_only=True)
class Claim(ABC):
    """What a case says of the engine: that a figure is within `bound` of 1. `text` is what is printed."""

    text: str
    bound: float

    def holds(self, sizes: Sequence[float], timings: Sequence[Timing]) -> bool:
        return abs(self.figure(sizes, [timing.median for timing in timings]) - 1) <= self.bound

    @abstractmethod
    def figure(self, sizes: Sequence[float], seconds: Sequence[float]) -> float:
        """What is to be 1."""

    def untold(self, sizes: Sequence[float], timings: Sequence[Timing]) -> str | None:
        """Why the rounds do not say whether it holds; None where they do."""
        rounds = list(zip(*(timing.seconds for timing in timings), strict=True))
        if len(rounds) < 2:
            return "one round: how noisy it was is not known"
        found = [self.figure(sizes, seconds) for seconds in rounds]
        if max(found) - min(found) > 2 * self.bound:
            return f"noisy: what is to be 1 reaches from {min(found):.2f} to {max(found):.2f} in single rounds"
        return None


class Linear(Claim):
    """The slope of log time over log size."""

    def figure(self, sizes: Sequence[float], seconds: Sequence[float]) -> float:
        return slope(sizes, seconds)


class SameEach(Claim):
    """The time of one of the largest size over that of one of the second largest."""

    def figure(self, sizes: Sequence[float], seconds: Sequence[float]) -> float:
        return (seconds[-1] / sizes[-1]) / (seconds[-2] / sizes[-2])


LINEAR = Linear(text="linear: slope within 0.10 of 1", bound=0.10)


def fit(sizes: Sequence[float], timings: Sequence[Timing]) -> Fit:
    """The slope over the medians, and how far those of single rounds lie from it.

    Args:
        sizes: ascending, at least two.
        timings: of each size, all of the same rounds.

    Raises:
        ValueError: fewer than two sizes, or a time that is not positive.
    """
    medians = [timing.median for timing in timings]
    rounds = zip(*(timing.seconds for timing in timings), strict=True)
    slopes = [slope(sizes, seconds) for seconds in rounds]
    return Fit(
        slope=slope(sizes, medians),
        slope_low=min(slopes),
        slope_high=max(slopes),
        slope_last=slope(sizes[-2:], medians[-2:]),
        points=len(sizes),
    )


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least squares of log value over log size."""
    if len(sizes) < 2 or len(set(sizes)) < 2:
        raise ValueError(f"sizes={list(sizes)}; expected at least two that differ, for a slope")
    if min(*sizes, *values) <= 0:
        raise ValueError(f"sizes={list(sizes)}, values={list(values)}; expected positive numbers, for logarithms")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - x_mean) ** 2 for a in x)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / across
