"""Do the losses and their table keep what the papers prove?"""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_engine.errors import ConfigError
from dpo_engine.losses import LOSSES, PairStats, bco_loss, dpo_loss, get_method


def four(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-50 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_dpo_is_log_two_where_policy_is_reference() -> None:
    chosen, rejected, _, _ = four()
    for smoothing in (0.0, 0.1):
        loss = dpo_loss(chosen, rejected, chosen, rejected, 0.3, smoothing)
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_dpo_is_the_papers_formula() -> None:
    pc, pr, rc, rr = four()
    h = (pc - rc) - (pr - rr)
    torch.testing.assert_close(dpo_loss(pc, pr, rc, rr, 0.1), torch.log1p(torch.exp(-0.1 * h)))


def test_dpo_gradient_is_minus_beta_sigmoid_of_minus_beta_h() -> None:
    pc, pr, rc, rr = four()
    pc.requires_grad_(), pr.requires_grad_()
    dpo_loss(pc, pr, rc, rr, 0.1).sum().backward()
    h = ((pc - rc) - (pr - rr)).detach()
    expected = -0.1 * torch.sigmoid(-0.1 * h)
    torch.testing.assert_close(pc.grad, expected)
    torch.testing.assert_close(pr.grad, -expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_passes_gradcheck(smoothing: float) -> None:
    inputs = [x.requires_grad_() for x in four()]
    assert torch.autograd.gradcheck(lambda *a: dpo_loss(*a, 0.1, smoothing), inputs)


def test_dpo_ignores_a_constant_added_to_both_completions() -> None:
    pc, pr, rc, rr = four()
    torch.testing.assert_close(dpo_loss(pc + 7, pr + 7, rc, rr, 0.1), dpo_loss(pc, pr, rc, rr, 0.1))


def test_dpo_of_swapped_labels_differs_by_beta_h() -> None:
    pc, pr, rc, rr = four()
    h = (pc - rc) - (pr - rr)
    torch.testing.assert_close(dpo_loss(pc, pr, rc, rr, 0.1) - dpo_loss(pr, pc, rr, rc, 0.1), -0.1 * h)


def test_cdpo_is_stationary_at_the_log_odds_of_the_label_noise() -> None:
    smoothing, beta = 0.1, 0.5
    h = torch.tensor([math.log((1 - smoothing) / smoothing) / beta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo_loss(h, zero, zero, zero, beta, smoothing).sum().backward()
    assert h.grad is not None and abs(h.grad.item()) < 1e-12


def test_dpo_stays_finite_in_value_and_gradient_at_extreme_margins() -> None:
    h = torch.tensor([-1e5, 1e5], requires_grad=True)
    zero = torch.zeros(2)
    loss = dpo_loss(h, zero, zero, zero, 1.0)
    loss.sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(loss.detach(), torch.tensor([1e5, 0.0]))
    torch.testing.assert_close(h.grad, torch.tensor([-1.0, 0.0]))


def test_the_table_calls_the_public_function_with_the_configs_own_parameters() -> None:
    pc, pr, rc, rr = four()
    stats = PairStats(
        chosen_logps=pc,
        rejected_logps=pr,
        reference_chosen_logps=rc,
        reference_rejected_logps=rr,
        chosen_lengths=torch.ones(6),
        rejected_lengths=torch.ones(6),
    )
    config = SimpleNamespace(beta=0.7, label_smoothing=0.1)
    torch.testing.assert_close(LOSSES["dpo"](stats, config), dpo_loss(pc, pr, rc, rr, 0.7, 0.1))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_method_starts_at_its_start_value(name: str) -> None:
    chosen, rejected, _, _ = four()
    stats = PairStats(
        chosen_logps=chosen,
        rejected_logps=rejected,
        reference_chosen_logps=chosen,
        reference_rejected_logps=rejected,
        chosen_lengths=torch.ones(6),
        rejected_lengths=torch.ones(6),
    )
    config = SimpleNamespace(beta=0.1, label_smoothing=0.0)
    losses = LOSSES[name](stats, config)
    torch.testing.assert_close(losses, torch.full_like(losses, LOSSES[name].start(config)))


def test_an_unknown_method_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"dpoo.*did you mean 'dpo'"):
        get_method("dpoo")


def pair_stats(sums: list[torch.Tensor], **more: torch.Tensor) -> PairStats:
    pc, pr, rc, rr = sums
    return PairStats(
        chosen_logps=pc,
        rejected_logps=pr,
        reference_chosen_logps=rc,
        reference_rejected_logps=rr,
        chosen_lengths=torch.ones_like(pc),
        rejected_lengths=torch.ones_like(pr),
        **more,
    )


def test_bco_is_the_papers_formula_and_two_log_two_at_the_start() -> None:
    pc, pr, rc, rr = four()
    a, b = pc - rc, pr - rr
    expected = torch.log1p(torch.exp(-(0.1 * a - 0.3))) + torch.log1p(torch.exp(-(0.3 - 0.1 * b)))
    torch.testing.assert_close(bco_loss(pc, pr, rc, rr, 0.1, 0.3), expected)
    torch.testing.assert_close(bco_loss(rc, rr, rc, rr, 0.1, 0.0), torch.full_like(rc, 2 * math.log(2)))
    assert LOSSES["bco"].start(SimpleNamespace(beta=0.01)) == 2 * math.log(2)


def test_bco_compares_with_the_mean_reward_of_its_pairs_unless_a_baseline_is_given() -> None:
    sums, config = four(), SimpleNamespace(beta=0.2)
    pc, pr, rc, rr = sums
    mean = 0.2 * torch.cat([pc - rc, pr - rr]).mean()
    torch.testing.assert_close(LOSSES["bco"](pair_stats(sums), config), bco_loss(*sums, 0.2, mean))
    given = pair_stats(sums, baseline=torch.tensor(1.5, dtype=torch.float64))
    torch.testing.assert_close(LOSSES["bco"](given, config), bco_loss(*sums, 0.2, 1.5))


def test_no_gradient_goes_through_bcos_baseline() -> None:
    sums = [x.requires_grad_() for x in four()]
    loss = LOSSES["bco"](pair_stats(sums), SimpleNamespace(beta=0.2)).sum()
    ours = torch.autograd.grad(loss, sums[:2])
    delta = (0.2 * torch.cat([sums[0] - sums[2], sums[1] - sums[3]]).mean()).detach()
    theirs = torch.autograd.grad(bco_loss(*sums, 0.2, delta).sum(), sums[:2])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert torch.autograd.gradcheck(lambda *a: bco_loss(*a, 0.2, delta), sums)


def test_each_method_brings_its_own_beta_and_refuses_what_it_does_not_use(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from dpo_engine import DPOConfig

    assert DPOConfig(output_dir=str(tmp_path)).beta == 0.1
    assert DPOConfig(output_dir=str(tmp_path), method="bco").beta == 0.01
    assert DPOConfig(output_dir=str(tmp_path), method="bco", beta=0.3).beta == 0.3
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.1 is out of range; expected 0\.0: the method bco"):
        DPOConfig(output_dir=str(tmp_path), method="bco", label_smoothing=0.1)
    for method, name, value in (("ipo", "ld_alpha", 0.2), ("dpo", "ipo_reduction", "sum")):
        with pytest.raises(ConfigError, match=f"{name}=.* the method {method} does not use it"):
            DPOConfig(output_dir=str(tmp_path), method=method, **{name: value})


def some_stats(seed: int = 0, **changes: torch.Tensor) -> PairStats:
    pc, pr, rc, rr = four(seed)
    lengths = torch.arange(6, dtype=torch.float64)
    settings = {
        "chosen_logps": pc,
        "rejected_logps": pr,
        "reference_chosen_logps": rc,
        "reference_rejected_logps": rr,
        "chosen_lengths": lengths + 3,
        "rejected_lengths": 9 - lengths,
    }
    return PairStats(**(settings | changes))


def test_ipo_is_the_papers_formula_of_sums() -> None:
    stats = some_stats()
    h = (stats.chosen_logps - stats.reference_chosen_logps) - (stats.rejected_logps - stats.reference_rejected_logps)
    found = LOSSES["ipo"](stats, SimpleNamespace(beta=0.2, ipo_reduction="sum"))
    torch.testing.assert_close(found, (h - 2.5) ** 2)


def test_ipo_compares_means_over_tokens_unless_told_otherwise() -> None:
    stats = some_stats()
    a = (stats.chosen_logps - stats.reference_chosen_logps) / stats.chosen_lengths
    b = (stats.rejected_logps - stats.reference_rejected_logps) / stats.rejected_lengths
    for config in (SimpleNamespace(beta=0.2), SimpleNamespace(beta=0.2, ipo_reduction="mean")):
        torch.testing.assert_close(LOSSES["ipo"](stats, config), (a - b - 2.5) ** 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ipo_starts_at_a_quarter_of_tau_squared_and_rests_at_half_its_inverse(reduction: str) -> None:
    config = SimpleNamespace(beta=0.3, ipo_reduction=reduction)
    start = some_stats()
    start = some_stats(reference_chosen_logps=start.chosen_logps, reference_rejected_logps=start.rejected_logps)
    found = LOSSES["ipo"](start, config)
    torch.testing.assert_close(found, torch.full_like(found, 1 / (4 * 0.3**2)))
    assert LOSSES["ipo"].start(config) == pytest.approx(1 / (4 * 0.3**2))
    zero = torch.zeros(6, dtype=torch.float64)
    h = torch.full((6,), 1 / (2 * 0.3), dtype=torch.float64, requires_grad=True)
    at_rest = some_stats(
        chosen_logps=h,
        rejected_logps=zero,
        reference_chosen_logps=zero,
        reference_rejected_logps=zero,
        chosen_lengths=zero + 1,
    )
    loss = LOSSES["ipo"](at_rest, config)
    loss.sum().backward()
    assert h.grad is not None and h.grad.abs().max() < 1e-12 and loss.abs().max() < 1e-12


def test_ipo_of_sums_ignores_a_constant_added_to_both_completions() -> None:
    config, stats = SimpleNamespace(beta=0.2, ipo_reduction="sum"), some_stats()
    moved = some_stats(chosen_logps=stats.chosen_logps + 7, rejected_logps=stats.rejected_logps + 7)
    torch.testing.assert_close(LOSSES["ipo"](moved, config), LOSSES["ipo"](stats, config))


def test_length_desensitised_weights_are_one_up_to_the_shorter_length_and_alpha_beyond() -> None:
    places = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    shorter = torch.tensor([2, 2, 2, 2, 2, 2, 2])
    weights = LOSSES["ld_dpo"].token_weights(places, shorter, SimpleNamespace(ld_alpha=0.25))  # type: ignore[misc]
    assert weights.tolist() == [1, 1, 0.25, 0.25, 0.25, 1, 1]


def test_ld_dpo_of_weighted_sums_is_dpo() -> None:
    stats = some_stats()
    config = SimpleNamespace(beta=0.1, label_smoothing=0.0)
    torch.testing.assert_close(LOSSES["ld_dpo"](stats, config), LOSSES["dpo"](stats, config))
