"""Is `linear_logps` right however it is called: under autocast, tied, in any shape, with rows left out?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_logps, plan
from support.head_distributions import normal, randn, with_bias
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

BF16 = torch.bfloat16


def tiled_logps(case: Case, **changed: object) -> Tensor:
    return linear_logps(case.hidden, case.weight, case.labels, **{"backend": "tiled", **case.head, **changed})


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, BF16])
def test_autocast_is_the_definition_on_rounded_inputs(
    weight_dtype: torch.dtype,
    hidden_dtype: torch.dtype,
    trains: bool,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "cpu_multiplies_bfloat16", lambda: native)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 64)
    case = with_bias(v=150, logit_scale=1.5)
    assert case.bias is not None
    given = replace(
        case,
        hidden=case.hidden.to(hidden_dtype),
        weight=case.weight.to(weight_dtype),
        bias=case.bias.to(weight_dtype),
    )
    rounded = given.to(BF16)
    hidden, weight, bias = leaves(given, trains=trains)
    with torch.autocast("cpu", BF16):
        logps = tiled_logps(replace(given, hidden=hidden, weight=weight, bias=bias))
    logps.backward(case.upstream)
    ours = Answer(
        logps=logps.detach(), d_hidden=hidden.grad, d_weight=weight.grad, d_bias=None if bias is None else bias.grad
    )
    assert logps.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == hidden_dtype
    exact, unfused, bound = truth(rounded), plain(rounded), rounded.bound()
    assert_logps_within_bound(ours.logps, exact.logps, bound, unfused.logps if native else None)
    assert_gradients_within_bound(ours, exact, unfused, rounded, bound)


def test_autocast_leaves_float64_alone() -> None:
    case = randn().to(torch.float64)
    with torch.autocast("cpu", BF16):
        assert tiled_logps(case).dtype == torch.float64


def test_a_tied_embedding_collects_both_of_its_gradients() -> None:
    """The same weight looks tokens up and scores them."""
    v, d = 60, 12
    tokens, labels = torch.arange(0, 40) % v, torch.arange(7, 47) % v
    mix, upstream = normal(d, d, seed=5, scale=d**-0.5), normal(40, seed=6)

    def embedding_gradient(dtype: torch.dtype, backend: str) -> Tensor:
        weight = normal(v, d, seed=4).to(dtype).requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight) @ mix.to(dtype))
        logps = linear_logps(hidden, weight, labels, backend=backend)
        logps.backward(upstream.to(dtype))
        assert weight.grad is not None
        return weight.grad

    exact = embedding_gradient(torch.float64, "reference")
    torch.testing.assert_close(embedding_gradient(torch.float64, "tiled"), exact, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(embedding_gradient(torch.float32, "tiled").double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_leading_dimensions_are_kept(shape: tuple[int, ...], backend: str) -> None:
    case = randn(n=12)
    count = int(torch.tensor(shape).prod())
    flat = case.rows(slice(0, count))
    hidden = flat.hidden.view(*shape, -1).clone().requires_grad_()
    logps = linear_logps(hidden, case.weight, flat.labels.view(shape), backend=backend)
    assert logps.shape == shape
    logps.backward(flat.upstream.view(shape))
    exact = truth(flat)
    torch.testing.assert_close(logps.detach().double().flatten(), exact.logps, rtol=1e-5, atol=1e-5)
    assert hidden.grad is not None and exact.d_hidden is not None
    torch.testing.assert_close(hidden.grad.double().view(count, -1), exact.d_hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype_mean_the_same(dtype: torch.dtype) -> None:
    case = randn()
    labels = case.labels.clone()
    labels[::4] = -100
    assert torch.equal(tiled_logps(replace(case, labels=labels.to(dtype))), tiled_logps(replace(case, labels=labels)))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5])
def test_ignored_rows_are_zero_even_if_they_hold_nan(ignore_index: int, trains: bool, backend: str) -> None:
    case = with_bias(v=80)
    case.labels[case.labels == ignore_index] += 1  # an id like any other, until it is the one to ignore
    ignored = torch.arange(len(case.labels)) % 3 != 1
    case.upstream.copy_(normal(len(case.labels), seed=8))
    scored = case.rows(~ignored)
    dirty = replace(
        case,
        labels=case.labels.masked_fill(ignored, ignore_index),
        hidden=case.hidden.masked_fill(ignored[:, None], float("nan")),
    )
    hidden, weight, bias = leaves(dirty, trains=trains)
    logps = linear_logps(hidden, weight, dirty.labels, bias=bias, ignore_index=ignore_index, backend=backend)
    logps.backward(dirty.upstream)
    want = computed(scored, trains=trains, backend=backend)
    assert bool((logps[ignored] == 0).all()) and torch.equal(logps[~ignored].detach(), want.logps)
    assert hidden.grad is not None and bool((hidden.grad[ignored] == 0).all())
    assert torch.equal(hidden.grad[~ignored], want.d_hidden)
    if trains:
        assert bias is not None
        assert torch.equal(weight.grad, want.d_weight) and torch.equal(bias.grad, want.d_bias)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
def test_what_comes_from_upstream_for_ignored_rows_is_not_looked_at(trains: bool, backend: str) -> None:
    """A mean over no tokens, say, gives them 0 / 0."""
    case = with_bias(v=80)
    ignored = torch.arange(len(case.labels)) % 3 == 1
    masked = replace(case, labels=case.labels.masked_fill(ignored, -100))
    want = computed(replace(masked, upstream=case.upstream.masked_fill(ignored, 0.0)), trains=trains, backend=backend)
    for poison in (float("nan"), float("inf")):
        poisoned = replace(masked, upstream=case.upstream.masked_fill(ignored, poison))
        ours = computed(poisoned, trains=trains, backend=backend)
        for field in ("d_hidden", "d_weight", "d_bias"):
            given = getattr(ours, field)
            assert given is None or torch.equal(given, getattr(want, field)), field


def test_without_an_ignore_index_every_row_counts() -> None:
    case = randn()
    assert torch.equal(tiled_logps(case, ignore_index=None), tiled_logps(case))
    with pytest.raises(ValueError, match="-100 is outside"):
        tiled_logps(replace(case, labels=case.labels - case.labels - 100), ignore_index=None)


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_score_is_zero_in_value_and_gradient(rows: int, trains: bool, backend: str) -> None:
    """N = 0, and every row ignored."""
    hidden = torch.full((rows, 5), float("nan"), requires_grad=True)
    weight = normal(7, 5, seed=1).requires_grad_(trains)
    logps = linear_logps(hidden, weight, torch.full((rows,), -100), backend=backend)
    assert torch.equal(logps, torch.zeros(rows)) and logps.requires_grad
    logps.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(rows, 5))
    assert not trains or torch.equal(weight.grad, torch.zeros(7, 5))


@pytest.mark.parametrize("wanted", ["w", "b", "hw", "hb", "wb"])
def test_each_gradient_is_the_same_whichever_others_are_asked_for(wanted: str) -> None:
    case = with_bias(logit_scale=0.5, softcap=3.0)
    everything = computed(case, trains=True)
    tensors = {"h": case.hidden, "w": case.weight, "b": case.bias}
    asked = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items() if t is not None}
    logps = tiled_logps(replace(case, hidden=asked["h"], weight=asked["w"], bias=asked["b"]))
    logps.backward(case.upstream)
    want = {"h": everything.d_hidden, "w": everything.d_weight, "b": everything.d_bias}
    for name, tensor in asked.items():
        assert (tensor.grad is not None) == (name in wanted)
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, want[name])


def test_the_frozen_and_the_trainable_path_agree() -> None:
    case = with_bias(logit_scale=0.5, softcap=3.0)
    frozen, trainable, bound = computed(case, trains=False), computed(case, trains=True), case.bound()
    assert torch.equal(frozen.logps, trainable.logps)
    assert torch.equal(frozen.logps, tiled_logps(case))
    assert_gradients_within_bound(frozen, truth(case), trainable, case, bound)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
def test_a_second_derivative_is_refused(trains: bool) -> None:
    case = randn(n=4)
    hidden, weight, _ = leaves(case, trains=trains)
    upstream = case.upstream.clone().requires_grad_()
    logps = tiled_logps(replace(case, hidden=hidden, weight=weight))
    (first,) = torch.autograd.grad(logps, hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
def test_inputs_are_left_as_they_were(trains: bool) -> None:
    case = with_bias(logit_scale=2.0, softcap=3.0)
    copies = [t.clone() for t in (case.hidden, case.weight, case.bias, case.labels, case.upstream) if t is not None]
    computed(case, trains=trains)
    kept = [t for t in (case.hidden, case.weight, case.bias, case.labels, case.upstream) if t is not None]
    assert all(torch.equal(before, after) for before, after in zip(copies, kept, strict=True))


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
def test_a_graph_that_is_kept_gives_the_same_gradient_twice(trains: bool) -> None:
    case = randn()
    hidden, weight, _ = leaves(case, trains=trains)
    logps = tiled_logps(replace(case, hidden=hidden, weight=weight))
    first, second = (torch.autograd.grad(logps, hidden, case.upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
