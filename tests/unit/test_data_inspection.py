"""Is what `dpo-engine inspect` predicts from lengths what forests and rectangles really take?"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_engine.batch import ForestCollator
from dpo_engine.data import DataReport, PairData, PreferenceRow, TokenizedTree
from dpo_engine.data.inspection import (
    LAYOUTS,
    LayoutCost,
    ModelCost,
    inspect_pairs,
    length_stats,
    suggested_weights,
    training_order,
)
from dpo_engine.data.mismatched import with_mismatched
from dpo_engine.errors import ConfigError
from support.tiny_pairs import random_pairs

MODEL = ModelCost(per_token=100, per_attended=7, per_scored=1000)


def _pairs(*lengths: tuple[int, int, int]) -> PairData:
    """Pairs with prompts, chosen and rejected completions of these lengths; prompts of one length are the same."""
    trees = [
        TokenizedTree(prompt_ids=[1] * p, completions=([2] * c, [3] * r), origin=f"row {number}")
        for number, (p, c, r) in enumerate(lengths, start=1)
    ]
    rows = [PreferenceRow(prompt="p", completions=("c", "r"), origin=tree.origin) for tree in trees]
    report = DataReport(source="here", format="ids", rows_read=len(trees), rows_used=len(trees))
    return PairData(trees=trees, rows=rows, report=report)


@pytest.mark.parametrize(("count", "batch_size"), [(23, 4), (5, 8), (16, 1)])
def test_predicted_tokens_are_those_of_forests_and_rectangles_that_are_really_built(
    count: int, batch_size: int
) -> None:
    data = random_pairs(count, seed=count, longest=40)
    found = inspect_pairs(data, batch_size=batch_size, seed=3)
    shuffled = [data[index] for index in training_order(count, 3)]
    batches = [shuffled[start : start + batch_size] for start in range(0, count, batch_size)]
    for layout in ("shared", "packed"):
        forests = [forest for batch in batches for forest in ForestCollator(300, layout)(batch).forests]
        assert found.layouts[layout].tokens == sum(forest.tokens for forest in forests)
        stretches = [stretch for forest in forests for stretch in forest.shape.stretches]
        attended = sum((last - first) * (end - prompt + last - first) for prompt, end, first, last in stretches)
        assert found.layouts[layout].attended == attended
        assert found.scored_tokens == sum(len(forest.labels) for forest in forests)
    rectangles = [
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor([*tree.prompt_ids, *ids]) for tree in batch for ids in tree.completions],
            batch_first=True,
            padding_value=-1,
        )
        for batch in batches
    ]
    assert found.layouts["padded"].tokens == sum(rectangle.numel() for rectangle in rectangles)
    assert found.layouts["padded"].attended == sum(r.shape[0] * r.shape[1] ** 2 for r in rectangles)
    padding = sum(int((rectangle == -1).sum()) for rectangle in rectangles)
    assert found.padding == pytest.approx(padding / found.layouts["padded"].tokens)


@pytest.mark.slow  # importing TRL is
def test_a_predicted_rectangle_is_the_one_that_trl_builds() -> None:
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    data = random_pairs(11, seed=5, longest=30)
    rows = [
        {"prompt_ids": tree.prompt_ids, "chosen_ids": tree.completions[0], "rejected_ids": tree.completions[1]}
        for tree in (data[index] for index in training_order(11, 42))
    ]
    collate = DataCollatorForPreference(pad_token_id=0)
    built = sum(collate(rows[start : start + 4])["input_ids"].numel() for start in range(0, 11, 4))
    assert inspect_pairs(data, batch_size=4, seed=42).layouts["padded"].tokens == built


def test_shares_and_speeds_are_those_of_a_sum_by_hand() -> None:
    found = inspect_pairs(_pairs((4, 2, 3), (1, 2, 2)), batch_size=2, seed=0)
    assert found.layouts == {
        "padded": LayoutCost(tokens=28, attended=4 * 49),  # 4 rows as wide as 4 + 3
        "packed": LayoutCost(tokens=5 + 6 + 2 + 2, attended=25 + 36 + 4 + 4),
        "shared": LayoutCost(tokens=7 + 3, attended=5 * 5 + 2 * 6 + 2 * 2 + 1 * 2),
    }
    assert found.prompt_share == 10 / 19 and found.scored_tokens == 9
    assert found.padding == pytest.approx(1 - 19 / 28) and found.saved("shared") == pytest.approx(1 - 10 / 28)
    assert found.arithmetic("shared", MODEL) == 100 * 10 + 7 * 43 + 1000 * 9
    padded, packed = 100 * 28 + 7 * 196 + 9000, 100 * 15 + 7 * 69 + 9000
    assert found.speed("packed", "padded", MODEL) == padded / packed


def test_prompts_that_several_pairs_have_are_counted() -> None:
    found = inspect_pairs(
        _pairs((4, 1, 2), (5, 1, 2), (4, 2, 3), (6, 1, 1), (4, 3, 3), (5, 2, 2)), batch_size=8, seed=0
    )
    assert (found.repeated_prompts, found.pairs_with_repeated_prompts) == (2, 5)
    assert "2 prompts occur in more than one pair, in 5 pairs together" in list(found.lines(MODEL))
    other = inspect_pairs(_pairs((4, 1, 2), (5, 1, 2)), batch_size=8, seed=0)
    assert other.repeated_prompts == 0 and not any("occur" in line for line in other.lines(MODEL))


@given(lengths=st.lists(st.integers(0, 5000) | st.integers(0, 30), min_size=1, max_size=60))
def test_every_length_is_in_exactly_one_bar(lengths: list[int]) -> None:
    stats = length_stats(lengths)
    assert sum(count for *_, count in stats.histogram) == len(lengths)
    for (_, end, _), (begin, _, _) in zip(stats.histogram, stats.histogram[1:], strict=False):
        assert begin == end + 1
    for first, last, count in stats.histogram:
        assert count == sum(first <= length <= last for length in lengths)
    assert len(stats.histogram) <= 13
    assert (stats.least, stats.most) == (min(lengths), max(lengths))
    assert sum(length <= stats.p95 for length in lengths) >= 0.95 * len(lengths)
    assert stats.p95 == stats.least or sum(length < stats.p95 for length in lengths) < 0.95 * len(lengths)


def test_the_numbers_are_plain_json_and_the_lines_hold_them() -> None:
    found = inspect_pairs(_pairs((4, 2, 3), (1, 2, 2)), batch_size=2, seed=0)
    numbers = json.loads(json.dumps(found.numbers(MODEL)))
    assert set(numbers["predicted_speed"]) == {"packed_over_padded", "shared_over_packed", "shared_over_padded"}
    assert numbers["lengths"]["rejected"]["histogram"] == [
        {"from": 2, "to": 2, "count": 1},
        {"from": 3, "to": 3, "count": 1},
    ]
    text = "\n".join(found.lines(MODEL))
    for layout, name in LAYOUTS.items():
        assert f"  {name:<14}{numbers['layouts'][layout]['tokens']:>13,}  " in text
    assert "rectangles of 4 rows (2 pairs), as today's trainers; 32.1% padding" in text
    assert f"{found.speed('shared', 'padded', MODEL):.2f} x padded" in text


def test_a_batch_of_no_pairs_is_refused() -> None:
    with pytest.raises(ConfigError, match="per_device_train_batch_size=0 is out of range; expected at least 1"):
        inspect_pairs(_pairs((1, 1, 2)), batch_size=0, seed=0)


@given(good=st.integers(1, 10**7), bad=st.integers(1, 10**7))
def test_suggested_weights_even_out_the_classes_within_the_bounds_and_leave_the_larger_alone(
    good: int, bad: int
) -> None:
    desirable, undesirable = suggested_weights(good, bad)
    ratio = desirable * good / (undesirable * bad)
    assert 1 <= ratio <= 1 + 1e-12
    assert (desirable if good >= bad else undesirable) == 1.0 and min(desirable, undesirable) == 1.0


def test_without_one_of_the_classes_there_is_nothing_to_even_out() -> None:
    assert suggested_weights(5, 0) == suggested_weights(0, 5) == suggested_weights(7, 7) == (1.0, 1.0)
    assert suggested_weights(100, 25) == (1.0, 4.0) and suggested_weights(25, 100) == (4.0, 1.0)


def _labelled(good: int, bad: int) -> PairData:
    trees = [
        TokenizedTree(
            prompt_ids=[n, 1], completions=([2] * (3 if n < good else 5),), origin=f"row {n}", desirable=(n < good,)
        )
        for n in range(good + bad)
    ]
    rows = [
        PreferenceRow(prompt="p", completions=("c",), origin=tree.origin, desirable=tree.desirable) for tree in trees
    ]
    report = DataReport(source="here", format="ids", rows_read=len(trees), rows_used=len(trees))
    return PairData(trees=trees, rows=rows, report=report)


def test_labelled_completions_are_counted_by_class_with_weights_that_can_be_copied() -> None:
    data = _labelled(3, 7)
    found = inspect_pairs(data, batch_size=2, seed=0)
    assert set(found.lengths) == {"prompt", "desirable", "undesirable"}
    assert (found.lengths["desirable"].mean, found.lengths["undesirable"].mean) == (3, 5)
    text = "\n".join(found.lines(MODEL))
    assert "3 completions are desirable, 7 undesirable" in text
    # rounded up, or the ratio would be below 1
    assert (
        "desirable_weight 2.334, undesirable_weight 1 (KTO asks for desirable_weight · 3 / (undesirable_weight · 7)"
        in text
    )
    numbers = json.loads(json.dumps(found.numbers(MODEL)))
    assert numbers["labels"]["desirable"] == 3 and numbers["lists"] is None
    assert numbers["labels"]["desirable_weight"] == pytest.approx(7 / 3)
    with_baseline = replace(data, trees=with_mismatched(data.trees, None))
    trained = inspect_pairs(with_baseline, batch_size=2, seed=0)
    assert trained.lengths == found.lengths and trained.labels == found.labels
    assert trained.scored_tokens == 2 * found.scored_tokens  # every completion is lent once
    assert trained.layouts["packed"].tokens == 2 * found.layouts["packed"].tokens
    assert set(inspect_pairs(_labelled(2, 0), batch_size=1, seed=0).lengths) == {"prompt", "desirable"}


def test_ranked_lists_are_counted_by_their_length_and_ties() -> None:
    lists = [(0, 1), (0, 1, 1), (0, 0, 1), (0, 1, 2)]
    trees = [
        TokenizedTree(
            prompt_ids=[1, 2], completions=tuple([9] * (n + 1) for n in range(len(ranks))), origin="row", ranks=ranks
        )
        for ranks in lists
    ]
    rows = [PreferenceRow(prompt="p", completions=("c",) * len(ranks), origin="row", ranks=ranks) for ranks in lists]
    report = DataReport(source="here", format="ids", rows_read=4, rows_used=4)
    found = inspect_pairs(PairData(trees=trees, rows=rows, report=report), batch_size=2, seed=0)
    assert found.lists is not None and found.lists.completions == {2: 1, 3: 3} and found.lists.with_ties == 2
    assert found.lengths["best"].most == 1 and (found.lengths["others"].least, found.lengths["others"].most) == (2, 3)
    text = "\n".join(found.lines(MODEL))
    assert "completions in a list: 1 of 2, 3 of 3; 2 with ties" in text and "one epoch of 4 lists" in text
    assert found.layouts["shared"].tokens == sum(2 + sum(range(len(ranks))) for ranks in lists)
