"""What did others do with this machine's cores while something was timed?

Time that a virtual machine's host took away (`steal`) counts as theirs. Linux only: elsewhere nothing is known, and nothing
is refused for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL = 0, 1, 2, 5, 6, 7  # columns of /proc/stat


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Seconds since some fixed moment, summed over the cores that this process may use."""

    wall: float
    busy: float  # of everybody, this process included
    stolen: float
    own: float  # CPU time of this process, and of its children that have ended


def read_cores() -> Reading | None:
    """The cores as they stand; None where the kernel does not tell."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    columns = [[int(word) for word in line.split()[1:]] for line in lines if line.split(" ", 1)[0] in mine]
    if not columns or any(len(row) <= _STEAL for row in columns):
        return None
    used = os.times()
    return Reading(
        wall=time.perf_counter(),
        busy=sum(row[i] for row in columns for i in (_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ)) / TICKS_A_SECOND,
        stolen=sum(row[_STEAL] for row in columns) / TICKS_A_SECOND,
        own=sum(used[:4]),
    )


@dataclass(kw_only=True)
class Neighbours:
    """Watches spans of time; a span is disturbed where others had more than `limit` of the cores.

    Counters move in hundredths of a second: of a span shorter than a fifth of a second nothing is known.
    """

    limit: float = 0.1
    """Share of all cores."""
    repeats: int = 0
    """Disturbed rounds that may be thrown away and timed again."""
    read: Callable[[], Reading | None] = read_cores
    shares: list[float] = field(default_factory=list)
    """Of each span that was kept."""
    repeated: int = 0
    _begin: Reading | None = None

    def start(self) -> None:
        """A span begins."""
        self._begin = self.read()

    def share(self) -> float:
        """What others have had of the cores since the span began, between 0 and 1; 0 where it is not known."""
        end = self.read()
        if self._begin is None or end is None or end.wall - self._begin.wall < 0.2:
            return 0.0
        theirs = (end.busy - self._begin.busy) - (end.own - self._begin.own) + (end.stolen - self._begin.stolen)
        return max(0.0, theirs / ((end.wall - self._begin.wall) * len(os.sched_getaffinity(0))))

    def keep(self) -> bool:
        """Whether the span that ends here counts; False: it is to be timed again."""
        share = self.share()
        if share > self.limit and self.repeated < self.repeats:
            self.repeated += 1
            return False
        self.shares.append(round(share, 3))
        return True

    @property
    def why(self) -> str | None:
        """Why what was timed is not to be quoted, or None: more than a third of the spans were disturbed."""
        disturbed = [share for share in self.shares if share > self.limit]
        if 3 * len(disturbed) <= len(self.shares):
            return None
        return (
            f"too noisy to tell: others had up to {max(disturbed):.0%} of the cores in {len(disturbed)} of "
            f"{len(self.shares)} rounds"
        )
