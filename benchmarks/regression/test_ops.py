"""Has a call of the operator become slower since another commit? Every case, implementation and dtype at one small shape.

    python -m pytest benchmarks/regression -p no:xdist -o addopts= -m "not slow" --benchmark-autosave     at the one commit
    python -m pytest benchmarks/regression -p no:xdist -o addopts= -m "not slow" --benchmark-compare      at the other

(`make bench-save`, `make bench-compare`.) Figures are kept in `.benchmarks/`, which git ignores. An answer is compared with
float64 before it is timed, so that nothing wrong becomes a figure. A small shape shows what a call costs around its products;
what it costs at sizes that are trained with is `python -m benchmarks.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.ops.cases import CASES, Problem, Shape, call, make_problems
from benchmarks.ops.errors import Truth, errors, truth
from benchmarks.ops.implementations import IMPLEMENTATIONS, NotAvailable

DTYPES = ("float32", "bfloat16")
ROUNDS, WARM_UP = 10, 2
ROWS, HIDDEN, VOCABULARY = 128, 64, 2048
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A log-prob, in bounds of the numeric standard. In bfloat16 many round the logits themselves: 2**-7 of the largest of them.
MOST_OVER_BOUND = {"float32": 10.0, "bfloat16": 2.0**-7 / (16 * 2.0**-23)}
MOST_OF_A_GRADIENT = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, in L2
MOST_OF_A_LOSS = {"float32": 1e-3, "bfloat16": 0.2}  # nats, of a mean over sums of 32 log-probs


def wrong(found: Mapping[str, Any], dtype: str) -> list[str]:
    """What of an answer's errors (`benchmarks.ops.errors`) is too large to time it."""
    limits = {
        "logp_over_bound": MOST_OVER_BOUND[dtype],
        "d_hidden": MOST_OF_A_GRADIENT[dtype],
        "d_weight": MOST_OF_A_GRADIENT[dtype],
        "loss": MOST_OF_A_LOSS[dtype],
    }
    return [
        f"{name} is {found[name]}; expected at most {limit:g}"
        for name, limit in limits.items()
        if name in found and not float(found[name]) <= limit
    ]


@cache
def problem_of(dtype: str) -> tuple[Shape, Problem, Truth]:
    shape = Shape(rows=ROWS, hidden=HIDDEN, vocabulary=VOCABULARY, dtype=dtype, device=DEVICE)
    [problem] = make_problems(shape, 1)
    return shape, problem, truth(problem)


def implementations() -> list[Any]:
    """Those that compile take seconds for each case before their first answer."""
    return [
        pytest.param(name, marks=pytest.mark.slow if entry.compiles else ()) for name, entry in IMPLEMENTATIONS.items()
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("case_name", CASES)
def test_a_call(case_name: str, name: str, dtype: str, benchmark: Any) -> None:
    case, entry = CASES[case_name], IMPLEMENTATIONS[name]
    shape, problem, exact = problem_of(dtype)
    try:
        score = entry.score(case, shape)
    except NotAvailable as why:
        pytest.skip(str(why))
    asked = entry.adapt(problem)
    found = errors(case, call(case, score, asked), asked, problem, exact)
    assert not wrong(found, dtype)
    benchmark.group = f"{case_name} {dtype}"
    benchmark.extra_info.update(rows=ROWS, hidden=HIDDEN, vocabulary=VOCABULARY, device=DEVICE, errors=found)
    benchmark.pedantic(call, args=(case, score, asked), rounds=ROUNDS, warmup_rounds=WARM_UP)
