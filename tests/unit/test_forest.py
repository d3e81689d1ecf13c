"""Does a forest say exactly which hidden row predicts which token for whom?"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dpo_engine.batch import (
    LAYOUTS,
    ForestCollator,
    PreferenceForest,
    build_forest,
    pack_trees,
    packed_cost,
    sum_by_completion,
    tree_cost,
)
from dpo_engine.batch.packing import is_long
from dpo_engine.data import TokenizedTree


def tree(prompt: list[int], *completions: list[int]) -> TokenizedTree:
    return TokenizedTree(prompt_ids=prompt, completions=completions, origin="row 1")


TREES = [tree([1, 2, 3], [4, 5], [6, 7, 8, 9]), tree([10], [11], [12, 13]), tree([0, 0], [0, 0, 0], [0])]


def seen_from(forest: PreferenceForest, row: int) -> list[int]:
    """The token ids that hidden row `row` may depend on, in order of position, its own token last."""
    if forest.shape is None:
        for sheet in forest.input_ids:
            if row < sheet.numel():
                index, column = divmod(row, sheet.shape[1])
                return sheet[index, : column + 1].tolist()
            row -= sheet.numel()
        raise AssertionError("a hidden row past the last sheet")
    ids, positions, branches = forest.input_ids[0][0], forest.shape.position_ids[0], forest.shape.branches
    first, last = next(span for span in forest.shape.spans if span[0] <= row < span[1])
    seen = [k for k in range(first, last) if positions[k] <= positions[row] and branches[k] in (-1, branches[row])]
    assert [int(positions[k]) for k in seen] == list(range(len(seen))), "positions are not 0, 1, 2, ... along a path"
    assert seen[-1] == row
    return ids[seen].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scored_token_is_predicted_from_its_own_prompt_and_completion_alone(layout: str) -> None:
    forest = build_forest(TREES, layout)
    completions = [(t.prompt_ids, c) for t in TREES for c in t.completions]
    start = 0
    for index, (prompt, completion) in enumerate(completions):
        span = slice(start, start + len(completion))
        assert forest.labels[span].tolist() == completion
        assert forest.completion_ids[span].tolist() == [index] * len(completion)
        for position, source in enumerate(forest.score_from[span].tolist()):
            assert seen_from(forest, source) == [*prompt, *completion[:position]]
        start += len(completion)
    assert start == len(forest.labels) == len(forest.score_from)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_tokens_that_a_mask_names_are_scored(layout: str) -> None:
    """Two assistant turns with a user's between them."""

    class Masked:
        prompt_ids = (1, 2)
        completions = ((3, 4, 5, 6, 7), (8, 9))
        scored = ((True, True, False, False, True), (False, True))

    forest = build_forest([TREES[0], Masked()], layout)
    assert forest.lengths == (2, 4, 3, 1)
    assert forest.labels[6:].tolist() == [3, 4, 7, 9]
    wanted = [[1, 2], [1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 8]]
    assert [seen_from(forest, row) for row in forest.score_from[6:].tolist()] == wanted


@pytest.mark.parametrize("mask", [((True,), (True, True)), ((False, False), (True, True))])
def test_a_mask_that_does_not_fit_or_scores_nothing_is_refused(mask: tuple) -> None:
    class Masked:
        prompt_ids = (1, 2)
        completions = ((3, 4), (8, 9))
        scored = mask

    with pytest.raises(
        ValueError, match=r"tree 0 has a completion of 2 tokens with a mask of .*expected one entry a token"
    ):
        build_forest([Masked()])


def test_a_shared_prompt_stands_once() -> None:
    forest = build_forest(TREES)
    assert forest.input_ids[0].tolist() == [[1, 2, 3, 4, 6, 7, 8, 10, 12, 0, 0, 0, 0]]
    assert forest.shape is not None
    assert forest.shape.spans == ((0, 7), (7, 9), (9, 13))


def test_sequences_that_must_be_alone_have_a_sheet_each() -> None:
    assert [tuple(sheet.shape) for sheet in build_forest([TREES[1]], "alone").input_ids] == [(1, 3), (1, 2)]


def test_at_most_an_eighth_of_a_row_is_padding() -> None:
    trees = [tree([1] * p, [2] * (p % 7 + 1), [3] * (3 * p % 11 + 1)) for p in range(1, 60)]
    forest = build_forest(trees, "padded")
    assert forest.tokens <= sum(sheet.numel() for sheet in forest.input_ids) <= forest.tokens * 8 / 7


def test_rows_of_nearly_one_length_share_a_sheet_and_are_padded_on_the_right() -> None:
    """On the left a row would begin at another position than its own, without position ids that say so."""
    forest = build_forest([tree(range(1, 18), [20, 21, 22, 23], [30, 31, 32])], "padded")
    (sheet,) = forest.input_ids
    assert sheet.tolist() == [[*range(1, 18), 20, 21, 22], [*range(1, 18), 30, 31, 0]]
    assert forest.labels.tolist() == [20, 21, 22, 23, 30, 31, 32]
    assert sheet.flatten()[forest.score_from].tolist() == [17, 20, 21, 22, 17, 30, 31]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_forest_counts_trees_completions_and_tokens(layout: str) -> None:
    forest = build_forest(TREES, layout)
    assert forest.trees == 3
    assert forest.tree_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert forest.lengths == (2, 4, 1, 2, 3, 1)
    # The last token of a completion is a label and no input, but where the length of a row matters.
    again = 0 if layout == "shared" else 3 + 1 + 2
    last = 6 if layout == "alone" else 0
    assert forest.tokens == (3 + 1 + 3) + (1 + 0 + 1) + (2 + 2 + 0) + again + last


def test_sum_by_completion_adds_up_what_completion_ids_say() -> None:
    forest = build_forest(TREES)
    values = torch.randn(len(forest.labels), dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64).index_add(0, forest.completion_ids, values)
    torch.testing.assert_close(sum_by_completion(values, forest.lengths), expected)


@pytest.mark.parametrize("bad", [tree([], [1], [2]), tree([1], [], [2]), tree([1])])
def test_an_empty_prompt_or_completion_is_refused(bad: TokenizedTree) -> None:
    with pytest.raises(ValueError, match=r"tree 1 has .* expected at least one token in each"):
        build_forest([TREES[0], bad])


def test_no_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="no trees"):
        build_forest([])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_keeps_every_tree_once_and_every_forest_within_the_budget(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    trees = [
        tree([1] * int(p), [2] * int(a), [3] * int(b))
        for p, a, b in torch.randint(1, 40, (50, 3), generator=generator).tolist()
    ]
    forests = pack_trees(trees, max_tokens=300, layout=layout)
    assert sorted(id(t) for members in forests for t in members) == sorted(map(id, trees))
    for members in forests:
        assert build_forest(members, layout).tokens <= 300
    assert len(forests) < len(trees) / 2


def lengths_of_trees(count: int, most: int) -> list[TokenizedTree]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(1, most, (count, 3), generator=generator).tolist()
    return [tree([1] * p, [2] * a, [3] * b) for p, a, b in drawn]


@pytest.mark.parametrize("longest", [None, 30])
def test_each_tree_goes_into_the_first_forest_with_room_the_largest_first(longest: int | None) -> None:
    trees = lengths_of_trees(300, 25)
    by_definition: list[tuple[int, list[TokenizedTree]]] = []  # (room, members)
    for member in sorted(trees, key=lambda t: packed_cost(t, "shared", longest), reverse=True):
        cost = packed_cost(member, "shared", longest)
        alone = is_long(member, longest)
        place = next((i for i, (room, _) in enumerate(by_definition) if room >= cost and not alone), None)
        if place is None:
            by_definition.append((0 if alone else 200 - cost, [member]))
        else:
            room, members = by_definition[place]
            by_definition[place] = (room - cost, [*members, member])
    found = pack_trees(trees, 200, "shared", longest)
    assert [list(map(id, members)) for members in found] == [list(map(id, members)) for _, members in by_definition]


class CountedRoom(int):
    """Tokens that are left in a forest; counts how often that is asked."""

    asked = 0

    def __sub__(self, cost: int) -> "CountedRoom":
        return CountedRoom(int(self) - cost)

    def __lt__(self, cost: int) -> bool:
        CountedRoom.asked += 1
        return int(self) < cost

    def __ge__(self, cost: int) -> bool:
        return not self < cost


def test_ten_times_the_trees_take_ten_times_the_looking() -> None:
    asked = []
    for count in (400, 4000):
        CountedRoom.asked = 0
        pack_trees(lengths_of_trees(count, 5), CountedRoom(64))
        asked.append(CountedRoom.asked)
    assert asked[1] < 12 * asked[0]  # looking at every forest for every tree: 90 times


def test_a_tree_over_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ValueError, match=rf"a tree of {tree_cost(TREES[0])} tokens does not fit max_tokens_per_forest=5"
    ):
        pack_trees(TREES, max_tokens=5)


def test_trees_past_the_longest_are_laid_out_alone() -> None:
    batch = ForestCollator(1000, "shared", longest=5)(TREES)
    layouts = {forest.layout: forest for forest in batch.forests}
    assert layouts.keys() == {"shared", "alone"}
    assert layouts["alone"].trees == 1 and layouts["alone"].lengths == (2, 4)  # 3 + 4 - 1 tokens


def test_the_collator_gives_the_same_batch_on_every_call() -> None:
    first, second = (ForestCollator(12)(TREES) for _ in range(2))
    assert first.trees == 3 and len(first.forests) == len(second.forests) > 1
    for a, b in zip(first.forests, second.forests, strict=True):
        assert all(map(torch.equal, a.input_ids, b.input_ids)) and torch.equal(a.score_from, b.score_from)


@dataclass
class WeightedTree:
    prompt_ids: list[int]
    completions: list[list[int]]
    scored: list[list[bool]] | None = None
    token_weights: list[list[float]] | None = None
    completion_weights: list[float] | None = None


def test_weights_follow_their_tokens_and_completions_and_are_one_where_none_are_given() -> None:
    weighted = WeightedTree(
        [1, 2], [[3, 4, 5], [6, 7]], [[True, False, True], [True, True]], [[0.5, 9.0, 2.0], [1.0, 3.0]], [0.25, 4.0]
    )
    forest = build_forest([tree([8], [9], [9, 9]), weighted])
    assert forest.token_weights is not None and forest.completion_weights is not None
    assert forest.token_weights.tolist() == [1.0, 1.0, 1.0, 0.5, 2.0, 1.0, 3.0]
    assert forest.completion_weights.tolist() == [1.0, 1.0, 0.25, 4.0]
    logps = torch.arange(7.0)
    assert sum_by_completion(logps, forest.lengths, forest.token_weights).tolist() == [0.0, 3.0, 9.5, 23.0]
    plain = build_forest(TREES)
    assert plain.token_weights is None and plain.completion_weights is None


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"token_weights": [[1.0], [1.0]]}, "2 tokens with 1 token_weights; expected one a token"),
        ({"token_weights": [[1.0, 1.0]]}, "2 completions and 1 token_weights; expected as many"),
        ({"completion_weights": [1.0]}, "2 completions and 1 completion_weights; expected as many"),
        ({"scored": [[True, True]]}, "2 completions and 1 scored; expected as many"),
    ],
)
def test_weights_and_masks_of_another_shape_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_forest([WeightedTree([1], [[2, 3], [4]], **changes)])
