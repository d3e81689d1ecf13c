"""Whatever the lengths, does truncation keep what it promises?"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dpo_engine.data import TokenizedTree
from dpo_engine.data.truncation import TRUNCATIONS, truncate_tree
from dpo_engine.errors import DataError


@st.composite
def trees(draw: st.DrawFn) -> TokenizedTree:
    """A tree whose ids are all different, so that what was kept can be found again."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=3, max_size=5))
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    prompt, *completions = (list(range(start, start + n)) for start, n in zip(starts, lengths, strict=True))
    return TokenizedTree(prompt_ids=prompt, completions=tuple(completions), origin="row 1")


def _longest(tree: TokenizedTree) -> int:
    return len(tree.prompt_ids) + max(map(len, tree.completions))


@given(tree=trees(), max_length=st.none() | st.integers(2, 26), truncation=st.sampled_from(TRUNCATIONS))
def test_a_tree_that_fits_is_untouched_and_another_is_cut_left_out_or_an_error(
    tree: TokenizedTree, max_length: int | None, truncation: str
) -> None:
    fits = max_length is None or _longest(tree) <= max_length
    try:
        cut = truncate_tree(tree, max_length, truncation)
    except DataError:
        assert truncation == "error" and not fits
        return
    if fits:
        assert cut is tree
        return
    assert max_length is not None and truncation != "error"
    lost = truncation == "drop" or (truncation == "keep_start" and len(tree.prompt_ids) >= max_length)
    assert (cut is None) == lost
    if cut is not None:
        assert _longest(cut) == max_length  # not longer, and nothing cut without need


@given(tree=trees(), max_length=st.integers(2, 26), truncation=st.sampled_from(["keep_start", "keep_end"]))
def test_what_is_kept_is_one_shared_prompt_and_a_contiguous_part_of_every_sequence(
    tree: TokenizedTree, max_length: int, truncation: str
) -> None:
    cut = truncate_tree(tree, max_length, truncation)
    if cut is None:
        return
    assert cut.prompt_ids and cut.prompt_ids[-1] == tree.prompt_ids[-1]
    assert tree.prompt_ids[len(tree.prompt_ids) - len(cut.prompt_ids) :] == cut.prompt_ids
    assert len(cut.completions) == len(tree.completions) and cut.origin == tree.origin
    for kept, whole in zip(cut.completions, tree.completions, strict=True):
        assert kept and whole[: len(kept)] == kept
        sequence, original = cut.prompt_ids + kept, tree.prompt_ids + whole
        start = original.index(sequence[0])
        assert original[start : start + len(sequence)] == sequence


@given(tree=trees(), max_length=st.integers(2, 26))
def test_keep_start_keeps_the_first_tokens_of_each_sequence(tree: TokenizedTree, max_length: int) -> None:
    cut = truncate_tree(tree, max_length, "keep_start")
    if cut is not None:
        for kept, whole in zip(cut.completions, tree.completions, strict=True):
            assert cut.prompt_ids + kept == (tree.prompt_ids + whole)[:max_length]


@given(tree=trees(), max_length=st.integers(2, 26))
def test_keep_end_cuts_completions_only_when_one_prompt_token_is_left(tree: TokenizedTree, max_length: int) -> None:
    cut = truncate_tree(tree, max_length, "keep_end")
    assert cut is not None
    if cut.completions != tree.completions:
        assert len(cut.prompt_ids) == 1
        assert cut.completions == tuple(completion[: max_length - 1] for completion in tree.completions)
