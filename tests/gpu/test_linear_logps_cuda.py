"""Is every backend right on a card, in value and in every gradient, on the inputs that break such operators?

The same distributions and bounds as `tests/reference/test_linear_logps.py`, with what only a card has: matrix units that cut
off, compiled kernels, the vendor's GEMM. By hand: `make gpu PART=correctness`.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_logps
from support.devices import DEVICE, ON_CUDA, possible_backends
from support.head_distributions import DISTRIBUTIONS, randn, with_bias
from support.oracle import (
    Answer,
    Case,
    assert_gradients_within_bound,
    assert_logps_within_bound,
    computed,
    plain,
    truth,
)

pytestmark = pytest.mark.gpu

DEPTH = 4096 if ON_CUDA else 64
# Besides the common ones: more than a row tile, and depths at which matrix units add many products up.
CASES = {
    **DISTRIBUTIONS,
    "three row tiles": lambda: randn(n=2100, d=40, v=3000),
    "deep": lambda: randn(n=130, d=DEPTH, v=2 * DEPTH + 808, spread=4.0),
    "deep, odd depth": lambda: randn(n=70, d=DEPTH // 4 - 3, v=DEPTH + 907, spread=4.0),
    "deep, bias and softcap": lambda: with_bias(v=DEPTH + 907, n=70, d=DEPTH // 4, softcap=30.0),
}
FEW = ("randn", "bias, scale and softcap", "confident", "rising", "deep")  # for the dtype that is asked for least
RUNS = [(name, dtype) for name in (CASES if ON_CUDA else FEW) for dtype in (torch.float32, torch.bfloat16)]
RUNS += [(name, torch.float16) for name in FEW]
PATHS = ("no gradient", "frozen", "trainable")


@functools.lru_cache(maxsize=4)
def solved(name: str, dtype: torch.dtype) -> tuple[Case, Answer, Answer, Tensor]:
    """`(case, truth, plain torch, b)`; tests of one case follow each other."""
    case = CASES[name]().to(dtype, DEVICE)
    return case, truth(case), plain(case), case.bound()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", possible_backends())
@pytest.mark.parametrize("name,dtype", RUNS, ids=lambda value: str(value).removeprefix("torch."))
def test_a_backend_agrees_with_float64(name: str, dtype: torch.dtype, backend: str, path: str) -> None:
    case, exact, unfused, bound = solved(name, dtype)
    # Only the definition rounds logits to the dtype of the inputs.
    rounded = unfused.logps if backend == "reference" and dtype != torch.float32 else None
    if path == "no gradient":
        logps = linear_logps(case.hidden, case.weight, case.labels, backend=backend, **case.head)
        assert_logps_within_bound(logps, exact.logps, bound, rounded)
        return
    ours = computed(case, trains=path == "trainable", backend=backend)
    assert (ours.d_weight is not None) == (path == "trainable")
    assert_logps_within_bound(ours.logps, exact.logps, bound, rounded)
    assert_gradients_within_bound(ours, exact, unfused, case, bound)


@pytest.mark.parametrize("backend", possible_backends())
@pytest.mark.parametrize("path", PATHS)
def test_ignored_rows_are_zero_even_if_they_hold_nan(path: str, backend: str) -> None:
    case = with_bias(v=80, n=40).to(torch.float32, DEVICE)
    ignored = torch.arange(40, device=DEVICE) % 3 == 0
    hidden = case.hidden.masked_fill(ignored[:, None], float("nan")).requires_grad_(path != "no gradient")
    weight = case.weight.clone().requires_grad_(path == "trainable")
    labels = case.labels.masked_fill(ignored, -100)
    logps = linear_logps(hidden, weight, labels, bias=case.bias, backend=backend)
    exact = truth(case.rows(~ignored))
    assert bool((logps[ignored] == 0).all())
    assert_logps_within_bound(logps[~ignored].detach(), exact.logps, case.rows(~ignored).bound())
    if path != "no gradient":
        logps.backward(case.upstream)
        assert hidden.grad is not None and bool((hidden.grad[ignored] == 0).all())
        assert bool(hidden.grad.isfinite().all())
    if path == "trainable":
        assert weight.grad is not None and bool(weight.grad.isfinite().all())
