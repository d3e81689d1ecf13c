"""How long do calls take? Every case in turn, round by round, and quantiles of that.

Nothing in this package imports torch, so that a benchmark's parent process stays small.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.neighbours import Neighbours

# Of a median: a ratio whose p20 and p80 are further apart tells nothing that another run would confirm within 15 %.
SPREAD = 0.3


@dataclass(frozen=True)
class Timing:
    """Seconds of one case, a number a round, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return quantile(self.seconds, 0.5)

    @property
    def p20(self) -> float:
        return quantile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.seconds, 0.8)

    @property
    def why(self) -> str | None:
        """Why this is not to be quoted, or None: the middle three fifths of its rounds lie too far apart."""
        if self.p80 - self.p20 <= SPREAD * self.median:
            return None
        return f"too noisy to tell: the 20th and the 80th percentile are {self.p20:.3g} and {self.p80:.3g}"

    def over(self, floor: Timing) -> Timing:
        """This time as a multiple of `floor`, round by round: what slowed a whole round down cancels."""
        return Timing(tuple(mine / its for mine, its in zip(self.seconds, floor.seconds, strict=True)))


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile, linear between neighbours.

    Args:
        values: at least one number, in any order.
        q: in [0, 1].
    """
    ordered = sorted(values)
    below, part = divmod(q * (len(ordered) - 1), 1)
    low = ordered[int(below)]
    return low if part == 0 else low + part * (ordered[int(below) + 1] - low)


def time_alternating(
    cases: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    warmup: int = 1,
    until: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] = lambda: None,
    neighbours: Neighbours | None = None,
) -> dict[str, Timing]:
    """Time every case once a round, in an order that is reversed every other round.

    Args:
        cases: name -> function of the round's number, which picks its inputs by it. What it returns is dropped after the
            clock has stopped.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that are not kept.
        until: no round starts after this, by `clock`, unless none was timed yet.
        clock: seconds.
        synchronize: waits until the device has done what it was given.
        neighbours: decides after each round whether it counts or is taken again.

    Returns:
        A `Timing` for each case, all of the same number of rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; expected at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    number = -warmup
    while number < rounds:
        if number > 0 and clock() > until:
            break
        if neighbours is not None:
            neighbours.start()
        this_round = {}
        for name in list(cases) if number % 2 == 0 else list(cases)[::-1]:
            synchronize()
            begin = clock()
            kept = cases[name](max(number, 0))
            synchronize()
            this_round[name] = clock() - begin
            del kept
        if number >= 0:
            if neighbours is not None and not neighbours.keep():
                continue
            for name, value in this_round.items():
                seconds[name].append(value)
        number += 1
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def first_calls(
    cases: Mapping[str, Callable[[int], object]],
    *,
    limit_s: float,
    catch: tuple[type[Exception], ...],
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, str]:
    """Call every case once, as the warm-up and to learn which of them can take part in the rounds.

    Args:
        limit_s: a case whose call took longer is not measured; nothing is put in its figure's place.
        catch: what a case may raise without stopping the others.

    Returns:
        Name -> why not, of those that cannot.
    """
    dropped = {}
    for name, run in cases.items():
        synchronize()
        begin = clock()
        try:
            run(0)
            synchronize()
        except catch as error:
            dropped[name] = f"failed: {one_line(error)}"
            continue
        seconds = clock() - begin
        if seconds > limit_s:
            dropped[name] = f"not measured: one call took {seconds:.0f} s"
    return dropped


def one_line(error: BaseException, width: int = 160) -> str:
    """What went wrong, on one line that is not too long for a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 3] + "..."
