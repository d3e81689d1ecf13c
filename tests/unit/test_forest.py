"""Does a forest say exactly which hidden row predicts which token for whom?"""

import pytest
import torch

from dpo_engine.batch import ForestCollator, build_forest, pack_trees, sum_by_completion, tree_cost
from dpo_engine.data import TokenizedTree


def tree(prompt: list[int], *completions: list[int]) -> TokenizedTree:
    return TokenizedTree(prompt_ids=prompt, completions=completions, origin="row 1")


TREES = [tree([1, 2, 3], [4, 5], [6, 7, 8, 9]), tree([10], [11], [12, 13]), tree([0, 0], [0, 0, 0], [0])]


def test_every_scored_token_is_predicted_by_the_row_of_the_token_before_it() -> None:
    forest = build_forest(TREES)
    # Where each row of each sheet begins among all hidden rows, and what it holds.
    begins, offset = {}, 0
    for sheet in forest.input_ids:
        for row in sheet.tolist():
            begins[offset] = row
            offset += len(row)
    completions = [(t.prompt_ids, c) for t in TREES for c in t.completions]
    start, used = 0, set()
    for index, (prompt, completion) in enumerate(completions):
        span = slice(start, start + len(completion))
        assert forest.labels[span].tolist() == completion
        assert forest.completion_ids[span].tolist() == [index] * len(completion)
        for position, source in enumerate(forest.score_from[span].tolist()):
            begin = max(b for b in begins if b <= source)
            used.add(begin)
            # Everything from the row's start up to the predicting token is the sequence itself.
            assert begins[begin][: source - begin + 1] == [*prompt, *completion[:position]]
        start += len(completion)
    assert start == len(forest.labels) == len(forest.score_from)
    assert len(used) == len(completions) == len(begins)


def test_at_most_an_eighth_of_a_row_is_padding() -> None:
    trees = [tree([1] * p, [2] * (p % 7 + 1), [3] * (3 * p % 11 + 1)) for p in range(1, 60)]
    forest = build_forest(trees)
    assert forest.tokens <= sum(sheet.numel() for sheet in forest.input_ids) <= forest.tokens * 8 / 7


def test_the_forest_counts_trees_completions_and_tokens() -> None:
    forest = build_forest(TREES)
    assert forest.trees == 3
    assert forest.tree_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert forest.lengths == (2, 4, 1, 2, 3, 1)
    # The last token of a completion is a label, never an input.
    assert forest.tokens == (3 + 1) + (3 + 3) + (1 + 0) + (1 + 1) + (2 + 2) + (2 + 0)


def test_sum_by_completion_adds_up_what_completion_ids_say() -> None:
    forest = build_forest(TREES)
    values = torch.randn(len(forest.labels), dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64).index_add(0, forest.completion_ids, values)
    torch.testing.assert_close(sum_by_completion(values, forest.lengths), expected)


@pytest.mark.parametrize("bad", [tree([], [1], [2]), tree([1], [], [2])])
def test_an_empty_prompt_or_completion_is_refused(bad: TokenizedTree) -> None:
    with pytest.raises(ValueError, match=r"tree 1 has .* expected at least one token in each"):
        build_forest([TREES[0], bad])


def test_no_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="no trees"):
        build_forest([])


def test_packing_keeps_every_tree_once_and_every_forest_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    trees = [
        tree([1] * int(p), [2] * int(a), [3] * int(b))
        for p, a, b in torch.randint(1, 40, (50, 3), generator=generator).tolist()
    ]
    forests = pack_trees(trees, max_tokens=300)
    assert sorted(id(t) for members in forests for t in members) == sorted(map(id, trees))
    for members in forests:
        assert build_forest(members).tokens <= 300
    assert len(forests) < len(trees) / 2


def test_a_tree_over_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ValueError, match=rf"a tree of {tree_cost(TREES[0])} tokens does not fit max_tokens_per_forest=5"
    ):
        pack_trees(TREES, max_tokens=5)


def test_the_collator_gives_the_same_batch_on_every_call() -> None:
    first, second = (ForestCollator(12)(TREES) for _ in range(2))
    assert first.trees == 3 and len(first.forests) == len(second.forests) > 1
    for a, b in zip(first.forests, second.forests, strict=True):
        assert all(map(torch.equal, a.input_ids, b.input_ids)) and torch.equal(a.score_from, b.score_from)
