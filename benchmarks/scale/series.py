"""What does measuring a case give? For each implementation a series: sizes, their times, and what else was seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import Timing


@dataclass(kw_only=True)
class Point:
    x: float
    timing: Timing
    seen: dict[str, Any] = field(default_factory=dict)  # kept beside the time
    wrong: str | None = None  # why the time is worth nothing: a numeric check that failed
    in_fit: bool = True


@dataclass(kw_only=True)
class Series:
    implementation: str
    points: list[Point]
    disturbed: str | None = None  # by others on the machine, so that no time of it is to be quoted
    fit_over: str | None = "x"  # "x", a name in `seen` that the slope is taken over, or None: there is no slope
    fit_of: str | None = None  # a name in `seen` of a Timing of which it is taken, instead of the time
