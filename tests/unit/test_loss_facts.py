"""Do the losses have the properties that their papers prove of them?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_engine.losses import LOSSES, ListStats, PairStats, UnpairedStats, aot_loss, dpo_loss, dpop_loss, ipo_loss
from dpo_engine.losses.pairwise import F_DIVERGENCES, f_slope
from dpo_engine.losses.reference_free import log_odds
from support.loss_formulas import FORMULAS, pairs, ranked, stats_of, unpaired, value_and_gradients

LOG2 = math.log(2)


def found(name: str, stats: Any, **settings: Any) -> Tensor:
    return LOSSES[name](stats, SimpleNamespace(**settings))


def at_reference(name: str) -> Any:
    """Statistics where policy and reference agree, and say so everywhere."""
    stats = stats_of(name, hard=False)
    same = {f"reference_{field}": getattr(stats, field) for field in stats.with_gradient if field.endswith("logps")}
    if isinstance(stats, PairStats):
        zero = torch.zeros_like(stats.chosen_logps)
        same |= {"chosen_kl": zero, "rejected_kl": zero}
    if isinstance(stats, UnpairedStats):
        same["baseline"] = torch.zeros((), dtype=torch.float64)
    return replace(stats, **same)


def pair_of(a: Tensor | float, b: Tensor | float, length: float = 1.0) -> PairStats:
    """One pair with these log-ratios, under a reference that gives both completions -40."""
    sides = [torch.atleast_1d(torch.as_tensor(side, dtype=torch.float64)) for side in (a, b)]
    under = torch.full_like(sides[0], -40.0)
    return PairStats(
        chosen_logps=under + sides[0],
        rejected_logps=under + sides[1],
        reference_chosen_logps=under,
        reference_rejected_logps=under,
        chosen_lengths=torch.full_like(under, length),
        rejected_lengths=torch.full_like(under, length),
    )


# ---- where policy and reference agree ----

STARTS: list[tuple[str, dict[str, Any], float]] = [
    ("dpo", {}, LOG2),
    ("dpo", {"label_smoothing": 0.2}, LOG2),
    ("dpo_norm", {}, LOG2),
    ("cdpo", {}, LOG2),
    ("rdpo", {}, LOG2),
    ("rdpo", {"label_smoothing": 0.4}, LOG2),
    ("dpop", {}, LOG2),
    ("aot", {}, LOG2),
    ("ld_dpo", {}, LOG2),
    ("tr_dpo", {}, LOG2),
    ("tdpo", {}, LOG2),
    *(("f_dpo", {"f_divergence_type": kind}, LOG2) for kind in F_DIVERGENCES),
    ("hinge", {}, 1.0),
    ("ipo", {}, 1 / (4 * 0.1**2)),
    ("ipo", {"beta": 0.3, "ipo_reduction": "sum"}, 1 / (4 * 0.3**2)),
    ("nca", {}, 2 * LOG2),
    ("bco", {}, 2 * LOG2),
    ("apo_zero", {}, 1.0),
    ("apo_down", {}, 1.0),
    ("sppo", {}, 1 / (2 * 1e-3**2)),
    ("sppo", {"beta": 0.2}, 1 / (2 * 0.2**2)),
    ("discopop", {}, 0.84657),
    ("discopop", {"beta": 1.0, "discopop_tau": 0.3}, (LOG2 + 1) / 2),
    ("exo", {"label_smoothing": 0.1}, -math.log(2 * math.sqrt(0.1 * 0.9))),
    ("kto", {}, 0.5),
]


@pytest.mark.parametrize(("name", "settings", "value"), STARTS, ids=lambda x: str(x))
def test_a_method_starts_where_its_paper_says(name: str, settings: dict[str, Any], value: float) -> None:
    losses = found(name, at_reference(name), **settings)
    torch.testing.assert_close(losses, torch.full_like(losses, value), rtol=1e-9 if value != 0.84657 else 1e-5, atol=0)


def test_what_starts_elsewhere_starts_at_log_two_and_what_it_adds() -> None:
    stats = at_reference("dpo")
    nll = -stats.chosen_logps / stats.chosen_lengths
    torch.testing.assert_close(found("dpo_nll", stats, rpo_alpha=0.3), LOG2 + 0.3 * nll)
    longer = stats.chosen_lengths - stats.rejected_lengths
    torch.testing.assert_close(found("r_dpo", stats, r_dpo_alpha=0.02), torch.log1p(torch.exp(-0.02 * longer)))
    evenly = replace(stats, rejected_lengths=stats.chosen_lengths)
    torch.testing.assert_close(found("r_dpo", evenly, r_dpo_alpha=0.02), torch.full_like(longer, LOG2))
    same = replace(evenly, rejected_logps=stats.chosen_logps)
    torch.testing.assert_close(found("cpo", same), LOG2 + nll)
    torch.testing.assert_close(found("orpo", same, beta=0.3), 0.3 * LOG2 + nll)
    torch.testing.assert_close(found("simpo", same), torch.full_like(nll, math.log1p(math.exp(1.0))))  # gamma is 1
    torch.testing.assert_close(found("sft", same), nll)


def test_kto_starts_at_half_a_classes_weight() -> None:
    stats = at_reference("kto")
    losses = found("kto", stats, desirable_weight=1.4, undesirable_weight=0.6)
    torch.testing.assert_close(losses, torch.where(stats.desirable, 0.7, 0.3).double())


def test_plackett_luce_starts_at_the_logarithm_of_the_number_of_rankings() -> None:
    for size in range(1, 6):
        losses = found("plackett_luce", one_list([0.0] * size, list(range(size))))
        assert losses.tolist() == pytest.approx([math.log(math.factorial(size))])


def test_every_pairwise_method_has_a_start_that_is_checked() -> None:
    elsewhere = {"dpo_nll", "r_dpo", "cpo", "orpo", "simpo", "sft", "plackett_luce", "wpo"}
    assert {name for name, _, _ in STARTS} | elsewhere == set(LOSSES)


# ---- slopes ----


@pytest.mark.parametrize("beta", [0.03, 0.1, 1.0])
def test_dpos_gradient_is_minus_beta_sigmoid_of_minus_beta_h(beta: float) -> None:
    stats = pairs(hard=True)
    _, gradients = value_and_gradients(lambda s: found("dpo", s, beta=beta), stats)
    a, b = stats.chosen_logps - stats.reference_chosen_logps, stats.rejected_logps - stats.reference_rejected_logps  # type: ignore[operator]
    expected = -beta / (1 + torch.exp(beta * (a - b)))
    torch.testing.assert_close(gradients["chosen_logps"], expected, rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(gradients["rejected_logps"], -expected, rtol=1e-9, atol=1e-300)


def test_dpo_of_swapped_labels_differs_by_beta_h() -> None:
    h = torch.linspace(-300, 300, 61, dtype=torch.float64)
    there, back = found("dpo", pair_of(h, 0 * h), beta=0.3), found("dpo", pair_of(-h, 0 * h), beta=0.3)
    torch.testing.assert_close(there - back, -0.3 * h)


def test_r_dpo_learns_less_from_a_longer_chosen_completion() -> None:
    stats = pair_of(0.5, -0.5)
    longer = replace(stats, chosen_lengths=torch.tensor([30.0], dtype=torch.float64))
    slopes = [value_and_gradients(lambda s: found("r_dpo", s), s)[1]["chosen_logps"].abs() for s in (longer, stats)]
    assert slopes[0] < slopes[1]


def slope_at(name: str, a: float, b: float, **settings: Any) -> tuple[float, float]:
    _, gradients = value_and_gradients(lambda s: found(name, s, **settings), pair_of(a, b))
    return gradients["chosen_logps"].item(), gradients["rejected_logps"].item()


@pytest.mark.parametrize("name", ["cdpo", "dpo", "exo"])
def test_smoothed_labels_are_met_at_the_log_odds_of_the_noise(name: str) -> None:
    eps, beta = 0.1, 0.5
    rest = math.log((1 - eps) / eps) / beta
    settings = {"beta": beta, "label_smoothing": eps}
    assert slope_at(name, rest / 3, -2 * rest / 3, **settings) == pytest.approx((0, 0), abs=1e-12)
    before, after = slope_at(name, rest - 0.1, 0, **settings)[0], slope_at(name, rest + 0.1, 0, **settings)[0]
    assert before < -1e-4 and after > 1e-4
    if name == "exo":  # the divergence itself is 0 there
        assert found(name, pair_of(rest, 0), **settings).item() == pytest.approx(0, abs=1e-12)


def test_nca_holds_the_chosen_reward_at_log_two_and_lets_the_rejected_fall() -> None:
    beta = 0.05
    rest = LOG2 / beta
    chosen, rejected = slope_at("nca", rest, 1.0, beta=beta)
    assert chosen == pytest.approx(0, abs=1e-12) and rejected > 0
    assert slope_at("nca", rest - 0.1, 1.0, beta=beta)[0] < 0 < slope_at("nca", rest + 0.1, 1.0, beta=beta)[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ipo_rests_at_half_of_taus_inverse(reduction: str) -> None:
    tau, length = 0.3, 7.0
    rest = 1 / (2 * tau) * (length if reduction == "mean" else 1.0)
    stats = pair_of(rest + 2, 2.0, length)
    losses, gradients = value_and_gradients(lambda s: found("ipo", s, beta=tau, ipo_reduction=reduction), stats)
    assert losses.item() == pytest.approx(0, abs=1e-12)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients.values())


def test_sppo_rests_with_the_chosen_up_and_the_rejected_down_by_half_of_betas_inverse() -> None:
    assert slope_at("sppo", 5.0, -5.0, beta=0.1) == pytest.approx((0, 0), abs=1e-12)


def test_rdpo_averaged_over_flips_is_dpo() -> None:
    stats = pairs(hard=True)
    flipped = replace(
        stats,
        chosen_logps=stats.rejected_logps,
        rejected_logps=stats.chosen_logps,
        reference_chosen_logps=stats.reference_rejected_logps,
        reference_rejected_logps=stats.reference_chosen_logps,
    )
    for eps in (0.05, 0.3, 0.49):
        settings = {"beta": 0.2, "label_smoothing": eps}
        mean = (1 - eps) * found("rdpo", stats, **settings) + eps * found("rdpo", flipped, **settings)
        torch.testing.assert_close(mean, found("dpo", stats, beta=0.2), rtol=1e-9, atol=1e-9)
    # cDPO is not: its mean is a smoothed loss still.
    smoothed = 0.7 * found("cdpo", stats, label_smoothing=0.3) + 0.3 * found("cdpo", flipped, label_smoothing=0.3)
    assert (smoothed - found("dpo", stats)).abs().max() > 0.1


def test_rdpo_has_no_bound_below() -> None:
    assert found("rdpo", pair_of(1e4, 0.0), beta=1.0, label_smoothing=0.1).item() < -1000


# ---- constants ----

UNMOVED: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {}), ("cdpo", {}), ("rdpo", {}), ("ipo", {"ipo_reduction": "sum"}), ("exo", {}), ("discopop", {}), ("hinge", {}),
    ("aot", {}), ("r_dpo", {}), ("wpo", {}), ("tr_dpo", {}), ("tdpo", {}), ("f_dpo", {}), ("bco", {}),
]  # fmt: skip
MOVED: list[tuple[str, dict[str, Any]]] = [
    ("nca", {}), ("bco", {"baseline": 0.0}), ("sppo", {"beta": 0.1}), ("apo_zero", {}), ("apo_down", {}), ("dpop", {}),
    ("ipo", {}), ("dpo_norm", {}), ("dpo_nll", {}), ("cpo", {}), ("simpo", {}), ("orpo", {}), ("sft", {}),
    *(("f_dpo", {"f_divergence_type": kind}) for kind in F_DIVERGENCES if kind != "reverse_kl"),
]  # fmt: skip


def lowered(name: str, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Losses before and after both completions of each pair become less likely by 7 nats."""
    stats = pairs(hard=False)
    given = dict(settings)
    if "baseline" in given:
        stats = replace(stats, baseline=torch.tensor(given.pop("baseline"), dtype=torch.float64))
    less = replace(stats, chosen_logps=stats.chosen_logps - 7, rejected_logps=stats.rejected_logps - 7)
    return found(name, stats, **given), found(name, less, **given)


@pytest.mark.parametrize(("name", "settings"), UNMOVED, ids=lambda x: str(x))
def test_a_loss_of_a_difference_does_not_see_both_completions_sink(name: str, settings: dict[str, Any]) -> None:
    torch.testing.assert_close(*lowered(name, settings), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "settings"), MOVED, ids=lambda x: str(x))
def test_another_loss_does(name: str, settings: dict[str, Any]) -> None:
    before, after = lowered(name, settings)
    assert (before - after).abs().max() > 1e-3


# ---- methods that are others, made otherwise ----


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_dpo_with_label_smoothing_is_cdpo(smoothing: float) -> None:
    stats = pairs(hard=True)
    settings = {"beta": 0.3, "label_smoothing": smoothing}
    assert torch.equal(found("dpo", stats, **settings), found("cdpo", stats, **settings))
    assert torch.equal(found("cdpo", stats, label_smoothing=0.0), found("dpo", stats))


def test_reverse_kl_is_dpo_and_the_family_has_it_and_forward_kl_as_its_ends() -> None:
    stats = pairs(hard=False)
    assert torch.equal(found("f_dpo", stats), found("dpo", stats))
    alpha = {"f_divergence_type": "alpha_divergence"}
    near = found("f_dpo", stats, **alpha, f_alpha_divergence_coef=1 + 1e-7)
    torch.testing.assert_close(near, found("dpo", stats), rtol=1e-5, atol=1e-6)
    forward = found("f_dpo", stats, f_divergence_type="forward_kl")
    torch.testing.assert_close(found("f_dpo", stats, **alpha, f_alpha_divergence_coef=0.0), forward)


@pytest.mark.parametrize("kind", F_DIVERGENCES)
@pytest.mark.parametrize("alpha", [-0.5, 0.5, 2.0])
def test_a_divergences_slope_is_the_derivative_of_its_f(kind: str, alpha: float) -> None:
    f: Callable[[Tensor], Tensor] = {
        "reverse_kl": lambda u: u * torch.log(u),
        "forward_kl": lambda u: -torch.log(u),
        "js_divergence": lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2),
        "alpha_divergence": lambda u: (u**alpha - alpha * u) / (alpha * (alpha - 1)),
    }[kind]
    log_ratio = torch.linspace(-5, 5, 21, dtype=torch.float64)
    u = torch.exp(log_ratio).requires_grad_()
    (slope,) = torch.autograd.grad(f(u).sum(), u)
    apart = f_slope(log_ratio, kind, alpha) - slope
    torch.testing.assert_close(apart, apart[:1].expand_as(apart), rtol=0, atol=1e-9)  # up to a constant
    reward = f_slope(log_ratio, kind, alpha)
    assert (reward[1:] > reward[:-1]).all()  # f is convex: a likelier completion has the higher reward


def test_length_desensitised_sums_are_those_of_weighted_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [(5, 9), (9, 5), (4, 4), (1, 12)]
    fields: dict[str, list[Tensor]] = {}
    expected, alpha = [], 0.3
    for both in lengths:
        h = torch.zeros((), dtype=torch.float64)
        for side, length, sign in (("chosen", both[0], 1), ("rejected", both[1], -1)):
            weights = torch.tensor([1.0 if place < min(both) else alpha for place in range(length)]).double()
            for owner, of_owner in (("", 1), ("reference_", -1)):
                tokens = -torch.rand(length, generator=generator, dtype=torch.float64)
                fields.setdefault(f"{owner}{side}_logps", []).append(tokens.sum())
                fields.setdefault(f"{owner}{side}_public_logps", []).append(tokens[: min(both)].sum())
                h = h + sign * of_owner * (weights * tokens).sum()
        expected.append(torch.log1p(torch.exp(-0.7 * h)))
    stats = PairStats(
        **{name: torch.stack(values) for name, values in fields.items()},
        chosen_lengths=torch.tensor([both[0] for both in lengths]),
        rejected_lengths=torch.tensor([both[1] for both in lengths]),
    )
    torch.testing.assert_close(found("ld_dpo", stats, beta=0.7, ld_alpha=alpha), torch.stack(expected))
    torch.testing.assert_close(found("ld_dpo", stats, ld_alpha=1.0), found("dpo", stats))
    assert (found("ld_dpo", stats, ld_alpha=1.0) - found("ld_dpo", stats, ld_alpha=0.0))[
        2
    ].abs() < 1e-12  # of one length


def test_ld_dpo_without_public_parts_is_a_number_only_where_they_cannot_matter() -> None:
    stats = replace(pairs(hard=False), chosen_public_logps=None)
    with pytest.raises(ValueError, match="came without chosen_public_logps"):
        found("ld_dpo", stats)
    alike = replace(stats, rejected_lengths=stats.chosen_lengths)
    assert torch.equal(found("ld_dpo", alike), found("dpo", alike))


def test_dpops_penalty_is_inside_the_sigmoid_times_beta() -> None:
    beta, weight = 0.3, 5.0
    for a, b in ((-2.0, -4.0), (2.0, -4.0)):
        inside = math.log1p(math.exp(-beta * (a - b - weight * max(0.0, -a))))
        outside = math.log1p(math.exp(-beta * (a - b))) + weight * max(0.0, -a)
        value = found("dpop", pair_of(a, b), beta=beta, dpop_lambda=weight).item()
        assert value == pytest.approx(inside)
        assert (abs(value - outside) > 1) == (a < 0)
    up = torch.full((3,), 2.0, dtype=torch.float64)
    four = up, -up, 0 * up, 0 * up
    assert torch.equal(dpop_loss(*four, beta, weight), dpo_loss(*four, beta))  # nothing lost, nothing paid


def test_a_chosen_completion_that_sinks_is_pushed_down_by_dpo_and_held_by_dpop() -> None:
    def drift(name: str) -> float:
        """How the loss changes where both completions sink together."""
        return sum(slope_at(name, -3.0, -5.0))

    assert drift("dpo") == pytest.approx(0, abs=1e-12)
    assert drift("dpop") < -1  # a descent step raises them


def test_wpos_weight_is_the_policys_own_and_at_most_one() -> None:
    stats = replace(
        pair_of(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-1.0, -1.0, -1.0])),
        chosen_confidence=torch.tensor([-0.3, 0.9, 0.2], dtype=torch.float64),
        rejected_confidence=torch.tensor([-0.4, -0.1, -0.2], dtype=torch.float64),
    )
    plain = found("dpo", stats, beta=0.01)
    weights = found("wpo", stats) / plain
    assert weights.tolist() == pytest.approx([math.exp(-0.7), 1.0, 1.0])


def test_tdpo_is_dpo_with_the_sequences_divergences_apart() -> None:
    stats = replace(pair_of(1.0, -1.0), chosen_kl=torch.tensor([2.0]), rejected_kl=torch.tensor([6.0]))
    assert found("tdpo", stats, tdpo_alpha=0.0).item() == found("dpo", stats).item()
    assert found("tdpo", stats, beta=0.3, tdpo_alpha=0.25).item() == pytest.approx(math.log1p(math.exp(-0.3 * 1.0)))


# ---- AOT ----


def test_aot_does_not_depend_on_the_order_of_pairs_nor_on_whose_reference_is_whose() -> None:
    stats = pairs(hard=True)
    assert stats.reference_chosen_logps is not None and stats.reference_rejected_logps is not None
    four = stats.chosen_logps, stats.rejected_logps, stats.reference_chosen_logps, stats.reference_rejected_logps
    losses = aot_loss(*four, 0.1, 0.1)
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(aot_loss(*(value[order] for value in four), 0.1, 0.1), losses[order])
    torch.testing.assert_close(aot_loss(*four[:2], four[2][order], four[3][order], 0.1, 0.1), losses)


def test_aot_of_one_pair_or_of_margins_in_one_order_is_dpo() -> None:
    one = pair_of(2.0, -1.0)
    assert found("aot", one).item() == pytest.approx(found("dpo", one, beta=0.01).item())
    stats = pairs(hard=False)
    assert stats.reference_chosen_logps is not None and stats.reference_rejected_logps is not None
    policy = (stats.chosen_logps - stats.rejected_logps).argsort()
    reference = (stats.reference_chosen_logps - stats.reference_rejected_logps).argsort()
    aligned = replace(
        stats,
        chosen_logps=stats.chosen_logps[policy],
        rejected_logps=stats.rejected_logps[policy],
        reference_chosen_logps=stats.reference_chosen_logps[reference],
        reference_rejected_logps=stats.reference_rejected_logps[reference],
    )
    torch.testing.assert_close(found("aot", aligned, beta=0.3), found("dpo", aligned, beta=0.3))


def test_aot_asks_for_larger_margins_at_every_quantile_whoever_has_them() -> None:
    stats = pairs(hard=False)
    _, gradients = value_and_gradients(lambda s: found("aot", s, beta=0.1), stats)
    assert (gradients["chosen_logps"] < 0).all() and torch.equal(
        gradients["chosen_logps"], -gradients["rejected_logps"]
    )


# ---- ORPO ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [-1e-8, 0.0, -1e-38, -700.0])
def test_orpo_is_finite_and_has_a_gradient_near_certainty(mean: float, dtype: torch.dtype) -> None:
    length = 5.0
    for sides in ((mean, -2.0), (-2.0, mean), (mean, mean)):
        stats = PairStats(
            chosen_logps=torch.tensor([sides[0] * length], dtype=dtype),
            rejected_logps=torch.tensor([sides[1] * length], dtype=dtype),
            chosen_lengths=torch.tensor([length], dtype=dtype),
            rejected_lengths=torch.tensor([length], dtype=dtype),
        )
        losses, gradients = value_and_gradients(lambda s: found("orpo", s), stats)
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert gradients["chosen_logps"].item() < 0  # the likelihood still pulls


def test_log_odds_near_certainty_have_their_digits() -> None:
    x = torch.tensor([-1e-8, -1e-3, -0.5, -30.0, -800.0], dtype=torch.float64)
    # log(p / (1 - p)) of p = exp(x), 1 - p by its series where x is small
    expected = [math.log(1e8) - 1e-8 / 2, math.log(1 / math.expm1(1e-3)), -math.log(math.expm1(0.5)), -30.0, -800.0]
    assert log_odds(x).tolist() == pytest.approx(expected, rel=1e-12)
    assert log_odds(x.float()).tolist() == pytest.approx(
        [log_odds(torch.tensor(-(2.0**-23))).item(), *expected[1:]], rel=1e-5
    )


# ---- KTO ----


@pytest.mark.parametrize("label", [True, False])
def test_kto_of_one_class_only_is_a_number(label: bool) -> None:
    stats = unpaired(hard=True)
    stats = replace(stats, desirable=torch.full_like(stats.desirable, label))
    losses, gradients = value_and_gradients(lambda s: found("kto", s), stats)
    assert losses.isfinite().all() and gradients["logps"].isfinite().all()
    assert (gradients["logps"] <= 0).all() if label else (gradients["logps"] >= 0).all()


def test_ktos_classes_are_each_others_mirror() -> None:
    stats = unpaired(hard=False)
    assert stats.reference_logps is not None and stats.baseline is not None
    mirrored = replace(
        stats, logps=2 * (stats.reference_logps + stats.baseline) - stats.logps, desirable=~stats.desirable
    )
    torch.testing.assert_close(found("kto", mirrored), found("kto", stats))


# ---- Plackett-Luce ----


def one_list(ratios: list[float], ranks: list[int]) -> ListStats:
    return ListStats(
        logps=torch.tensor(ratios, dtype=torch.float64) - 30,
        reference_logps=torch.full((len(ratios),), -30.0, dtype=torch.float64),
        lengths=torch.ones(len(ratios)),
        list_ids=torch.zeros(len(ratios), dtype=torch.int64),
        ranks=torch.tensor(ranks),
        lists=1,
    )


def test_plackett_luce_of_two_is_dpo() -> None:
    stats = pairs(hard=True)
    assert stats.reference_chosen_logps is not None and stats.reference_rejected_logps is not None
    count = len(stats)
    as_lists = ListStats(
        logps=torch.stack([stats.chosen_logps, stats.rejected_logps], 1).flatten(),
        reference_logps=torch.stack([stats.reference_chosen_logps, stats.reference_rejected_logps], 1).flatten(),
        lengths=torch.ones(2 * count),
        list_ids=torch.arange(count).repeat_interleave(2),
        ranks=torch.tensor([0, 1]).repeat(count),
        lists=count,
    )
    losses = found("plackett_luce", as_lists, beta=0.3)
    torch.testing.assert_close(losses, found("dpo", stats, beta=0.3), rtol=1e-9, atol=1e-9)


def test_all_rankings_of_a_list_have_probability_one_together() -> None:
    scores = [3.0, -1.0, 0.5, 2.0]
    total = sum(
        math.exp(-found("plackett_luce", one_list([scores[i] for i in order], [0, 1, 2, 3]), beta=0.7).item())
        for order in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1)


def test_completions_that_tie_may_come_in_any_order() -> None:
    losses = [
        found("plackett_luce", one_list([4.0, *middle, -2.0], [0, 1, 1, 2]), beta=0.5).item()
        for middle in ([1.0, 3.0], [3.0, 1.0])
    ]
    assert losses[0] == pytest.approx(losses[1])
    s = [0.5 * x for x in (4.0, 1.0, 3.0, -2.0)]
    every, lower = (math.log(sum(map(math.exp, s[start:]))) for start in (0, 1))
    assert losses[0] == pytest.approx(
        every - s[0] + 2 * lower - s[1] - s[2]
    )  # Breslow: each against both and those below


def test_a_tie_for_the_last_place_says_nothing_and_neither_does_a_list_of_ties() -> None:
    def slopes(ratios: list[float], ranks: list[int]) -> list[float]:
        return value_and_gradients(lambda s: found("plackett_luce", s), one_list(ratios, ranks))[1]["logps"].tolist()

    assert found("plackett_luce", one_list([1.0, 2.0, 3.0], [0, 0, 0])).item() == 0
    assert slopes([1.0, 2.0, 3.0], [0, 0, 0]) == [0, 0, 0]
    s = [0.1 * x for x in (1.0, 2.0, 3.0)]
    best = found("plackett_luce", one_list([1.0, 2.0, 3.0], [0, 1, 1])).item()
    assert best == pytest.approx(math.log(sum(map(math.exp, s))) - s[0])
    assert sum(slopes([1.0, 2.0, 3.0], [0, 1, 1])) == pytest.approx(0, abs=1e-12)


def test_lists_do_not_see_one_another() -> None:
    stats = ranked(hard=True)
    losses = found("plackett_luce", stats)
    last = stats.list_ids == stats.lists - 1
    moved = replace(stats, logps=torch.where(last, stats.logps - 50, stats.logps + 0.0))
    again = found("plackett_luce", moved)
    torch.testing.assert_close(again[:-1], losses[:-1], rtol=0, atol=0)


# ---- optima ----


def fitted(loss: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """The distribution whose log-probs minimise a loss, by Newton's method: the losses of a table are convex."""
    logits = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(torch.log_softmax(logits, 0))
        value.backward()
        return value

    optimiser.step(closure)  # type: ignore[arg-type]
    return torch.softmax(logits.detach(), 0)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "forward_kl", "js_divergence"])
def test_the_minimiser_over_all_pairs_is_the_closed_form(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    count, beta = 6, 0.7
    rewards = torch.randn(count, generator=generator, dtype=torch.float64)
    reference = torch.log_softmax(torch.randn(count, generator=generator, dtype=torch.float64), 0)
    behaviour = torch.softmax(torch.randn(count, generator=generator, dtype=torch.float64), 0)
    wins = torch.sigmoid(rewards[:, None] - rewards[None, :])  # Bradley and Terry
    first, second = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    first, second = first.flatten(), second.flatten()
    weight = (behaviour[:, None] * behaviour[None, :] * wins).flatten()

    def over_all_pairs(logps: Tensor) -> Tensor:
        four = logps[first], logps[second], reference[first], reference[second]
        if kind == "dpo":
            losses = dpo_loss(*four, beta)
        elif kind == "ipo":
            losses = ipo_loss(*four, beta)
        else:
            stats = replace(pair_of(four[0], four[1]), chosen_logps=four[0], rejected_logps=four[1])
            stats = replace(stats, reference_chosen_logps=four[2], reference_rejected_logps=four[3])
            losses = found("f_dpo", stats, beta=beta, f_divergence_type=kind)
        return (weight * losses).sum()

    policy = fitted(over_all_pairs, count)
    if kind == "dpo":
        optimum = torch.softmax(reference + rewards / beta, 0)
    elif kind == "ipo":
        optimum = torch.softmax(reference + (wins @ behaviour) / beta, 0)
    else:  # rewards are met up to a constant by beta f'(pi / reference)
        ratio = policy / reference.exp()
        slope = -1 / ratio if kind == "forward_kl" else torch.log(2 * ratio / (1 + ratio))
        apart = beta * slope - rewards
        assert (apart - apart.mean()).abs().max() < 1e-5
        return
    assert 0.5 * (policy - optimum).abs().sum() < 1e-6


def test_facts_are_of_the_methods_in_the_table() -> None:
    assert set(FORMULAS) == set(LOSSES)
