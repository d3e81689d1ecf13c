"""How does the time of one `linear_logps` call grow with rows, hidden size and vocabulary?

What is not growth, and is left in: rows come in tiles of at most 1024, so fewer of them multiply less well (such points are
measured and shown, and the slope is taken without them); a number of rows that is no multiple of 16 would be padded to one,
and so all of them are; the pass over a tile's logits does not depend on the hidden size, so that a small one is dearer an
element; and a hidden size above 1024 gets tiles of half the rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import Neighbours, time_alternating
from benchmarks.ops.cases import CASES, Shape, call, make_problems
from benchmarks.ops.errors import errors, truth
from benchmarks.ops.implementations import IMPLEMENTATIONS
from benchmarks.scale.series import Point, Series

HEADS = {
    "engine_frozen": "frozen",
    "engine_trainable": "trainable",
}  # implementation -> case of the operator's benchmark
SETS = 2  # of random inputs, in turn
WORST_GRADIENT = 1e-4  # relative; float32 gives 1e-6


def measure(
    varied: str, values: Sequence[float], fixed: Mapping[str, Any], rounds: int, fitted_from: float
) -> list[Series]:
    """Forward and backward of a head that is frozen and of one that trains, all sizes and both heads in turn.

    Args:
        varied: "rows", "hidden" or "vocabulary"; `fixed` has the other two.
    """
    score_of = IMPLEMENTATIONS["engine tiled"].score
    runs: dict[str, Callable[[int], object]] = {}
    wrong: dict[str, str | None] = {}
    for value in values:
        shape = Shape(**{**fixed, varied: int(value)}, dtype="float32", device="cpu")
        problems = make_problems(shape, SETS)
        exact = truth(problems[0])
        for name, case in ((name, CASES[case]) for name, case in HEADS.items()):
            score = score_of(case, shape)
            found = errors(case, call(case, score, problems[0]), problems[0], problems[0], exact)
            wrong[f"{name} {value}"] = _wrong(found)
            runs[f"{name} {value}"] = partial(_call, case, score, problems)
    neighbours = Neighbours(repeats=rounds)
    timings = time_alternating(runs, rounds=rounds, neighbours=neighbours)
    return [
        Series(
            implementation=name,
            disturbed=neighbours.why,
            points=[
                Point(
                    x=value,
                    timing=timings[f"{name} {value}"],
                    seen={**fixed, varied: int(value)},
                    wrong=wrong[f"{name} {value}"],
                    in_fit=value >= fitted_from,
                )
                for value in values
            ],
        )
        for name in HEADS
    ]


def _call(case: Any, score: Any, problems: Sequence[Any], number: int) -> object:
    return call(case, score, problems[number % len(problems)])


def _wrong(found: Mapping[str, Any]) -> str | None:
    """What is wrong with an answer, by `benchmarks.ops.errors`."""
    if found["far"]:
        return f"wrong: a log-prob is off by {found['logp_over_bound']} times the bound"
    gradients = {name: found[name] for name in ("d_hidden", "d_weight") if name in found}
    worst = max(gradients, key=lambda name: float(gradients[name]))
    if not float(gradients[worst]) <= WORST_GRADIENT:
        return f"wrong: {worst} is off by {gradients[worst]}"
    return None
