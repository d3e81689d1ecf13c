"""Does every row get another prompt's completion, the same one in every run?"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_engine.data import TokenizedTree
from dpo_engine.data.mismatched import with_mismatched
from dpo_engine.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


def _tree(prompt: list[int], *completions: list[int], **fields: Any) -> TokenizedTree:
    desirable = (True, False)[: len(completions)]
    return TokenizedTree(
        prompt_ids=prompt, completions=completions, **{"origin": f"row {prompt}", "desirable": desirable} | fields
    )


def _trees(prompts: list[int], first: int = 1000) -> list[TokenizedTree]:
    """A row for each, whose completion's first id is all its own."""
    return [_tree([prompt] * 3, [first + number, 5, 6, 7]) for number, prompt in enumerate(prompts)]


def _chosen(trees: list[TokenizedTree]) -> dict[int, int]:
    """First id of a row's own completion -> that of the one it was given."""
    return {tree.completions[0][0]: tree.completions[-1][0] for tree in trees}


def _given_by(trees: list[TokenizedTree], found: list[TokenizedTree]) -> Counter[int]:
    """How often each row gave; every row got from another prompt."""
    prompt_of = {ids[0]: tree.prompt_ids for tree in trees for ids in tree.completions}
    for tree, whole in zip(found, trees, strict=True):
        assert tree.mismatched and tree.completions[:-1] == whole.completions
        assert prompt_of[tree.completions[-1][0]] != tree.prompt_ids
        assert replace(tree, completions=tree.completions[:-1], mismatched=False) == whole
    return Counter(tree.completions[-1][0] for tree in found)


@given(prompts=st.lists(st.integers(0, 5), min_size=2, max_size=40), salt=st.integers(0, 10**6))
def test_each_row_gets_from_another_prompt_and_gives_once_wherever_that_can_be(prompts: list[int], salt: int) -> None:
    trees = _trees(prompts, first=1000 + 100 * salt)
    if len(set(prompts)) < 2:
        with pytest.raises(DataError, match="rows of one and the same prompt"):
            with_mismatched(trees, None)
        return
    given_by = _given_by(trees, with_mismatched(trees, None))
    most = Counter(prompts).most_common(1)[0][1]
    if 2 * most <= len(prompts):
        assert set(given_by.values()) == {1} and len(given_by) == len(trees)
    else:  # the others give in turn
        others = len(prompts) - most
        assert max(given_by.values()) <= -(-most // others) + 1


def test_where_one_prompt_has_most_rows_the_others_give_in_turn() -> None:
    trees = _trees([0] * 90 + [1, 2, 3] * 10)
    given_by = _given_by(trees, with_mismatched(trees, None))
    assert 3 <= max(given_by.values()) <= 4 and len(given_by) > 50


def test_rows_of_many_answers_to_a_prompt_give_once_each() -> None:
    trees = _trees([number // 4 for number in range(2000)])
    assert len(_given_by(trees, with_mismatched(trees, None))) == 2000
    halves = _trees([number % 2 for number in range(1000)])
    assert len(_given_by(halves, with_mismatched(halves, None))) == 1000


def test_the_choice_is_the_same_in_another_process() -> None:
    program = (
        "from dpo_engine.data import TokenizedTree\n"
        "from dpo_engine.data.mismatched import with_mismatched\n"
        "trees = [TokenizedTree(prompt_ids=[n % 7], completions=([n],), origin=str(n)) for n in range(50)]\n"
        "print([tree.completions[-1][0] for tree in with_mismatched(trees, None)])\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    trees = [TokenizedTree(prompt_ids=[n % 7], completions=([n],), origin=str(n)) for n in range(50)]
    assert said == {f"{[tree.completions[-1][0] for tree in with_mismatched(trees, None)]}\n"}


def test_the_order_of_rows_and_their_origins_change_nothing() -> None:
    trees = _trees([number // 3 for number in range(300)])
    before = _chosen(with_mismatched(trees, None))
    shuffled = [replace(tree, origin=f"elsewhere {tree.completions[0][0]}") for tree in trees]
    random.Random(0).shuffle(shuffled)
    found = with_mismatched(shuffled, None)
    assert _chosen(found) == before and [tree.origin for tree in found] == [tree.origin for tree in shuffled]


@pytest.mark.parametrize("each", [1, 4])
def test_rows_that_are_added_change_what_few_others_get(each: int) -> None:
    trees = _trees([number // each for number in range(1000)])
    before = _chosen(with_mismatched(trees, None))
    more = _trees([5000 + number // each for number in range(10)], first=9000)
    after = _chosen(with_mismatched([*more, *trees], None))
    changed = sum(after[row] != given for row, given in before.items())
    assert 0 < changed <= 30  # 10 where the new ones stand, and some where rows had exchanged their givers
    fewer = _chosen(with_mismatched(trees[:-10], None))
    assert sum(before[row] != given for row, given in fewer.items()) <= 30


def test_rows_that_are_the_same_to_the_last_id_are_served() -> None:
    trees = [_tree([1], [1000, 2]), _tree([2], [2000, 2])] * 20
    found = with_mismatched(trees, None)
    assert {(tree.prompt_ids[0], tree.completions[-1][0]) for tree in found} == {(1, 2000), (2, 1000)}


def test_pairs_give_their_chosen_and_their_rejected_completions_in_about_equal_parts() -> None:
    trees = [_tree([n, 1], [1000 + n, 3], [5000 + n, 4]) for n in range(400)]
    found = with_mismatched(trees, None)
    _given_by(trees, found)
    rejected = sum(tree.completions[-1][0] >= 5000 for tree in found)
    assert 150 < rejected < 250
    assert {tree.desirable for tree in found} == {(True, False)}  # of their own completions alone
    assert {len(tree.completions) for tree in found} == {3}


def test_a_completion_is_cut_to_fit_behind_its_new_prompt() -> None:
    trees = [_tree([n] * (3 + n % 5), [1000 + n, *range(2, 2 + n % 6)]) for n in range(60)]
    whole, cut = with_mismatched(trees, None), with_mismatched(trees, 8)
    assert any(len(tree.prompt_ids) + len(tree.completions[-1]) > 8 for tree in whole)
    for tree, uncut in zip(cut, whole, strict=True):
        assert tree.completions[-1] == uncut.completions[-1][: 8 - len(tree.prompt_ids)] != []
        assert tree.scored is None


def test_one_of_which_nothing_scored_would_be_left_is_passed_over() -> None:
    late = [_tree([n, 1, 1], [1000 + n, 2, 3], scored=([False, False, True],)) for n in range(20)]
    early = [_tree([n, 1, 1], [1000 + n, 2, 3], scored=([True, False, True],)) for n in range(20, 22)]
    long = [_tree([n] * 5, [1000 + n]) for n in range(22, 30)]  # which have room for one token
    found = with_mismatched([*late, *early, *long], 6)
    for tree in found:
        masks = tree.scored_masks
        assert any(masks[-1]) and list(map(len, masks)) == list(map(len, tree.completions))
        assert len(tree.prompt_ids) + len(tree.completions[-1]) <= 6
    assert all(tree.completions[-1][0] >= 1020 for tree in found[22:])
    masks = {tuple(tree.scored[-1]) for tree in found[:20] if tree.scored and tree.completions[-1][0] < 1020}
    assert masks == {(False, False, True)}


def test_where_none_fits_the_row_is_named() -> None:
    late = _tree([1], [2, 3], scored=([False, True],))
    full = _tree([1, 2, 3], [4], origin="full.jsonl:2")
    with pytest.raises(
        DataError, match=r"full\.jsonl:2: .*no other prompt's completion has a scored token that fits.*raise max_length"
    ):
        with_mismatched([late, full], 4)


def test_one_prompt_or_one_row_is_refused_with_what_is_needed() -> None:
    message = (
        "{} the baseline takes the answer to another prompt for each row; give rows of at least two different prompts"
    )
    with pytest.raises(DataError, match=message.format("holds 3 rows of one and the same prompt, but")):
        with_mismatched(_trees([1, 1, 1]), None)
    with pytest.raises(DataError, match=message.format("holds 1 row, but")):
        with_mismatched(_trees([1]), None)
    found = with_mismatched(_trees([1, 2]), None)
    with pytest.raises(DataError, match=r"row \[1, 1, 1\] has a mismatched completion already"):
        with_mismatched(found, None)


def test_sums_that_the_data_brings_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    trees = _trees([1, 2, 3, 4])
    trees[1] = replace(trees[1], reference_logps=(-3.0,))
    trees[2] = replace(trees[2], reference_logps=(-4.0,))
    with caplog.at_level(logging.WARNING, logger="dpo_engine.data.mismatched"):
        found = with_mismatched(trees, None)
    assert {tree.reference_logps for tree in found} == {None}
    assert [record.getMessage()[:52] for record in caplog.records] == [
        "2 rows bring log-probs of the reference, but none of"
    ]
    caplog.clear()
    with_mismatched(_trees([1, 2]), None)
    assert not caplog.records
