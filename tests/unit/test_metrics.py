"""Are the logged numbers what they are called, for every method and every batch that a run can meet?"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from dpo_engine.batch import Tree, build_forest
from dpo_engine.losses import LOSSES, ListStats, PairStats, UnpairedStats, get_method
from dpo_engine.train.metrics import MetricSums, stats_metrics
from dpo_engine.train.scoring import _completion_values
from dpo_engine.train.start import in_agreement
from dpo_engine.train.state import RunningMean
from support.loss_formulas import stats_of

PAIR_NAMES = {
    "loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "lengths/chosen", "lengths/rejected",
    "rewards/margins", "rewards/accuracies",
}  # fmt: skip


def means(method: str, stats: Any, **settings: Any) -> dict[str, float]:
    """What a log shows of one batch."""
    entry, config, sums = get_method(method), SimpleNamespace(**settings), MetricSums()
    if not entry.needs_reference:  # nobody asks for one
        stats = replace(stats, reference_chosen_logps=None, reference_rejected_logps=None)
    losses, parts = entry(stats, config), entry.part_losses(stats, config)
    sums.add(stats_metrics(entry, stats, losses, config, parts))
    return sums.means(sums.stacked())


def pair_stats(chosen: list[float], rejected: list[float], *more: list[float], **fields: Any) -> PairStats:
    """Of these log-ratios, under a reference that gives every completion -50; lengths 4 and 8 unless said."""
    lengths = more or ([4.0] * len(chosen), [8.0] * len(chosen))
    under = torch.full((len(chosen),), -50.0)
    given = {
        "chosen_logps": under + torch.tensor(chosen),
        "rejected_logps": under + torch.tensor(rejected),
        "reference_chosen_logps": under,
        "reference_rejected_logps": under,
        "chosen_lengths": torch.tensor(lengths[0]),
        "rejected_lengths": torch.tensor(lengths[1]),
    }
    return PairStats(**(given | fields))


def unpaired_stats(ratios: list[float], labels: list[bool], **fields: Any) -> UnpairedStats:
    under = torch.full((len(ratios),), -50.0)
    given = {
        "logps": under + torch.tensor(ratios),
        "reference_logps": under,
        "lengths": torch.arange(1.0, len(ratios) + 1),
        "desirable": torch.tensor(labels),
        "baseline": torch.tensor(0.0),
    }
    return UnpairedStats(**(given | fields))


def list_stats(lists: list[list[tuple[float, int]]], **fields: Any) -> ListStats:
    """Of (log-ratio, rank)."""
    flat = [one for mine in lists for one in mine]
    under = torch.full((len(flat),), -50.0)
    given = {
        "logps": under + torch.tensor([ratio for ratio, _ in flat]),
        "reference_logps": under,
        "lengths": torch.arange(1.0, len(flat) + 1),
        "list_ids": torch.tensor([i for i, mine in enumerate(lists) for _ in mine]),
        "ranks": torch.tensor([rank for _, rank in flat]),
        "lists": len(lists),
    }
    return ListStats(**(given | fields))


# ---- pairs ----


def test_numbers_of_pairs_are_their_means() -> None:
    found = means("dpo", pair_stats([2.0, -1.0], [-3.0, 1.0], k3=torch.tensor([0.5, 1.5])), beta=0.2)
    assert found == pytest.approx(
        {
            "loss": (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(0.4))) / 2,
            "logps/chosen": -49.5,
            "logps/rejected": -51.0,
            "rewards/chosen": 0.2 * 0.5,
            "rewards/rejected": 0.2 * -1.0,
            "rewards/margins": 0.2 * 1.5,
            "rewards/accuracies": 0.5,
            "lengths/chosen": 4.0,
            "lengths/rejected": 8.0,
            "logps/chosen_shift": 0.5,
            "kl": 1.0,
        },
        rel=1e-6,
    )


def test_beta_is_the_methods_own_unless_given() -> None:
    stats = pair_stats([2.0], [-3.0])
    assert means("nca", stats)["rewards/margins"] == pytest.approx(0.01 * 5)
    assert means("nca", stats, beta=0.5)["rewards/margins"] == pytest.approx(0.5 * 5)
    assert means("sft", stats)["rewards/chosen"] == pytest.approx(-48 / 4)  # it has none: 1


@pytest.mark.parametrize(("method", "beta"), [("dpo_norm", 5.0), ("simpo", 2.0), ("orpo", 0.1)])
def test_methods_of_means_over_tokens_have_rewards_of_means_over_tokens(method: str, beta: float) -> None:
    found = means(method, pair_stats([2.0], [-3.0]))
    under = 50.0 if method == "dpo_norm" else 0.0
    assert found["rewards/chosen"] == pytest.approx(beta * (-48 + under) / 4)
    assert found["rewards/rejected"] == pytest.approx(beta * (-53 + under) / 8)
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    assert found["logps/chosen"] == -48  # a sum all the same


def test_a_pair_that_ties_is_half_right_also_in_the_last_bits_of_its_sums() -> None:
    even = pair_stats([1.0, 1.0, 2.0, 0.0], [1.0, 1.0, 0.0, 2.0])
    assert means("dpo", even)["rewards/accuracies"] == pytest.approx(0.5)
    one = pair_stats([1.0], [1.0])
    assert means("dpo", one)["rewards/accuracies"] == 0.5
    nearly = replace(one, chosen_logps=one.chosen_logps * (1 + 2.0**-22))
    assert means("dpo", nearly)["rewards/accuracies"] == 0.5
    assert means("dpo", replace(one, chosen_logps=one.chosen_logps + 0.01))["rewards/accuracies"] == 1.0
    assert means("dpo", replace(one, chosen_logps=one.chosen_logps - 0.01))["rewards/accuracies"] == 0.0


@pytest.mark.parametrize(
    "method", sorted(name for name, m in LOSSES.items() if m.needs is PairStats and m.needs_reference)
)
def test_before_the_first_step_accuracy_is_a_half_and_rewards_are_zero(method: str) -> None:
    stats = stats_of(method, hard=True)
    found = means(method, in_agreement(stats))
    assert found["rewards/accuracies"] == 0.5
    assert found["rewards/margins"] == found["rewards/chosen"] == found["logps/chosen_shift"] == 0


def test_pairs_of_one_list_count_their_share_of_it() -> None:
    """Three pairs of a list of three, and one pair of another."""
    stats = pair_stats([1.0, 1.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0], shares=torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    assert means("dpo", stats)["logps/chosen_shift"] == pytest.approx(3.0)
    assert means("dpo", replace(stats, shares=None))["logps/chosen_shift"] == pytest.approx(2.0)


def test_weights_are_the_losss_business_and_no_metrics() -> None:
    stats = pair_stats([1.0, 3.0], [0.0, 0.0])
    assert means("dpo", replace(stats, weights=torch.tensor([100.0, 1.0]))) == means("dpo", stats)


def test_a_mixture_shows_each_part_and_the_sum() -> None:
    stats = pair_stats([2.0, -1.0], [-3.0, 1.0])
    config = SimpleNamespace(beta=0.2)
    entry = get_method("dpo+sft", [0.5, 2.0])
    sums = MetricSums()
    sums.add(stats_metrics(entry, stats, entry(stats, config), config, entry.part_losses(stats, config)))
    found = sums.means(sums.stacked())
    assert found["loss/dpo"] == pytest.approx(LOSSES["dpo"](stats, config).mean().item())
    assert found["loss/sft"] == pytest.approx(49.5 / 4)
    assert found["loss"] == pytest.approx(0.5 * found["loss/dpo"] + 2.0 * found["loss/sft"])


# ---- divergence ----


def test_kl_is_exact_where_the_whole_distribution_is_known() -> None:
    stats = pair_stats(
        [1.0], [0.0], k3=torch.tensor([9.0]), chosen_kl=torch.tensor([2.0]), rejected_kl=torch.tensor([4.0])
    )
    assert means("tdpo", stats)["kl"] == pytest.approx(3.0)
    assert means("dpo", replace(stats, chosen_kl=None))["kl"] == pytest.approx(9.0)


def test_k3_of_the_references_own_completions_has_the_divergence_as_its_mean() -> None:
    """Every string of two tokens, with what a policy and a reference say of it: E[k3] is KL(reference || policy)."""
    generator = torch.Generator().manual_seed(4)
    vocabulary = 7

    def model() -> tuple[Tensor, Tensor]:
        """log p(first) and log p(second | first)."""
        first = torch.randn(vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1)
        return first, torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1)

    strings = list(itertools.product(range(vocabulary), repeat=2))
    forest = build_forest([Tree(prompt_ids=[0], completions=[list(one)]) for one in strings], "alone")
    policy, reference = (
        torch.stack([value for i, j in strings for value in (first[i], second[i, j])])
        for first, second in (model(), model())
    )
    values = _completion_values(policy, reference, forest)
    assert values.k3 is not None and values.reference_logps is not None
    assert (values.k3 >= 0).all()
    log_p, log_q = values.reference_logps, values.logps
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close((log_p.exp() * values.k3).sum(), (log_p.exp() * (log_p - log_q)).sum())


# ---- completions with labels ----


def test_numbers_of_labelled_completions_are_those_of_their_class() -> None:
    stats = unpaired_stats([2.0, -4.0, 6.0, 1.0], [True, False, True, False], baseline=torch.tensor(0.5))
    found = means("kto", stats, beta=0.1)
    assert found["rewards/chosen"] == pytest.approx(0.4) and found["rewards/rejected"] == pytest.approx(-0.15)
    assert found["rewards/margins"] == pytest.approx(0.55)
    assert found["rewards/accuracies"] == pytest.approx(0.75)  # the last is above the baseline, and undesirable
    assert (found["lengths/chosen"], found["lengths/rejected"]) == (2.0, 3.0)
    assert (found["logps/chosen_shift"], found["kl/baseline"]) == (4.0, 0.5)


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_class_says_nothing_of_the_other_and_nothing_is_nan(label: bool) -> None:
    found = means("kto", unpaired_stats([2.0, -4.0], [label, label]))
    there, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert found[f"rewards/{there}"] == pytest.approx(-0.1) and f"rewards/{absent}" not in found
    assert "rewards/margins" not in found and all(math.isfinite(value) for value in found.values())


def test_margins_of_a_run_are_between_its_classes_whatever_batch_they_came_in() -> None:
    sums, method = MetricSums(), LOSSES["kto"]
    for ratios, labels in (([3.0, 5.0], [True, True]), ([1.0, -4.0, 0.0], [True, False, False]), ([-8.0], [False])):
        stats = unpaired_stats(ratios, labels)
        sums.add(stats_metrics(method, stats, method(stats, None), None))
    found = sums.means(sums.stacked())
    assert (found["rewards/chosen"], found["rewards/rejected"]) == pytest.approx((0.3, -0.4))
    assert found["rewards/margins"] == pytest.approx(0.7)


def test_a_completion_at_the_baseline_is_half_right() -> None:
    assert means("kto", unpaired_stats([0.0, 0.0, 0.0], [True, False, False]))["rewards/accuracies"] == 0.5


# ---- lists ----


def test_numbers_of_lists_are_those_of_the_best_and_the_last() -> None:
    stats = list_stats(
        [[(4.0, 0), (1.0, 1), (-2.0, 2)], [(0.0, 0), (3.0, 1)]], k3=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    )
    found = means("plackett_luce", stats, beta=0.1)
    assert found["rewards/chosen"] == pytest.approx(0.2) and found["rewards/rejected"] == pytest.approx(0.05)
    assert found["rewards/margins"] == pytest.approx((0.6 - 0.3) / 2)
    assert found["rewards/accuracies"] == pytest.approx(
        (1.0 + 0.0) / 2
    )  # a list counts once, however many pairs it has
    assert (found["lengths/chosen"], found["lengths/rejected"]) == (2.5, 4.0)
    assert (found["logps/chosen_shift"], found["kl"]) == (2.0, 3.0)
    assert found["loss"] == pytest.approx(LOSSES["plackett_luce"](stats, SimpleNamespace(beta=0.1)).mean().item())


def test_ranks_that_tie_are_no_pairs_to_be_right_about() -> None:
    # (4 > 1), (4 > 2): both right; 1 and 2 tie.
    assert means("plackett_luce", list_stats([[(4.0, 0), (1.0, 1), (2.0, 1)]]))["rewards/accuracies"] == 1.0
    # Of the four pairs of different ranks, three are right.
    half = list_stats([[(4.0, 0), (1.0, 0), (2.0, 1), (0.0, 1)]])
    assert means("plackett_luce", half)["rewards/accuracies"] == pytest.approx(0.75)
    assert (
        means("plackett_luce", list_stats([[(4.0, 0), (1.0, 0)]]))["rewards/accuracies"] == 0.5
    )  # nothing to be right about


def test_a_list_whose_rewards_are_equal_is_half_right() -> None:
    assert means("plackett_luce", list_stats([[(0.0, 0), (0.0, 1), (0.0, 2)]]))["rewards/accuracies"] == 0.5


def test_a_list_of_two_is_a_pair() -> None:
    pairs = pair_stats([2.0, -1.0], [-3.0, 1.0], [1.0, 3.0], [2.0, 4.0])
    lists = list_stats([[(2.0, 0), (-3.0, 1)], [(-1.0, 0), (1.0, 1)]])
    assert means("plackett_luce", lists) == pytest.approx(means("dpo", pairs))


# ---- names, sums ----


def batches_of(method: str) -> list[Any]:
    """Batches that one run may meet: usual ones, one class only, ties, a single example, none at all."""
    needs = get_method(method).needs
    if needs is UnpairedStats:
        return [
            unpaired_stats([1.0, -1.0], [True, False]),
            unpaired_stats([1.0], [True]),
            unpaired_stats([1.0], [False]),
            replace(unpaired_stats([1.0], [True]), k3=torch.ones(1)),
            _none_of(unpaired_stats([1.0], [True])),
        ]
    if needs is ListStats:
        return [
            list_stats([[(1.0, 0), (0.0, 1)], [(0.0, 0), (1.0, 1), (2.0, 1)]]),
            list_stats([[(1.0, 0), (0.0, 0)]]),
            replace(_none_of(list_stats([[(1.0, 0), (0.0, 1)]])), lists=0),
        ]
    full = stats_of(method.split("+")[0], hard=False)
    without = (
        {} if get_method(method).needs_reference else {"reference_chosen_logps": None, "reference_rejected_logps": None}
    )
    usual = replace(full, **without)
    return [
        usual,
        replace(usual, k3=torch.ones(len(usual))),
        replace(usual, shares=torch.ones(len(usual))),
        _none_of(usual),
    ]


def _none_of(stats: Any) -> Any:
    """The same statistics of no example, as an idle rank has them."""
    fields = {name: getattr(stats, name) for name in stats.__dataclass_fields__}
    return replace(stats, **{n: v[:0] for n, v in fields.items() if isinstance(v, Tensor) and v.ndim})


@pytest.mark.parametrize("method", [*LOSSES, "dpo+sft", "simpo+sft", "dpo+bco+apo_zero"])
def test_names_and_shapes_are_the_same_for_every_batch_of_a_run(method: str) -> None:
    entry, sums = get_method(method), MetricSums()
    names = []
    for stats in batches_of(method):
        found = stats_metrics(entry, stats, entry(stats, None), None, entry.part_losses(stats, None))
        assert all(
            value.shape == (2,) and not value.requires_grad and value.isfinite().all() for value in found.values()
        )
        names.append(list(found))
        sums.add(found)
    assert all(one == names[0] for one in names) and sums.stacked().shape == (len(names[0]), 2)
    assert all(math.isfinite(value) for value in sums.means(sums.stacked()).values())
    needs_more = {"logps/chosen_shift", "kl"} if entry.needs_reference else set()
    expected = PAIR_NAMES | needs_more | {f"loss/{part.name}" for _, part in entry.parts}
    if entry.needs is UnpairedStats:
        expected = expected - {"rewards/margins"} | {"kl/baseline"}
    assert set(names[0]) == expected


def test_metrics_carry_no_gradient() -> None:
    stats = pair_stats([1.0], [0.0])
    leaf = stats.chosen_logps.clone().requires_grad_()
    stats = replace(stats, chosen_logps=leaf)
    losses = LOSSES["dpo"](stats, None)
    found = stats_metrics(LOSSES["dpo"], stats, losses, None)
    assert losses.requires_grad and not any(value.requires_grad for value in found.values())


def test_a_mean_over_batches_is_one_over_their_pairs() -> None:
    sums, method = MetricSums(), LOSSES["dpo"]
    for ratios in ([1.0, 2.0, 3.0], [10.0]):
        stats = pair_stats(ratios, [0.0] * len(ratios))
        sums.add(stats_metrics(method, stats, method(stats, None), None))
    found = sums.means(sums.stacked())
    assert found["logps/chosen_shift"] == pytest.approx(4.0)
    # Two ranks with the same sums have the same means.
    assert sums.means(2 * sums.stacked()) == pytest.approx(found)


def test_what_nothing_was_counted_of_is_left_out() -> None:
    assert "kl" not in means("dpo", pair_stats([1.0], [0.0]))


def test_sums_of_many_small_numbers_keep_their_digits() -> None:
    sums = MetricSums()
    for _ in range(2000):
        sums.add({"x": torch.tensor([16777217.0 / 3, 1.0])})
    assert sums.means(sums.stacked())["x"] == pytest.approx(torch.tensor(16777217.0 / 3).item(), rel=1e-12)


def test_a_running_mean_is_over_everything_added() -> None:
    mean = RunningMean()
    assert mean.mean() is None
    mean.add(torch.tensor([1.0, 2.0]).requires_grad_())
    mean.add(torch.tensor([6.0]))
    found = mean.mean()
    assert found is not None and found.item() == 3.0 and found.dtype == torch.float32 and not found.requires_grad
