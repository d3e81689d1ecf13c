"""Is every loss its paper's formula, in value and gradient, on inputs easy and hard?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_engine.losses import LOSSES, PairStats, bco_loss, dpo_loss, kto_baseline
from dpo_engine.losses.pairwise import f_slope
from support.loss_formulas import CASES, FORMULAS, case_id, cast, leaves, pairs, stats_of, value_and_gradients

LAST_BITS = 16  # how many units in the last place of the inputs a float32 result may be off by


def loss_of(name: str, settings: dict[str, Any]) -> Callable[[Any], Tensor]:
    """The engine's, told some parameters and left the others."""
    return lambda stats: LOSSES[name](stats, SimpleNamespace(**settings))


def formula_of(name: str, settings: dict[str, Any]) -> Callable[[Any], Tensor]:
    return lambda stats: FORMULAS[name](stats, **settings)


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_loss_and_its_gradients_are_the_formulas_in_float64(case: tuple[str, dict[str, Any]], hard: bool) -> None:
    for seed in range(3):
        stats = stats_of(case[0], hard=hard, seed=seed)
        found, gradients = value_and_gradients(loss_of(*case), stats)
        expected, slopes = value_and_gradients(formula_of(*case), stats)
        assert found.dtype == torch.float64 and found.shape == (len(stats),)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for name, slope in slopes.items():
            torch.testing.assert_close(gradients[name], slope, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_loss_in_float32_is_off_by_its_inputs_last_bits(case: tuple[str, dict[str, Any]]) -> None:
    stats = cast(stats_of(case[0], hard=True), torch.float32)
    found, gradients = value_and_gradients(loss_of(*case), stats)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    wide = cast(stats, torch.float64)
    expected, slopes = value_and_gradients(formula_of(*case), wide)
    inputs = [getattr(wide, name) for name in wide.__dataclass_fields__ if "logps" in name or "kl" in name]
    largest = max(value.abs().max() for value in inputs if value is not None)
    steepest = max(slope.abs().max() for slope in slopes.values())
    if case[0] == "f_dpo":  # slopes change by orders of magnitude from pair to pair
        allowed = LAST_BITS * 2.0**-24 * largest * (1 + expected.abs())
    else:
        allowed = LAST_BITS * 2.0**-24 * (expected.abs() + 4 * steepest * largest)
    assert ((found.double() - expected).abs() <= allowed + 1e-6).all()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_finite_differences_are_the_gradients(case: tuple[str, dict[str, Any]]) -> None:
    name, settings = case
    stats = stats_of(name, hard=False, count=8)
    if name == "bco":  # its own mean is a constant to the gradient, and not to a difference
        stats = replace(stats, baseline=torch.tensor(0.03, dtype=torch.float64))
    _, gradients = value_and_gradients(loss_of(name, settings), stats)
    step = 1e-4
    for field, gradient in gradients.items():
        if (name, field) == ("tdpo", "chosen_kl"):  # the paper stops this one
            assert not gradient.any()
            continue
        value = getattr(stats, field)
        for place in range(len(value)):
            moved = []
            for sign in (1, -1):
                changed = value.clone()
                changed[place] += sign * step
                moved.append(loss_of(name, settings)(replace(stats, **{field: changed})).sum().item())
            difference = (moved[0] - moved[1]) / (2 * step)
            assert difference == pytest.approx(gradient[place].item(), rel=1e-7, abs=1e-7), (field, place)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradcheck_holds_of_every_field_that_a_loss_reads(case: tuple[str, dict[str, Any]]) -> None:
    name, settings = case
    stats = stats_of(name, hard=False, count=6)
    if name == "bco":
        stats = replace(stats, baseline=torch.tensor(0.03, dtype=torch.float64))
    _, by_name = leaves(stats)
    by_name.pop("chosen_kl", None)  # stopped, as the paper has it

    def loss(*values: Tensor) -> Tensor:
        return loss_of(name, settings)(replace(stats, **dict(zip(by_name, values, strict=True))))

    assert torch.autograd.gradcheck(loss, tuple(by_name.values()), eps=1e-5, atol=1e-6)


READS = {
    **{name: {"chosen_logps", "rejected_logps"} for name in FORMULAS},
    "sft": {"chosen_logps"},
    "ld_dpo": {"chosen_logps", "rejected_logps", "chosen_public_logps", "rejected_public_logps"},
    "tdpo": {"chosen_logps", "rejected_logps", "rejected_kl"},
    "kto": {"logps"},
    "plackett_luce": {"logps"},
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_gradient_comes_to_the_fields_of_the_formula_and_to_no_other(name: str) -> None:
    stats = stats_of(name, hard=False)
    _, gradients = value_and_gradients(loss_of(name, {}), stats)
    assert {field for field, gradient in gradients.items() if gradient.any()} == READS[name]
    # Neither a confidence nor a baseline nor the reference is learnt through.
    fixed = {
        field: getattr(stats, field).clone().requires_grad_()
        for field in ("chosen_confidence", "rejected_confidence")
        if hasattr(stats, field)
    }
    loss_of(name, {})(replace(leaves(stats)[0], **fixed)).sum().backward()
    assert all(value.grad is None for value in fixed.values())


@pytest.mark.parametrize("name", sorted(name for name, method in LOSSES.items() if method.needs_reference))
def test_a_loss_that_compares_with_a_reference_refuses_to_go_without(name: str) -> None:
    stats = stats_of(name, hard=False)
    missing = [field for field in stats.__dataclass_fields__ if field.startswith("reference_")]
    with pytest.raises(ValueError, match=r"Stats came without reference_\w*logps.*, which the loss reads"):
        LOSSES[name](replace(stats, **dict.fromkeys(missing)), None)


@pytest.mark.parametrize("name", sorted(name for name, method in LOSSES.items() if not method.needs_reference))
def test_a_loss_without_a_reference_reads_none(name: str) -> None:
    stats = stats_of(name, hard=False)
    without = replace(stats, reference_chosen_logps=None, reference_rejected_logps=None)
    assert torch.equal(LOSSES[name](without, None), LOSSES[name](stats, None))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("wpo", "rejected_confidence"),
        ("tdpo", "chosen_kl"),
        ("ld_dpo", "reference_rejected_public_logps"),
        ("kto", "baseline"),
    ],
)
def test_a_loss_says_which_other_statistic_it_lacks(name: str, field: str) -> None:
    stats = replace(stats_of(name, hard=False), **{field: None})
    with pytest.raises(ValueError, match=f"came without {field}, which the loss reads"):
        LOSSES[name](stats, None)


def test_bco_compares_with_the_mean_reward_of_its_pairs_unless_a_baseline_is_given() -> None:
    stats = pairs(hard=False)
    four = stats.chosen_logps, stats.rejected_logps, stats.reference_chosen_logps, stats.reference_rejected_logps
    rewards = [0.2 * (four[side] - four[side + 2]) for side in (0, 1)]  # type: ignore[operator]
    config = SimpleNamespace(beta=0.2)
    torch.testing.assert_close(LOSSES["bco"](stats, config), bco_loss(*four, 0.2, torch.cat(rewards).mean()))  # type: ignore[arg-type]
    given = replace(stats, baseline=torch.tensor(1.5, dtype=torch.float64))
    torch.testing.assert_close(LOSSES["bco"](given, config), bco_loss(*four, 0.2, 1.5))  # type: ignore[arg-type]
    method = LOSSES["bco"]
    assert method.baseline is not None
    torch.testing.assert_close(method.baseline(leaves(stats)[0], {"beta": 0.2}), sum(rewards) / 2)
    assert not method.baseline(leaves(stats)[0], {"beta": 0.2}).requires_grad


def test_ktos_baseline_is_clamped_after_it_is_averaged_and_has_no_gradient() -> None:
    ratios = torch.tensor([-2.0, 5.0], requires_grad=True)
    assert kto_baseline(ratios.mean()).item() == 1.5  # of clamped ones it would be 2.5
    assert kto_baseline(ratios[0]).item() == 0.0
    assert not kto_baseline(ratios.mean()).requires_grad


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_an_extreme_pair_has_a_finite_loss_and_gradient_in_float32(name: str) -> None:
    stats = stats_of(name, hard=False, count=8)
    scale = torch.tensor([0.0, 1e-6, 1e4, 1e-6, 1e4, 0.0, 1.0, 1e4])
    far = {field: getattr(stats, field) for field in stats.__dataclass_fields__ if field.endswith("logps")}
    if name != "plackett_luce":
        far = {field: value * (scale if i % 2 else scale.flip(0)) for i, (field, value) in enumerate(far.items())}
    else:
        far["logps"] = far["logps"] * 1e4
    found, gradients = value_and_gradients(loss_of(name, {}), cast(replace(stats, **far), torch.float32))
    assert found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_dpo_at_extreme_margins_is_the_margin_or_nothing() -> None:
    h = torch.tensor([-1e5, 1e5], requires_grad=True)
    zero = torch.zeros(2)
    loss = dpo_loss(h, zero, zero, zero, 1.0)
    loss.sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(loss.detach(), torch.tensor([1e5, 0.0]))
    torch.testing.assert_close(h.grad, torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize("kind", ["forward_kl", "alpha_divergence"])
def test_a_divergences_slope_levels_off_where_its_exponent_would_overflow(kind: str) -> None:
    ratios = torch.tensor([-1e4, 1e4], requires_grad=True)
    slopes = f_slope(ratios, kind)
    slopes.sum().backward()
    assert ratios.grad is not None and slopes.isfinite().all() and ratios.grad.isfinite().all()
    assert slopes[0] < slopes[1] and ratios.grad[0] == 0


def test_losses_of_no_pairs_are_no_numbers() -> None:
    empty = torch.zeros(0)
    fields = {field: empty for field in PairStats.__dataclass_fields__ if field not in ("baseline", "with_gradient")}
    for name, method in LOSSES.items():
        if method.needs is PairStats:
            assert method(PairStats(**fields), None).shape == (0,), name
