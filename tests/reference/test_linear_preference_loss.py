"""Is `linear_preference_loss` the loss of the summed log-probs, in value and every gradient, by 3 GEMMs?

The truth is float64: the oracle's log-probs, summed, through the very same loss. Bounds: `tests/support/oracle.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo_engine.losses import dpo_loss
from dpo_engine.ops import linear_logps, linear_preference_loss, plan
from support.call_cost import PeakBytes, Products
from support.head_distributions import DISTRIBUTIONS, randn, with_bias
from support.oracle import Answer, Case, assert_gradients_within_bound, plain, truth

DPO = functools.partial(dpo_loss, beta=0.1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = [name for name in DISTRIBUTIONS if "vocabulary of" not in name]


def lengths_of(rows: int) -> list[int]:
    """Chosen and rejected in turn, of uneven lengths, the last pair's chosen empty where rows are few."""
    if rows < 8:
        return [rows, 0]
    a, b, c = rows // 5, rows // 7, rows // 3
    return [a, b, c, rows - a - b - c]


def hinge(chosen: Tensor, rejected: Tensor, reference_chosen: None, reference_rejected: None) -> Tensor:
    """A loss without a reference, whose slope depends on the pair."""
    assert reference_chosen is None and reference_rejected is None
    return torch.nn.functional.softplus((rejected - chosen) * 0.01)


def slopes_of(
    exact: Tensor, lengths: list[int], loss: object, references: tuple[Tensor | None, ...]
) -> tuple[float, Tensor]:
    """`(the mean loss, its derivative by each row's log-prob)` in float64, from the true log-probs."""
    sums = torch.stack([part.sum() for part in exact.split(lengths)]).requires_grad_()
    doubles = [None if r is None else r.double() for r in references]
    value = loss(sums[0::2], sums[1::2], *doubles).mean()
    (slopes,) = torch.autograd.grad(value, sums)
    return value.item(), torch.repeat_interleave(slopes, torch.tensor(lengths))


def references_near(exact: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Sums that leave the sigmoid's middle, so that no slope is lost: each a few nats from the policy's."""
    sums = torch.stack([part.sum() for part in exact.split(lengths)]).float()
    noise = torch.linspace(-9.0, 9.0, len(sums))
    return (sums + noise)[0::2], (sums - noise)[1::2]


def assert_right(case: Case, budget: int = 512 << 20, loss: object = DPO) -> None:
    exact = truth(case)
    lengths = lengths_of(case.hidden.shape[0])
    references = references_near(exact.logps, lengths) if loss is DPO else (None, None)
    value, upstream = slopes_of(exact.logps, lengths, loss, references)
    case = replace(case, upstream=upstream.float())
    exact, unfused, bound = truth(case), plain(case), case.bound()
    hidden, weight, bias = (
        None if t is None else t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)
    )
    ours = linear_preference_loss(
        hidden, weight, case.labels, lengths, loss, *references,
        tile_budget=budget, backend="tiled", **{**case.head, "bias": bias},
    )  # fmt: skip
    ours.backward()
    answer = Answer(
        logps=ours.detach(), d_hidden=hidden.grad, d_weight=weight.grad, d_bias=None if bias is None else bias.grad
    )
    # Each log-prob may be off by its bound, and moves the mean by its slope times that.
    reach = float((bound * upstream.abs()).sum()) * 2 + 1e-5
    if plan.cpu_multiplies_bfloat16() and case.hidden.dtype == torch.bfloat16:
        reach += float((unfused.logps.double() - exact.logps).abs().max() * upstream.abs().sum())
    assert abs(ours.item() - value) <= reach
    assert_gradients_within_bound(answer, exact, unfused, case, _slack(bound, upstream, lengths))


def _slack(bound: Tensor, upstream: Tensor, lengths: list[int]) -> Tensor:
    """The slope itself is a function of sums that are off by their rows' bounds: at most beta/4 of it for DPO."""
    per_completion = torch.stack([part.sum() for part in bound.split(lengths)])
    return bound + 0.1 * torch.repeat_interleave(per_completion, torch.tensor(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_value_and_gradients_are_those_of_the_summed_log_probs(name: str, dtype: str) -> None:
    assert_right(DISTRIBUTIONS[name]().to(DTYPES[dtype]))


@pytest.mark.parametrize("name", ["randn", "bias, scale and softcap", "rising", "a block of -inf", "confident"])
def test_several_groups_and_many_tiles_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 96)
    case = DISTRIBUTIONS[name]()
    rows = max(sum(lengths_of(case.hidden.shape[0])[i : i + 2]) for i in (0, 2))
    one_pair = (rows + 15) // 16 * 16 * case.weight.shape[0] * 4
    assert_right(case, budget=one_pair)
    assert_right(case.to(torch.bfloat16), budget=one_pair)


@pytest.mark.parametrize("budget", [512 << 20, 0], ids=["3 GEMMs", "4 GEMMs"])
def test_a_loss_without_a_reference_is_served_too(budget: int) -> None:
    assert_right(with_bias(logit_scale=0.7, softcap=8.0), budget=budget, loss=hinge)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_divides_after_the_softcap(temperature: float) -> None:
    case = randn(n=24, softcap=4.0)
    lengths, weight = [5, 7, 4, 8], case.weight.clone().requires_grad_()
    ours = linear_preference_loss(
        case.hidden, weight, case.labels, lengths, hinge, softcap=4.0, temperature=temperature, backend="tiled"
    )
    x = torch.nn.functional.linear(case.hidden.double(), case.weight.double())
    logps = (4.0 * torch.tanh(x / 4.0) / temperature).log_softmax(-1).gather(1, case.labels[:, None]).squeeze(1)
    want, _ = slopes_of(logps, lengths, hinge, (None, None))
    assert abs(ours.item() - want) < 1e-5


def products(budget: int, *, frozen: bool = False, trains: bool = True) -> float:
    """GEMMs of one call and its backward, in units of 2·N·V·D."""
    case = randn(n=64, d=16, v=2000)
    hidden = case.hidden.clone().requires_grad_(trains)
    weight = case.weight.clone().requires_grad_(trains and not frozen)
    with Products() as seen:
        loss = linear_preference_loss(hidden, weight, case.labels, [16] * 4, hinge, tile_budget=budget, backend="tiled")
        if trains:
            loss.backward()
    return seen.flops / (2 * 64 * 16 * 2000)


def test_three_gemms_where_a_pair_fits_the_budget_else_four() -> None:
    one_pair = 32 * 2000 * 4
    assert 3 <= products(one_pair * 2) < 3.01
    assert 3 <= products(one_pair) < 3.01
    assert 4 <= products(one_pair - 1) < 4.01


def test_two_gemms_for_a_frozen_head_and_one_without_gradients() -> None:
    assert 2 <= products(512 << 20, frozen=True) < 2.01
    assert 1 <= products(512 << 20, trains=False) < 1.01


def test_the_kept_tiles_stay_within_the_budget() -> None:
    case = randn(n=256, d=8, v=8192)
    budget = 64 * 8192 * 4
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with PeakBytes() as seen:
        linear_preference_loss(
            hidden, weight, case.labels, [32] * 8, hinge, tile_budget=budget, backend="tiled"
        ).backward()
    results = 4 * (256 + 8192) * 8 * 2
    assert budget < seen.peak < budget + results + (1 << 20)


def test_the_sums_are_those_of_linear_logps() -> None:
    case = randn(n=30)
    lengths = [4, 9, 11, 6]
    weight = case.weight.clone().requires_grad_()
    _, sums = linear_preference_loss(case.hidden, weight, case.labels, lengths, hinge, with_logps=True, backend="tiled")
    logps = linear_logps(case.hidden, case.weight, case.labels, backend="tiled")
    torch.testing.assert_close(sums, torch.stack([part.sum() for part in logps.split(lengths)]))
    assert not sums.requires_grad


def test_upstream_scales_the_gradient_and_a_second_backward_is_refused() -> None:
    case = randn(n=20)

    def gradient(factor: float) -> tuple[Tensor, Tensor]:
        weight = case.weight.clone().requires_grad_()
        loss = linear_preference_loss(case.hidden, weight, case.labels, [10, 10], hinge, backend="tiled")
        (loss * factor).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="backward was called a second time"):
            loss.backward()
        return weight.grad

    torch.testing.assert_close(gradient(-2.5), gradient(1.0) * -2.5)


def test_autocast_rounds_as_linear_logps_does() -> None:
    case = randn(n=20)
    weight = case.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_preference_loss(case.hidden, weight, case.labels, [10, 10], hinge, backend="tiled")
        logps = linear_logps(case.hidden, case.weight, case.labels, backend="tiled")
    want = hinge(logps[:10].sum()[None], logps[10:].sum()[None], None, None).mean()
    torch.testing.assert_close(loss.detach(), want)
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_the_same_inputs_give_the_same_bits() -> None:
    case = randn(n=64, v=5000)
    runs = []
    for _ in range(3):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        loss = linear_preference_loss(hidden, weight, case.labels, [20, 12, 16, 16], hinge, backend="tiled")
        loss.backward()
        runs.append((loss.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    "lengths,references,loss,message",
    [
        ([10, 9], (None, None), hinge, r"2 lengths that sum to 19; expected \(N, D\) and two lengths a pair"),
        ([10, 5, 5], (None, None), hinge, "3 lengths that sum to 20"),
        ([30, -10], (None, None), hinge, "2 lengths that sum to 20"),
        (
            [10, 10],
            (torch.zeros(2), torch.zeros(2)),
            DPO,
            r"reference_chosen_logps is \(2,\); expected a sum a pair, \(1,\)",
        ),
        ([10, 10], (torch.zeros(1), None), DPO, "one of the two reference log-probs is missing"),
        (
            [10, 10],
            (None, None),
            lambda c, r, rc, rr: (c - r).mean(),
            r"loss gave \(\); expected one number a pair, \(1,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(lengths: list[int], references: tuple, loss: object, message: str) -> None:
    case = randn(n=20)
    weight = case.weight.clone().requires_grad_()
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(case.hidden, weight, case.labels, lengths, loss, *references, backend="tiled")
