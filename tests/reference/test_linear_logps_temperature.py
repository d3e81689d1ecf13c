"""Does `temperature` divide the logits, after the softcap and everything else?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_logps, plan
from support.head_distributions import DISTRIBUTIONS, randn, with_bias
from support.oracle import (
    Case,
    assert_gradients_within_bound,
    assert_logps_within_bound,
    computed,
    plain,
    truth,
)

HEADS = {
    "plain": {},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": -1.75},
    "scale and softcap": {"logit_scale": 1.75, "softcap": 4.0},
}


def assert_right(case: Case, *, trains: bool, backend: str) -> None:
    ours, exact, unfused, bound = computed(case, trains=trains, backend=backend), truth(case), plain(case), case.bound()
    assert_logps_within_bound(ours.logps, exact.logps, bound)
    assert_gradients_within_bound(ours, exact, unfused, case, bound)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.6, 20.0])
@pytest.mark.parametrize("head", HEADS)
def test_temperature_agrees_with_float64(head: str, temperature: float, trains: bool, backend: str) -> None:
    case = with_bias(temperature=temperature, **HEADS[head])
    assert_right(case, trains=trains, backend=backend)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize(
    "name", ["logits about 1e2", "logits about 1e4", "softcap, saturated", "confident", "rising", "a block of -inf"]
)
def test_temperature_on_hard_logits_agrees_with_float64(name: str, temperature: float) -> None:
    case = replace(DISTRIBUTIONS[name](), temperature=temperature)
    for trains in (False, True):
        assert_right(case, trains=trains, backend="tiled")


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_it_divides_after_the_softcap(backend: str) -> None:
    """A capped logit of 2 at a temperature of 1/4 is 8: divided before the softcap, it would still be 2."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[1e4], [0.0]])
    logps = linear_logps(hidden, weight, torch.tensor([1]), softcap=2.0, temperature=0.25, backend=backend)
    torch.testing.assert_close(logps, -torch.tensor([8.0]).exp().log1p())


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_temperature_of_one_changes_no_bit(backend: str) -> None:
    case = with_bias(softcap=3.0, logit_scale=0.3)
    options = {key: value for key, value in case.head.items() if key != "temperature"}
    without = linear_logps(case.hidden, case.weight, case.labels, backend=backend, **options)
    assert torch.equal(computed(case, trains=False, backend=backend).logps, without)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_finite_differences(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 8)
    case = with_bias(n=17, d=2, v=11, temperature=0.6, **HEADS[head]).to(torch.float64)

    def logps(hidden: Tensor, weight: Tensor = case.weight, bias: Tensor | None = case.bias) -> Tensor:
        return linear_logps(hidden, weight, case.labels, backend="tiled", **{**case.head, "bias": bias})

    inputs = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None]
    assert torch.autograd.gradcheck(logps, inputs)
    assert torch.autograd.gradcheck(logps, inputs[:1])


def test_a_high_temperature_flattens_and_a_low_one_decides() -> None:
    case = randn(spread=3.0)
    flat, sharp = (truth(replace(case, temperature=t)).logps for t in (1e6, 1e-3))
    v = len(case.weight)
    hot = computed(replace(case, temperature=1e6), trains=False).logps
    assert bool((hot + torch.tensor(float(v)).log()).abs().max() < 1e-4) and bool((flat - hot).abs().max() < 1e-4)
    cold = computed(replace(case, temperature=1e-3), trains=False).logps
    torch.testing.assert_close(cold.double(), sharp, rtol=1e-4, atol=1e-3)
    top = (case.hidden @ case.weight.T).argmax(1)
    hits = computed(replace(case, labels=top, temperature=1e-3), trains=False).logps
    assert bool((hits > -1e-3).float().mean() > 0.9)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature=.*; expected a positive number"):
        linear_logps(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4]), temperature=temperature)
