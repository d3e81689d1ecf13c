"""Is `linear_logps` right, in value and in every gradient, on the inputs that break such operators?

The truth, the bounds and what they mean: `tests/support/oracle.py`. The inputs: `tests/support/head_distributions.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from dpo_engine.ops import linear_logps, plan
from support.head_distributions import DISTRIBUTIONS, gap, randn, with_bias
from support.oracle import (
    Answer,
    Case,
    assert_gradients_within_bound,
    assert_logps_within_bound,
    computed,
    plain,
    truth,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("tiled", "reference")
LARGE = ("vocabulary of 65537", "vocabulary of 256001", "two row tiles, labels at tile edges")


@functools.cache
def solved(name: str, dtype: str) -> tuple[Case, Answer, Answer, torch.Tensor]:
    """`(case, truth, plain torch, b)` of a distribution; kept, since several tests share it."""
    case = DISTRIBUTIONS[name]().to(DTYPES[dtype])
    return case, truth(case), plain(case), case.bound()


def may_round_logits(case: Case) -> bool:
    """Whether the GEMM of the tiled path can only return bfloat16, here and for this dtype."""
    return case.hidden.dtype == torch.bfloat16 and plan.cpu_multiplies_bfloat16()


def assert_right(ours: Answer, case: Case, exact: Answer, unfused: Answer, bound: torch.Tensor) -> None:
    assert_logps_within_bound(ours.logps, exact.logps, bound, unfused.logps if may_round_logits(case) else None)
    assert_gradients_within_bound(ours, exact, unfused, case, bound)
    assert ours.d_hidden is not None
    assert bool((ours.d_hidden[case.upstream == 0] == 0).all()), "a row without upstream gradient got one"


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tiled_agrees_with_float64(name: str, dtype: str, trains: bool) -> None:
    case, *solution = solved(name, dtype)
    ours = computed(case, trains=trains)
    assert (ours.d_weight is not None) == trains
    assert_right(ours, case, *solution)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tiled_agrees_with_float64_where_nothing_takes_a_gradient(name: str, dtype: str) -> None:
    case, exact, unfused, bound = solved(name, dtype)
    ours = linear_logps(case.hidden, case.weight, case.labels, backend="tiled", **case.head)
    assert_logps_within_bound(ours, exact.logps, bound, unfused.logps if may_round_logits(case) else None)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name not in LARGE])
def test_many_small_tiles_agree_with_float64(name: str, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 96)
    case, *solution = solved(name, "float32")
    assert_right(computed(case, trains=trains), case, *solution)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    "name", ["randn", "one row of two words", "softcap", "bias, scale and softcap", "confident", "logp below -130"]
)
def test_bfloat16_products_cost_no_more_than_plain_torchs_error(
    name: str, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch for a CPU with bfloat16 instructions, on any CPU: only a logit may lose digits, by rounding once."""
    monkeypatch.setattr(plan, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 64)
    case, *solution = solved(name, "bfloat16")
    assert may_round_logits(case)
    assert_right(computed(case, trains=trains), case, *solution)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_definition_is_what_plain_torch_computes(name: str, dtype: str) -> None:
    case, exact, unfused, bound = solved(name, dtype)
    ours = computed(case, trains=True, backend="reference")
    assert_logps_within_bound(ours.logps, exact.logps, bound, None if dtype == "float32" else unfused.logps)
    assert_gradients_within_bound(ours, exact, unfused, case, bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["randn", "bias, scale and softcap", "confident", "rising", "a block of -inf"])
def test_float64_stays_float64(name: str, backend: str) -> None:
    case = DISTRIBUTIONS[name]().to(torch.float64)
    exact = truth(case)
    for trains in (False, True):
        ours = computed(case, trains=trains, backend=backend)
        assert ours.logps.dtype == torch.float64
        for field in ("logps", "d_hidden", "d_weight", "d_bias"):
            if getattr(ours, field) is not None:
                torch.testing.assert_close(getattr(ours, field), getattr(exact, field), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("head", [{}, {"logit_scale": -0.5}, {"softcap": 2.0}, {"logit_scale": 1.5, "softcap": 3.0}])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_those_of_finite_differences(
    head: dict[str, float], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 8)
    case = (with_bias if biased else randn)(n=17, d=2, v=11, **head).to(torch.float64)

    def trainable(hidden: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        options = {**case.head, "bias": bias[0] if bias else None}
        return linear_logps(hidden, weight, case.labels, backend="tiled", **options)

    def frozen(hidden: torch.Tensor) -> torch.Tensor:
        return linear_logps(hidden, case.weight, case.labels, backend="tiled", **case.head)

    inputs = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None]
    assert torch.autograd.gradcheck(trainable, inputs)
    assert torch.autograd.gradcheck(frozen, inputs[:1])


@pytest.mark.parametrize("low,high", [(2.0, 20.0), (30.0, 36.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_confident_row_is_right_to_its_own_digits(low: float, high: float, dtype: str) -> None:
    """`b_i` bounds the error of a logit. A log-prob of -1e-12 moves by b_i *times itself* then, and so does its
    gradient: softmax minus one would be off by 1e-7, a hundred thousand times as much as there is.
    """
    case = gap(low, high, v=60).to(DTYPES[dtype])
    if may_round_logits(case):
        pytest.skip("this CPU's bfloat16 GEMM rounds logits")
    exact, bound = truth(case), case.bound()
    assert -exact.logps.max() < 1e-6
    ours = computed(replace(case, upstream=torch.ones_like(case.upstream)), trains=False)
    error = (ours.logps.double() - exact.logps).abs()
    assert bool((error <= 2 * bound * exact.logps.abs()).all()), (error / exact.logps.abs()).max()
    unit = truth(replace(case, upstream=torch.ones_like(case.upstream))).d_hidden
    assert ours.d_hidden is not None and unit is not None
    relative = (ours.d_hidden.double() - unit).norm(dim=1) / unit.norm(dim=1)
    smallest = {"float16": 6e-8}.get(dtype, 0.0)  # float16 has nothing below
    seen = unit.norm(dim=1) > 1e3 * smallest
    assert bool((relative <= 2 * bound + 2.0**-8)[seen].all()), relative[seen].max()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_leans_neither_way(dtype: str, trains: bool) -> None:
    """Cut off instead of rounded, every gradient would be too short: its mean signed error is its mean error then."""
    case = randn(n=512, d=32, v=1000).to(DTYPES[dtype])
    exact, ours = truth(case), computed(case, trains=trains)
    for field in ("logps", "d_hidden", "d_weight")[: 3 if trains else 2]:
        want = getattr(exact, field)
        error = (getattr(ours, field).double() - want) * want.sign()
        lean, size = error.mean().abs(), error.abs().mean()
        assert lean <= 0.25 * size, f"{field}: mean signed error {lean:.3g}, mean error {size:.3g}"


def test_a_label_that_cannot_be_has_log_prob_minus_infinity_and_a_finite_gradient() -> None:
    case = with_bias(v=40)
    assert case.bias is not None
    case.bias[case.labels[0]] = float("-inf")
    exact = truth(case)
    assert exact.logps[0] == float("-inf")
    for trains in (False, True):
        ours = computed(case, trains=trains)
        torch.testing.assert_close(ours.logps, exact.logps.float(), rtol=1e-5, atol=1e-5)
        for field in ("d_hidden", "d_weight", "d_bias"):
            if getattr(ours, field) is not None:
                torch.testing.assert_close(getattr(ours, field), getattr(exact, field).float(), rtol=1e-4, atol=1e-5)


def test_a_scored_row_that_is_not_finite_is_nan_and_alone() -> None:
    case = randn(n=20)
    case.hidden[3] = float("nan")
    logps = linear_logps(case.hidden, case.weight, case.labels, backend="tiled")
    assert logps.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_is_what_its_name_says(name: str) -> None:
    case = DISTRIBUTIONS[name]()
    logps = truth(case).logps
    zeros, values = (case.upstream == 0).sum(), case.upstream.unique().numel()
    assert values > 1 or len(logps) == 1
    assert zeros > 0 or len(logps) == 1
    claims = {
        "confident": (logps.exp() > 0.9).all(),
        "logp near -1e-12": logps.max() > -1e-12 and logps.min() < -1e-13,
        "logp below -130": logps.max() < -130,
        "all equal": logps.unique().numel() == 1,
        "duplicated rows": (truth(case).d_hidden.abs() < 1e-12).all(),
        "one-hot": ((logps > -1e-15) | (logps < -49)).all(),
        "all negative": (case.hidden @ case.weight.T).max() < -30,
        "common mode": (case.hidden @ case.weight.T).min() > 4000,
        "logits about 1e2": (case.hidden @ case.weight.T).abs().max() > 200,
        "logits about 1e4": (case.hidden @ case.weight.T).abs().max() > 2e4,
        "strided hidden, transposed weight": not case.hidden.is_contiguous() and not case.weight.is_contiguous(),
        "transposed hidden, strided weight": not case.hidden.is_contiguous() and not case.weight.is_contiguous(),
    }
    assert bool(claims.get(name, True))
