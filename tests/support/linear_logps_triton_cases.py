"""Are the Triton backends of `linear_logps` right in all of three paths: no gradient, frozen head, head that trains?

Run by `tests/reference/test_linear_logps_triton.py` in a process of its own, under Triton's interpreter. By hand, from the
root:

    TRITON_INTERPRET=1 python -m pytest tests/support/linear_logps_triton_cases.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dpo_engine.ops import linear_logps, passes, plan
from support.extras_truth import assert_extras_within_bound, true_extras
from support.head_distributions import gap, minus_infinity, randn, rising, strided, with_bias
from support.interpreted import INTERPRETED
from support.oracle import (
    Answer,
    Case,
    assert_gradients_within_bound,
    assert_logps_within_bound,
    computed,
    leaves,
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
RUNS: list[Any] = [(name, torch.float32) for name in CASES]
# A case in one of the two 16-bit dtypes, each of which meets two; the others are slow.
RUNS += [
    pytest.param(name, dtype, marks=[] if number % 2 == half else pytest.mark.slow)
    for number, name in enumerate(HALVES)
    for half, dtype in enumerate((torch.bfloat16, torch.float16))
]
ALL_EXTRAS = ("entropy", "log_sum_squares", "is_top1")
# "triton_epilogue" is "triton" but for the forward of a frozen head.
WAYS = [("triton", path) for path in ("no gradient", "frozen", "trainable")] + [("triton_epilogue", "frozen")]


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


@pytest.mark.parametrize("backend,path", WAYS)
@pytest.mark.parametrize("name,dtype", RUNS)
def test_triton_agrees_with_float64(name: str, dtype: torch.dtype, backend: str, path: str) -> None:
    case = CASES[name]().to(dtype)
    exact, unfused, bound = truth(case), plain(case), case.bound()
    if path == "no gradient":
        logps = linear_logps(case.hidden, case.weight, case.labels, backend=backend, **case.head)
        assert_logps_within_bound(logps, exact.logps, bound)
        return
    ours = computed(case, trains=path == "trainable", backend=backend)
    assert_logps_within_bound(ours.logps, exact.logps, bound)
    assert_gradients_within_bound(ours, exact, unfused, case, bound)


@pytest.mark.parametrize("backend,path", WAYS)
def test_temperature_divides_after_the_softcap(backend: str, path: str) -> None:
    case = with_bias(v=70, n=5, logit_scale=1.75, softcap=4.0, temperature=0.6)
    exact, bound = truth(case), case.bound()
    if path == "no gradient":
        logps = linear_logps(case.hidden, case.weight, case.labels, backend=backend, **case.head)
        assert_logps_within_bound(logps, exact.logps, bound)
        return
    ours = computed(case, trains=path == "trainable", backend=backend)
    assert_logps_within_bound(ours.logps, exact.logps, bound)
    assert_gradients_within_bound(ours, exact, plain(case), case, bound)


@pytest.mark.parametrize("backend,path", [WAYS[0], WAYS[-1]])
@pytest.mark.parametrize("name", ["bias, scale and softcap", "confident", "rising", "a block of -inf"])
def test_extras_agree_with_float64(name: str, backend: str, path: str) -> None:
    case = CASES[name]()
    exact, bound = true_extras(case), case.bound()
    hidden, weight, bias = leaves(case, trains=path == "trainable")
    with torch.set_grad_enabled(path != "no gradient"):
        logps, extras = linear_logps(
            hidden, weight, case.labels, backend=backend, extras=ALL_EXTRAS, **{**case.head, "bias": bias}
        )
    assert_logps_within_bound(logps.detach(), truth(case).logps, bound)
    assert_extras_within_bound(*extras, exact, bound)


@pytest.mark.parametrize(
    "trains,backend",
    [
        (False, "triton"),
        (False, "triton_epilogue"),
        (True, "triton"),
        pytest.param(True, "triton_epilogue", marks=pytest.mark.slow),  # the same passes as "triton"
    ],
)
@pytest.mark.parametrize("name", ["bias, scale and softcap", "rising"])
def test_lora_is_a_head_on_more_features(name: str, trains: bool, backend: str) -> None:
    case = CASES[name]()
    parts = [t[:, part] for t in (case.hidden, case.weight) for part in (slice(-2), slice(-2, None))]
    hidden, lora_hidden, weight, lora_weight = (t.detach().clone().requires_grad_() for t in parts)
    weight.requires_grad_(trains)
    logps = linear_logps(hidden, weight, case.labels, lora=(lora_hidden, lora_weight), backend=backend, **case.head)
    logps.backward(case.upstream)
    # The feature that tells how each row is made up may be LoRA's: gradients are compared where they are side by side.
    ours = Answer(logps=logps.detach(), d_hidden=torch.cat([hidden.grad, lora_hidden.grad], 1))
    if trains:
        ours = replace(ours, d_weight=torch.cat([weight.grad, lora_weight.grad], 1))
    exact, unfused, bound = truth(case), plain(case), case.bound()
    assert_logps_within_bound(ours.logps, exact.logps, bound)
    assert_gradients_within_bound(ours, exact, unfused, case, bound)
    if not trains:
        torch.testing.assert_close(lora_weight.grad.double(), exact.d_weight[:, -2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend,path", WAYS)
def test_the_same_call_gives_the_same_bits_every_time(backend: str, path: str) -> None:
    case = with_bias(n=18, v=70)
    with torch.set_grad_enabled(path != "no gradient"):
        first, again = (repeatable(case, path, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def repeatable(case: Case, path: str, backend: str) -> list[torch.Tensor]:
    """Log-probs and every gradient."""
    hidden, weight, bias = leaves(case, trains=path == "trainable")
    logps = linear_logps(hidden, weight, case.labels, backend=backend, **{**case.head, "bias": bias})
    if path != "no gradient":
        logps.backward(case.upstream)
    return [logps.detach(), *(t.grad for t in (hidden, weight, bias) if t is not None and t.grad is not None)]


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
