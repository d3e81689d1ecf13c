"""Is `linear_logps(backend="triton")` right in all of its three paths: no gradient, frozen head, head that trains?

Run by `tests/reference/test_linear_logps_triton.py` in a process of its own, under Triton's interpreter. By hand, from the
root:

    TRITON_INTERPRET=1 python -m pytest tests/support/linear_logps_triton_cases.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dpo_engine.ops import linear_logps, passes, plan
from support.head_distributions import gap, minus_infinity, randn, rising, strided, with_bias
from support.interpreted import INTERPRETED
from support.oracle import (
    Answer,
    Case,
    assert_gradients_within_bound,
    assert_logps_within_bound,
    computed,
    plain,
    truth,
)

if not INTERPRETED:
    pytest.skip("inputs are on the CPU: needs TRITON_INTERPRET=1", allow_module_level=True)

CASES: dict[str, Callable[[], Case]] = {
    "ragged": lambda: randn(n=19, d=23, v=107),
    "one row of two words": lambda: randn(n=1, d=3, v=2),
    "bias, scale and softcap": lambda: with_bias(v=131, n=6, logit_scale=1.75, softcap=4.0),
    "negative scale": lambda: randn(n=6, v=70, logit_scale=-2.5),
    "confident": lambda: gap(8.0, 36.0, n=9, v=60),
    "logp below -130": lambda: gap(-300.0, -140.0, n=6, v=60),
    "rising": lambda: rising(n=5, v=200),
    "a block of -inf": lambda: minus_infinity(n=5, v=200, masked=slice(40, 140)),
    "strided": lambda: strided(n=7, v=130),
}
HALVES = ("ragged", "bias, scale and softcap", "confident", "strided")
RUNS = [(name, torch.float32) for name in CASES]
RUNS += [(name, dtype) for name in HALVES for dtype in (torch.bfloat16, torch.float16)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs, and two row tiles where there are more than 16 rows.

    Products are float32, since the interpreter cuts bfloat16 off when it stores.
    """
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 64)
    monkeypatch.setattr(plan, "cpu_multiplies_bfloat16", lambda: False)


@pytest.fixture(autouse=True)
def no_torch_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the work be done by plain torch after all, the test fails."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("plain torch was called in place of a kernel")

    monkeypatch.setattr(passes, "TORCH_PASSES", passes.TilePasses(forward=refuse, backward=refuse))


@pytest.mark.parametrize("path", ["no gradient", "frozen", "trainable"])
@pytest.mark.parametrize("name,dtype", RUNS)
def test_triton_agrees_with_float64(name: str, dtype: torch.dtype, path: str) -> None:
    case = CASES[name]().to(dtype)
    exact, unfused, bound = truth(case), plain(case), case.bound()
    if path == "no gradient":
        logps = linear_logps(case.hidden, case.weight, case.labels, backend="triton", **case.head)
        assert_logps_within_bound(logps, exact.logps, bound)
        return
    ours = computed(case, trains=path == "trainable", backend="triton")
    assert_logps_within_bound(ours.logps, exact.logps, bound)
    assert_gradients_within_bound(ours, exact, unfused, case, bound)


@pytest.mark.parametrize("path", ["no gradient", "frozen", "trainable"])
def test_autocast_rounds_as_the_definition_does(path: str) -> None:
    case = with_bias(v=70, n=7)
    rounded = case.to(torch.bfloat16)
    trains = path == "trainable"
    hidden, weight, bias = (
        t.clone().requires_grad_(wanted)
        for t, wanted in ((case.hidden, path != "no gradient"), (case.weight, trains), (case.bias, trains))
        if t is not None
    )
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logps(hidden, weight, case.labels, bias=bias, backend="triton")
    exact, bound = truth(rounded), rounded.bound()
    assert_logps_within_bound(logps.detach(), exact.logps, bound)
    if path != "no gradient":
        logps.backward(case.upstream)
        ours = Answer(logps=logps.detach(), d_hidden=hidden.grad, d_weight=weight.grad, d_bias=bias.grad)
        assert_gradients_within_bound(ours, exact, plain(rounded), rounded, bound)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("path", ["no gradient", "frozen", "trainable"])
def test_nothing_to_score_is_zero(path: str, rows: int) -> None:
    hidden = torch.full((rows, 5), float("nan"), requires_grad=path != "no gradient")
    weight = torch.ones(7, 5, requires_grad=path == "trainable")
    logps = linear_logps(hidden, weight, torch.full((rows,), -100), backend="triton")
    assert torch.equal(logps, torch.zeros(rows))
    if logps.requires_grad:
        logps.sum().backward()
        assert torch.equal(hidden.grad, torch.zeros(rows, 5))


def test_ignored_rows_are_zero_even_if_they_hold_nan() -> None:
    case = randn(n=18, v=40)
    ignored = torch.arange(18) % 3 == 0
    dirty = replace(
        case,
        labels=case.labels.masked_fill(ignored, -100),
        hidden=case.hidden.masked_fill(ignored[:, None], float("nan")),
    )
    ours, alone = (
        computed(dirty, trains=False, backend="triton"),
        computed(case.rows(~ignored), trains=False, backend="triton"),
    )
    assert bool((ours.logps[ignored] == 0).all()) and bool((ours.d_hidden[ignored] == 0).all())
    assert torch.equal(ours.logps[~ignored], alone.logps) and torch.equal(ours.d_hidden[~ignored], alone.d_hidden)
