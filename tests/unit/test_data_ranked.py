"""Are lists of rated completions read in the order that their numbers mean?"""

from __future__ import annotations

from typing import Any

import pytest

from dpo_engine.data import PairData, TokenizedTree, check_source, detect_format, load_row, tokenize_pairs
from dpo_engine.data.formats import preference_row
from dpo_engine.data.records import PreferenceRow, SourceRow
from dpo_engine.data.streaming import PairStream
from dpo_engine.data.truncation import bound_tree, truncate_tree
from dpo_engine.errors import DataError
from support import small_tokenizers as small
from support.small_tokenizers import small_tokenizer

USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {"role": "tool", "content": "42"}
HH = "\n\nHuman: hi there\n\nAssistant: "


def _says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _tokens(rows: list[dict[str, Any]], template: str | None = None, **options: Any) -> PairData:
    options = {"max_length": None, "method": "plackett_luce", "kind": "ranked"} | options
    return tokenize_pairs(rows, small_tokenizer(chat_template=template), **options)


def _accounted(data: PairData) -> bool:
    report = data.report
    return report.rows_read == report.rows_used + sum(report.rows_left_out.values()) and report.rows_used == len(data)


ULTRA = {
    "source": "evol_instruct",
    "instruction": "q",
    "models": ["one", "two", "three"],
    "completions": [
        {"model": "one", "principle": "honesty", "response": "b", "overall_score": 6.5, "fine-grained_score": 1},
        {"model": "two", "principle": "honesty", "response": "a", "overall_score": 8, "fine-grained_score": 0},
        {"model": "three", "principle": "honesty", "response": "c", "overall_score": 6.5, "fine-grained_score": 9},
    ],
}
NECTAR = {
    "prompt": HH,
    "answers": [
        {"answer": "c", "model": "one", "rank": 3.0},
        {"answer": "a", "model": "two", "rank": 1.0},
        {"answer": "b", "model": "three", "rank": 2.0},
    ],
    "turns": 1,
}
SHAPES: dict[str, tuple[dict[str, Any], str, Any, tuple[Any, ...], tuple[int, ...]]] = {
    "UltraFeedback": (
        ULTRA,
        "ranked lists by overall_score in completions (higher is better): instruction, completions "
        "(ignored: source, models)",
        "q", ("a", "b", "c"), (0, 1, 1),
    ),
    "Nectar": (
        NECTAR,
        "transcripts with ranked lists by rank in answers (lower is better): prompt, answers (ignored: turns)",
        HH, ("a", "b", "c"), (0, 1, 2),
    ),
    "scores beside texts": (
        {"prompt": "q", "responses": ["b", "a", "c"], "scores": [0.5, 2, -1]},
        "ranked lists by scores (higher is better): prompt, responses, scores",
        "q", ("a", "b", "c"), (0, 1, 2),
    ),
    "ranks beside texts": (
        {"prompt": "q", "generations": ["b", "a", "c", "d"], "rankings": [2, 1, 2, 7], "system": "be brief"},
        "ranked lists by rankings (lower is better): prompt, generations, rankings, system",
        [SYSTEM, USER], ("a", "b", "c", "d"), (0, 1, 1, 2),
    ),
    "messages": (
        {"prompt": [USER], "completions": [[_says("b")], [_says("a"), TOOL, _says("a")]], "ratings": [1, 5]},
        "ranked lists by ratings (higher is better): prompt, completions, ratings",
        [USER], ([_says("a"), TOOL, _says("a")], [_says("b")]), (0, 1),
    ),
    "messages in objects": (
        {"prompt": "q", "completions": [{"content": [_says("b")], "score": 1}, {"content": "a", "score": 2}]},
        "ranked lists by score in completions (higher is better): prompt, completions",
        [USER], ([_says("a")], [_says("b")]), (0, 1),
    ),
    "one message each": (
        {"prompt": "q", "answers": [_says("b") | {"rating": 1}, _says("a") | {"rating": 3}], "scores": [9, 0]},
        "ranked lists by rating in answers (higher is better): prompt, answers (ignored: scores)",
        [USER], ([_says("a")], [_says("b")]), (0, 1),
    ),
    "instruction with input": (
        {"instruction": "do", "input": "this", "completions": ["a", "b"], "ranks": [0, 1]},
        "ranked lists by ranks (lower is better): instruction, completions, ranks, input",
        "do\nthis", ("a", "b"), (0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "line", "prompt", "completions", "ranks"), SHAPES.values(), ids=SHAPES)
def test_a_shape_says_which_numbers_were_read_and_is_sorted_by_them(
    row: dict, line: str, prompt: Any, completions: Any, ranks: Any
) -> None:
    found = detect_format([row])
    assert (str(found), found.kind) == (line, "ranked")
    for kind in ("ranked", "pairs"):
        read = preference_row(found, SourceRow(origin="row 1", columns=row), kind)
        assert read == PreferenceRow(prompt=prompt, completions=completions, ranks=ranks, origin="row 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1, float("nan"), 2]}, "NaN|finite"),
        ({"scores": [1, None, 2]}, r"scores\[1\] must be a finite number, found null"),
        ({"scores": [1, True, 2]}, r"scores\[1\] must be a finite number, found True"),
        ({"scores": [1, "2", 2]}, r"scores\[1\] must be a finite number, found '2'"),
        ({"scores": [1, 2]}, "column 'scores' must be a list of 3 numbers, one for each of 'completions', found 2"),
        ({"scores": 3}, "column 'scores' must be a list of 3 numbers, .* found number"),
        ({"completions": "a"}, "column 'completions' must be a list of completions, found text"),
        ({"completions": ["a", 3, "b"]}, r"column 'completions\[1\]' must be text or messages, found number"),
        (
            {"completions": ["a", {"model": "x"}, "b"]},
            r"completions\[1\] holds model; expected its text in one of text,",
        ),
        ({"prompt": None}, "column 'prompt' must be text or messages, found null"),
    ],
)
def test_what_cannot_be_ranked_is_a_bad_row(change: dict[str, Any], message: str) -> None:
    row = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 2, 1]}
    rows = [*([row] * 3), row | change]
    with pytest.raises(DataError, match=f"row 4: .*({message})"):
        _tokens(rows)
    data = _tokens(rows, skip_bad_rows=True)
    assert data.report.rows_left_out == {"could not be parsed": 1} and _accounted(data)


def test_a_list_without_numbers_says_what_is_expected() -> None:
    message = (
        r"row 1: no number says which of 'answers' is better; expected one in each object \(score, .* a column scores,"
    )
    with pytest.raises(DataError, match=message):
        _tokens([{"prompt": "q", "answers": ["a", "b"]}])
    rows = [NECTAR, {**NECTAR, "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]}]
    with pytest.raises(DataError, match=r"row 2: answers\[1\] has no 'rank', by which others are ranked"):
        _tokens(rows)


def test_lists_without_a_preference_are_left_out_for_that_reason_and_are_no_sign_of_misreading() -> None:
    good = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 2, 1]}
    rows = [good] * 4 + [good | {"scores": [2, 2, 2]}, good | {"completions": ["a"], "scores": [1]}]
    rows += [good | {"completions": [], "scores": []}, good | {"completions": ["a", "b", "b"], "scores": [1, 1, 0]}]
    data = _tokens(rows)
    assert data.report.rows_left_out == {"no preference among completions": 4} and _accounted(data)


def test_an_empty_completion_or_lists_of_one_text_are_unusable() -> None:
    good = {"prompt": "q", "completions": ["the cat", "the dog"], "scores": [2, 1]}
    rows = [good] * 60 + [good | {"completions": ["a", " "]}, good | {"completions": ["a", "a"]}]
    data = _tokens(rows)
    assert data.report.rows_left_out == {"empty completion": 1, "identical completions": 1} and _accounted(data)


def test_a_text_that_is_listed_twice_is_taken_once_with_its_best_number() -> None:
    row = {"prompt": "q", "completions": ["the dog", "the cat", "the cat", "no"], "scores": [1, 0, 3, 2]}
    [tree] = data = _tokens([row])
    assert data.rows[0].completions == ("the cat", "no", "the dog") and data.rows[0].ranks == tree.ranks == (0, 1, 2)
    assert len(tree.completions) == 3
    assert data.report.notes == [
        "1 row: a completion that stands in the list more than once is taken once, with the best of its numbers"
    ]


def test_completions_that_truncation_made_alike_are_taken_once_and_ranks_close_up() -> None:
    row = {
        "prompt": "q",
        "completions": ["the cat sat on the mat", "the cat sat on the dog", "no", "the cat sat on it"],
        "scores": [4, 3, 2, 1],
    }
    [tree] = data = _tokens([row], max_completion_length=3)
    assert len(tree.completions) == 2 and tree.ranks == (0, 1) and data.rows[0].completions[1] == "no"
    assert data.report.notes == [
        "1 row: completions that are alike when cut to length are taken once, with the best of their numbers"
    ]
    alike = row | {"completions": row["completions"][:2], "scores": [1, 2]}
    data = _tokens([row, alike], max_completion_length=3)
    assert data.report.rows_left_out == {"identical after truncation": 1} and _accounted(data)
    # what is left ties
    tie = row | {"scores": [4, 3, 4, 1]}
    data = _tokens([row, tie], max_completion_length=3)
    assert data.report.rows_left_out == {"no preference among completions": 1} and _accounted(data)


def test_a_list_is_as_long_as_its_prompt_and_its_longest_completion() -> None:
    row = {"prompt": "where is the cat", "completions": ["no", "the cat sat on the mat", "yes"], "scores": [3, 2, 1]}
    [whole] = _tokens([row])
    longest = max(map(len, whole.completions))
    fits = len(whole.prompt_ids) + longest
    assert _tokens([row], max_length=fits).report.truncated == 0
    [cut] = _tokens([row], max_length=fits - 2, truncation="keep_end")
    assert cut.prompt_ids == whole.prompt_ids[2:] and cut.completions == whole.completions and cut.ranks == whole.ranks
    [cut] = _tokens([row], max_length=fits - 2)
    assert max(map(len, cut.completions)) == longest - 2 and cut.completions[0] == whole.completions[0]


def test_cutting_keeps_every_field_but_the_sums_of_whole_rows() -> None:
    tree = TokenizedTree(
        prompt_ids=[1, 2, 3], completions=([4, 5, 6], [7]), origin="row 1", desirable=(True, False), ranks=(0, 1),
        reference_logps=(-1.0, -2.0), mismatched=True,
    )  # fmt: skip
    for cut in (truncate_tree(tree, 5, "keep_start"), bound_tree(tree, 2, None)):
        assert cut is not None and cut is not tree
        assert (cut.desirable, cut.ranks, cut.mismatched) == ((True, False), (0, 1), True)
        assert cut.reference_logps is None


def test_lists_go_through_the_chat_template_as_pairs_do() -> None:
    [tree] = _tokens([SHAPES["messages"][0]], small.CHATML)
    pair = {"prompt": [USER], "chosen": [_says("a"), TOOL, _says("a")], "rejected": "b"}
    [same] = tokenize_pairs([pair], small_tokenizer(chat_template=small.CHATML), max_length=None)
    assert (tree.prompt_ids, tree.completions, tree.scored) == (same.prompt_ids, same.completions, same.scored)
    data = _tokens([NECTAR], small.CHATML)
    assert "transcripts parsed into messages" in data.report.format
    [same] = tokenize_pairs(
        [{"prompt": [{"role": "user", "content": "hi there"}], "chosen": "a", "rejected": "c"}],
        small_tokenizer(chat_template=small.CHATML),
        max_length=None,
    )
    assert data[0].prompt_ids == same.prompt_ids and data[0].completions[::2] == same.completions
    [plain] = _tokens([ULTRA])
    [same] = tokenize_pairs([{"instruction": "q", "chosen": "a", "rejected": "b"}], small_tokenizer(), max_length=None)
    assert plain.prompt_ids == same.prompt_ids and plain.completions[:2] == same.completions


def test_pairs_are_lists_of_two_for_a_method_that_ranks_and_lists_are_taken_by_one_that_compares() -> None:
    pairs = [
        {"prompt": "q", "chosen": "the cat", "rejected": "the dog", "ref_chosen_logps": -1, "ref_rejected_logps": -2}
    ]
    [tree] = _tokens(pairs)
    assert tree.ranks == (0, 1) and tree.desirable is None and tree.reference_logps == (-1, -2)
    [tree] = _tokens([ULTRA], method="dpo", kind="pairs")
    assert tree.ranks == (0, 1, 1) and len(tree.completions) == 3
    with pytest.raises(DataError, match="method 'plackett_luce' needs ranked lists, or pairs"):
        _tokens([{"prompt": "q", "completion": "a", "label": True}])


def test_streams_of_lists_are_read_as_lists_in_memory_are(tmp_path: Any) -> None:
    rows = [{"prompt": f"q{n}", "completions": ["a", "b", "c"], "scores": [n % 3, 1, n % 2]} for n in range(40)]
    data = _tokens(rows)
    stream = PairStream(rows, small_tokenizer(), source="rows", max_length=None, method="plackett_luce", kind="ranked")
    streamed = [tree for tree, _ in zip(stream, range(len(data)), strict=False)]
    assert [(t.prompt_ids, t.completions, t.ranks) for t in streamed] == [
        (t.prompt_ids, t.completions, t.ranks) for t in data
    ]
    assert 0 < len(data) < 40 and _accounted(data)


def test_fields_that_parquet_fills_with_null_are_not_read() -> None:
    item = {"text": None, "score": None, "role": None}
    row = {
        "prompt": "q",
        "answers": [item | {"answer": "b", "rank": 2}, item | {"answer": "a", "rank": 1}],
        "scores": None,
    }
    [tree] = data = _tokens([row])
    assert (
        data.rows[0].completions == ("a", "b") and tree.ranks == (0, 1) and "by rank in answers" in data.report.format
    )


def test_one_row_of_a_file_is_found_or_said_to_be_left_out(tmp_path: Any) -> None:
    path = tmp_path / "lists.json"
    path.write_text(
        '[{"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]},'
        ' {"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]}]',
        encoding="utf-8",
    )
    tokenizer = small_tokenizer()
    assert load_row(path, 1, tokenizer, max_length=None, kind="ranked").ranks == (0, 1)
    with pytest.raises(DataError, match=r"lists\.json:row 2 is left out: no preference among completions"):
        load_row(path, 2, tokenizer, max_length=None, kind="ranked")
    assert check_source(path).report.rows_left_out == {"no preference among completions": 1}
