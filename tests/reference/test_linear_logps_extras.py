"""Are the extras of `linear_logps` (entropy, log sum p**2, is-top-1) right, and free where they are not asked for?

The truth and the bounds: `tests/support/extras_truth.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_engine.ops import TokenExtras, linear_logps, plan, tiled
from support.call_cost import PeakBytes, Products, call_opened
from support.extras_truth import TrueExtras, assert_extras_within_bound, true_extras
from support.head_distributions import DISTRIBUTIONS, gap, minus_infinity, normal, randn, rising, with_bias
from support.oracle import Case, assert_logps_within_bound, leaves, truth

ALL = ("entropy", "log_sum_squares", "is_top1")
PATHS = ["no gradient", "frozen", "trainable"]
NAMES = [name for name in DISTRIBUTIONS if not name.startswith(("vocabulary of 65537", "vocabulary of 256001"))]


def with_extras(case: Case, *, path: str = "no gradient", backend: str = "tiled", **changed: Any) -> tuple[Tensor, Any]:
    hidden, weight, bias = leaves(case, trains=path == "trainable")
    options = {**case.head, "bias": bias, "extras": ALL, **changed}
    with torch.set_grad_enabled(path != "no gradient"):
        return linear_logps(hidden, weight, case.labels, backend=backend, **options)


@functools.cache
def solved(name: str, dtype: torch.dtype) -> tuple[Case, TrueExtras, Tensor]:
    case = DISTRIBUTIONS[name]().to(dtype)
    return case, true_extras(case), case.bound()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_extras_agree_with_float64(name: str) -> None:
    case, exact, bound = solved(name, torch.float32)
    logps, extras = with_extras(case)
    assert extras.is_top1.dtype == torch.bool and extras.entropy.dtype == torch.float32
    assert_logps_within_bound(logps, truth(case).logps, bound)
    assert_extras_within_bound(*extras, exact, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["randn", "bias, scale and softcap", "confident", "rising", "a block of -inf"])
def test_extras_in_half_precision_agree_with_float64(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and plan.cpu_multiplies_bfloat16():
        pytest.skip("this CPU's bfloat16 GEMM rounds logits")
    case, exact, bound = solved(name, dtype)
    assert_extras_within_bound(*with_extras(case)[1], exact, bound)


@pytest.mark.parametrize("name", NAMES)
def test_extras_over_many_tiles_agree_with_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was summed over earlier tiles is made relative to the new constant whenever it moves."""
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 96)
    case, exact, bound = solved(name, torch.float32)
    assert_extras_within_bound(*with_extras(case)[1], exact, bound)


@pytest.mark.parametrize("path", ["frozen", "trainable"])
@pytest.mark.parametrize("name", ["randn", "bias, scale and softcap", "rising", "a block of -inf", "one-hot"])
def test_extras_are_the_same_whatever_takes_a_gradient(name: str, path: str) -> None:
    case, _, _ = solved(name, torch.float32)
    logps, extras = with_extras(case, path=path)
    want_logps, want = with_extras(case)
    assert torch.equal(logps, want_logps)
    assert all(torch.equal(given, expected) for given, expected in zip(extras, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_gives_the_same_extras(name: str) -> None:
    """It takes log_softmax as it is: a row that is sure of a word loses digits, and is right to a rounding of 1."""
    case, exact, bound = solved(name, torch.float32)
    _, (entropy, log_sum_squares, is_top1) = with_extras(case, backend="reference")
    assert bool(((entropy - exact.entropy).abs() <= 2 * bound * (1 + exact.entropy)).all())
    assert bool(((log_sum_squares - exact.log_sum_squares).abs() <= 4 * bound).all())
    clear = exact.ahead.abs() > 2 * bound
    assert torch.equal(is_top1[clear], exact.is_top1[clear])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_float64_stays_float64(backend: str) -> None:
    case = with_bias(logit_scale=1.75, softcap=4.0).to(torch.float64)
    exact, (_, extras) = true_extras(case), with_extras(case, backend=backend)
    torch.testing.assert_close(extras.entropy, exact.entropy, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(extras.log_sum_squares, exact.log_sum_squares, rtol=1e-11, atol=1e-12)
    assert torch.equal(extras.is_top1, exact.is_top1)


@pytest.mark.parametrize("low,high", [(8.0, 20.0), (30.0, 36.0)])
def test_a_row_that_is_sure_of_its_label_keeps_its_own_digits(low: float, high: float) -> None:
    """Near 0 a rounding of 1 would be a hundred thousand times as much as there is."""
    case = gap(low, high)
    exact, (_, extras) = true_extras(case), with_extras(case)
    assert bool(exact.sure.all()) and exact.entropy.max() < (0.6 if low < 30 else 1e-9)
    for given, want in ((extras.entropy, exact.entropy), (extras.log_sum_squares, exact.log_sum_squares)):
        assert bool(((given.double() - want).abs() / want.abs()).max() < 1e-4)


@pytest.mark.parametrize("step", [-1.0, 1.0])
@pytest.mark.parametrize("ahead", [18.0, 19.5, 20.5, 22.0, 45.0, 59.0, 61.0, 88.0, 200.0])
def test_a_word_far_ahead_of_the_label_overflows_no_square(ahead: float, step: float) -> None:
    """The constant stays with the label up to a margin, beyond which a square of an exponential would be too large."""
    case = randn(n=16, d=3, v=300)
    hidden = torch.cat([case.hidden, torch.ones(16, 1)], 1)
    weight = torch.cat([case.weight * 0.1, torch.zeros(300, 1)], 1)
    weight[100:140, 3] = torch.linspace(ahead, ahead + 39 * step * 0.05, 40)
    case = replace(case, hidden=hidden, weight=weight, labels=case.labels % 90)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.TILE_COLUMNS, "cpu", 32)
        logps, extras = with_extras(case)
    bound = case.bound()
    assert_logps_within_bound(logps, truth(case).logps, bound)
    assert_extras_within_bound(*extras, true_extras(case), bound)


def test_words_that_cannot_be_add_nothing() -> None:
    case = minus_infinity(n=20, v=200, masked=slice(40, 140))
    left = torch.cat([torch.arange(40), torch.arange(140, 200)])
    labels = torch.where(case.labels >= 140, case.labels - 100, case.labels)
    without = replace(case, weight=case.weight[left], bias=case.bias[left], labels=labels)
    for ours, want in zip(with_extras(case)[1], with_extras(without)[1], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)


def test_a_label_that_cannot_be_is_not_top_and_leaves_the_rest_finite() -> None:
    case = with_bias(v=40)
    case.bias[case.labels[0]] = float("-inf")
    hit = case.labels == case.labels[0]
    logps, extras = with_extras(case)
    assert bool((logps[hit] == float("-inf")).all()) and not bool(extras.is_top1[hit].any())
    assert_extras_within_bound(*extras, true_extras(case), case.bound())


def test_a_label_that_is_all_there_is_has_no_entropy() -> None:
    case = with_bias(n=10, v=40)
    case.labels.fill_(7)
    case.bias[torch.arange(40) != 7] = float("-inf")
    logps, extras = with_extras(case)
    assert torch.equal(logps, torch.zeros(10)) and torch.equal(extras.entropy, torch.zeros(10))
    assert torch.equal(extras.log_sum_squares, torch.zeros(10)) and bool(extras.is_top1.all())


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_tie_for_the_largest_logit_counts_as_top(backend: str) -> None:
    case = replace(randn(n=24, v=64), weight=torch.ones(64, 24))
    _, extras = with_extras(case, backend=backend)
    assert bool(extras.is_top1.all())
    torch.testing.assert_close(extras.entropy, torch.full((24,), 64.0).log())
    torch.testing.assert_close(extras.log_sum_squares, -torch.full((24,), 64.0).log())


@pytest.mark.parametrize("margin", [1e-2, 1e-3])
def test_top_is_told_by_the_smallest_lead_that_the_inputs_hold(margin: float) -> None:
    """The label's own logit is taken from the same product as the others', so that rounding does not turn a lead."""
    v = 500
    labels = torch.arange(0, v, 5)
    hidden = torch.eye(100)
    weight = torch.zeros(v, 100)
    weight[labels] = torch.eye(100) * 3.0
    weight[(labels + 1) % v] = (
        torch.eye(100) * torch.where(torch.arange(100) % 2 == 0, 3.0 + margin, 3.0 - margin)[:, None]
    )
    _, extras = linear_logps(hidden, weight, labels, backend="tiled", extras=("is_top1",))
    assert torch.equal(extras.is_top1, torch.arange(100) % 2 == 1)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("path", PATHS)
def test_ignored_rows_are_zero_and_false_even_if_they_hold_nan(path: str, backend: str) -> None:
    case = replace(randn(n=30, v=64), weight=torch.ones(64, 24))  # every label is on top
    ignored = torch.arange(30) % 3 == 1
    dirty = replace(
        case,
        labels=case.labels.masked_fill(ignored, -100),
        hidden=case.hidden.masked_fill(ignored[:, None], float("nan")),
    )
    _, extras = with_extras(dirty, path=path, backend=backend)
    _, alone = with_extras(case.rows(~ignored), path=path, backend=backend)
    for ours, want in zip(extras, alone, strict=True):
        assert bool((ours[ignored] == 0).all()) and torch.equal(ours[~ignored], want)
    assert bool(extras.is_top1[~ignored].all())


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_score_gives_zeros(rows: int, backend: str) -> None:
    hidden, weight = torch.full((rows, 5), float("nan")), normal(7, 5, seed=1)
    _, extras = linear_logps(hidden, weight, torch.full((rows,), -100), backend=backend, extras=ALL)
    assert torch.equal(extras.entropy, torch.zeros(rows)) and torch.equal(extras.log_sum_squares, torch.zeros(rows))
    assert torch.equal(extras.is_top1, torch.zeros(rows, dtype=torch.bool))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("asked", [("entropy",), ("is_top1",), ["log_sum_squares", "entropy"], ("is_top1", "entropy")])
def test_only_what_was_asked_for_is_given(asked: tuple[str, ...], backend: str) -> None:
    case = randn()
    everything = with_extras(case, backend=backend)[1]
    logps, extras = with_extras(case, backend=backend, extras=asked)
    assert isinstance(extras, TokenExtras) and isinstance(logps, Tensor)
    for name in ALL:
        given = getattr(extras, name)
        assert (given is not None) == (name in asked)
        assert given is None or torch.equal(given, getattr(everything, name))


def test_extras_have_the_shape_of_the_labels() -> None:
    case = randn(n=12)
    flat = with_extras(case)[1]
    logps, extras = linear_logps(
        case.hidden.view(3, 4, -1), case.weight, case.labels.view(3, 4), backend="tiled", extras=ALL
    )
    assert logps.shape == (3, 4)
    assert all(torch.equal(given, want.view(3, 4)) for given, want in zip(extras, flat, strict=True))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("path", ["frozen", "trainable"])
def test_extras_take_no_gradient_and_leave_those_of_the_log_probs_alone(path: str, backend: str) -> None:
    case = with_bias(logit_scale=0.5, softcap=3.0)

    def gradients(extras: tuple[str, ...]) -> list[Tensor]:
        hidden, weight, bias = leaves(case, trains=path == "trainable")
        options = {**case.head, "bias": bias}
        given = linear_logps(hidden, weight, case.labels, backend=backend, extras=extras, **options)
        logps, told = given if extras else (given, None)
        assert logps.requires_grad
        assert told is None or not any(t.requires_grad for t in told)
        logps.backward(case.upstream)
        return [t.grad for t in (hidden, weight, bias) if t.grad is not None]

    with_them, without = gradients(ALL), gradients(())
    assert len(with_them) == len(without) == (1 if path == "frozen" else 3)
    assert all(torch.equal(a, b) for a, b in zip(with_them, without, strict=True))


@pytest.mark.parametrize("extra", [{"softcap": 3.0, "temperature": 0.5}, {"logit_scale": -2.0, "temperature": 3.0}])
def test_extras_are_those_of_the_distribution_at_its_temperature(extra: dict[str, float]) -> None:
    case = with_bias(**extra)
    exact = true_extras(case)
    assert (exact.entropy - true_extras(replace(case, temperature=1.0)).entropy).abs().min() > 1e-3
    assert_extras_within_bound(*with_extras(case)[1], exact, case.bound())


@pytest.mark.parametrize("path", PATHS)
def test_extras_know_lora(path: str) -> None:
    case = with_bias(softcap=5.0)
    hidden, lora_hidden = case.hidden[:, :-3], case.hidden[:, -3:]
    weight, lora_weight = case.weight[:, :-3], case.weight[:, -3:]
    part = replace(case, hidden=hidden, weight=weight)
    _, extras = with_extras(part, path=path, lora=(lora_hidden, lora_weight))
    assert_extras_within_bound(*extras, true_extras(case), case.bound())


def test_extras_are_the_same_under_autocast_as_on_rounded_inputs() -> None:
    case = with_bias()
    with torch.autocast("cpu", torch.bfloat16):
        _, extras = with_extras(case)
    rounded = with_extras(case.to(torch.bfloat16))[1]
    assert all(torch.equal(given, want) for given, want in zip(extras, rounded, strict=True))


@pytest.mark.parametrize("name", ["randn", "rising", "logp below -130"])
def test_log_probs_beside_extras_stay_within_the_bound(name: str) -> None:
    """The constant moves sooner then, so last bits may differ from a call without, and nothing else."""
    case, _, bound = solved(name, torch.float32)
    assert_logps_within_bound(with_extras(case)[0], truth(case).logps, bound)
    near = case.rows(truth(case).logps > -18)
    assert torch.equal(with_extras(near)[0], linear_logps(near.hidden, near.weight, near.labels, backend="tiled"))


class Operations(TorchDispatchMode):
    """Names of all operations within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return call_opened(self, func, args, kwargs or {})


@pytest.mark.parametrize("path", PATHS)
def test_extras_cost_nothing_where_they_are_not_asked_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile by tile: exactly the operations of a forward that has never heard of them."""
    case = with_bias(n=33, v=9000)
    monkeypatch.setattr(tiled, "new_moments", None)  # calling it would be an error
    monkeypatch.setattr(tiled, "extras_from_moments", None)
    with Operations() as without:
        with_extras(case, path=path, extras=())
    monkeypatch.undo()
    with Operations() as asked:
        with_extras(case, path=path)
    slabs = -(-9000 // plan.TILE_COLUMNS["cpu"])
    assert without.names.count("exp_") == without.names.count("amax") == slabs
    assert len(without.names) < len(asked.names)


@pytest.mark.parametrize("path,gemms", [("no gradient", 1), ("frozen", 2), ("trainable", 1)])
def test_extras_multiply_nothing_more_and_hold_a_tile_more(path: str, gemms: int) -> None:
    n, d, v = 1024, 16, 9000
    case = Case(
        hidden=normal(n, d, seed=1), weight=normal(v, d, seed=2), labels=torch.arange(n), upstream=torch.ones(n)
    )
    with Products() as seen:
        with_extras(case, path=path)
    assert gemms <= seen.flops / (2 * n * d * v) < gemms + 0.01
    tile = 512 * 4096 * 4
    with PeakBytes() as held:
        with_extras(case, path=path)
    assert held.peak < 3.3 * tile


def test_rows_in_any_order_or_batch_have_the_same_extras() -> None:
    case = rising(n=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:23]
    for whole, part in zip(with_extras(case)[1], with_extras(case.rows(order))[1], strict=True):
        assert torch.equal(whole[order], part)
