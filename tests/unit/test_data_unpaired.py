"""Are labelled completions read as what they mean, in every shape, and pairs beside them?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_engine.data import PairData, check_source, detect_format, load_pairs, load_row, tokenize_pairs
from dpo_engine.data.formats import preference_row
from dpo_engine.data.records import PreferenceRow, SourceRow
from dpo_engine.data.streaming import PairStream
from dpo_engine.data.token_columns import LABELLED, pairs_of_ids, token_columns
from dpo_engine.errors import ConfigError, DataError
from support import small_tokenizers as small
from support.small_tokenizers import small_tokenizer

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
TOOL = {"role": "tool", "content": "42"}
SYSTEM = {"role": "system", "content": "be brief"}
HH = "\n\nHuman: hi there \n\nAssistant: hello\n\nHuman: what is up?\n\nAssistant:"


def _rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    row = {"completion": "the cat sat", "label": True}
    return [{"prompt": f"q{number}", **row, **changes} for number in range(count)]


def _tokens(rows: Any, template: str | None = None, **options: Any) -> PairData:
    options = {"max_length": None, "method": "kto", "kind": "unpaired"} | options
    return tokenize_pairs(rows, small_tokenizer(chat_template=template), **options)


def _accounted(data: PairData) -> bool:
    report = data.report
    return report.rows_read == report.rows_used + sum(report.rows_left_out.values()) and report.rows_used == len(data)


SHAPES: dict[str, tuple[dict[str, Any], str, Any, Any]] = {
    "text": (
        {"prompt": "q", "completion": "good", "label": True},
        "unpaired completions: prompt, completion, label", "q", "good",
    ),
    "text behind a system text": (
        {"prompt": "q", "completion": "good", "label": True, "system": "be brief", "id": 3},
        "unpaired completions: prompt, completion, label, system (ignored: id)", [SYSTEM, USER], "good",
    ),
    "chat": (
        {"prompt": [USER], "completion": [GOOD], "label": True},
        "unpaired completions: prompt, completion, label", [USER], [GOOD],
    ),
    "chat, prompt as text": (
        {"prompt": "q", "completion": GOOD, "label": True},
        "unpaired completions: prompt, completion, label", [USER], [GOOD],
    ),
    "chat, several turns": (
        {"prompt": [USER], "completion": [USER, GOOD, TOOL, GOOD], "label": True},
        "unpaired completions: prompt, completion, label", [USER], [GOOD, TOOL, GOOD],
    ),
    "messages": (
        {"messages": [SYSTEM, USER, GOOD, TOOL, GOOD, GOOD], "label": True},
        "unpaired messages: messages, label", [SYSTEM, USER, GOOD, TOOL], [GOOD, GOOD],
    ),
    "ShareGPT, as LLaMA-Factory labels it": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}], "kto_tag": True},
        "unpaired conversations: conversations, kto_tag", [USER], [GOOD],
    ),
    "instruction": (
        {"instruction": "do", "input": "this", "output": "good", "kto_tag": True},
        "unpaired instructions: instruction, output, kto_tag, input", "do\nthis", "good",
    ),
    "transcript": (
        {"prompt": HH, "completion": " good", "label": True},
        "unpaired transcripts: prompt, completion, label", HH, " good",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "line", "prompt", "completion"), SHAPES.values(), ids=SHAPES)
def test_a_shape_is_said_in_one_line_and_read(row: dict, line: str, prompt: Any, completion: Any) -> None:
    found = detect_format([row])
    assert (str(found), found.kind) == (line, "unpaired")
    read = preference_row(found, SourceRow(origin="row 1", columns=row), "unpaired")
    assert read == PreferenceRow(prompt=prompt, completions=(completion,), desirable=(True,), origin="row 1")


@pytest.mark.parametrize(
    ("label", "meant"), [(True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False)]
)
def test_a_label_is_true_or_false_or_1_or_0(label: Any, meant: bool) -> None:
    [tree] = _tokens(_rows(1, label=label))
    assert tree.desirable == (meant,) and tree.desirable[0] is meant
    assert len(tree.completions) == 1 and tree.ranks is None and not tree.mismatched


@pytest.mark.parametrize("label", [2, -1, 0.5, "true", "1", None, [True]])
def test_any_other_label_is_a_bad_row(label: Any) -> None:
    rows = [*_rows(3), *_rows(1, label=label)]
    with pytest.raises(DataError, match=r"row 4: column 'label' must be true or false \(or 1 or 0\), found"):
        _tokens(rows)
    data = _tokens(rows, skip_bad_rows=True)
    assert data.report.rows_left_out == {"could not be parsed": 1} and _accounted(data)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [GOOD, USER], "label": True}, "must end with an assistant message"),
        (
            {"prompt": "q", "completion": None, "label": True},
            "column 'completion' must be text or messages, found null",
        ),
        ({"prompt": [USER], "completion": [USER], "label": True}, "must begin .* and end with an assistant message"),
        ({"instruction": "q", "output": ["a"], "label": True}, "column 'output' must be text, found list"),
    ],
)
def test_a_row_of_another_make_is_a_bad_row(row: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        _tokens([row])


def test_rows_without_a_prompt_or_an_answer_are_left_out() -> None:
    rows = [{"messages": [USER, GOOD], "label": number % 2} for number in range(60)]
    rows[7] = {"messages": [GOOD], "label": 1}
    rows[9] = {"messages": [USER, {"role": "assistant", "content": " "}], "label": 1}
    data = _tokens(rows, small.CHATML)
    assert data.report.rows_left_out == {"empty prompt": 1, "empty completion": 1} and _accounted(data)


def test_pairs_are_one_good_and_one_bad_completion_and_that_is_said() -> None:
    rows = [{"prompt": f"q{number}", "chosen": "the cat", "rejected": "the dog"} for number in range(30)]
    rows[3]["rejected"] = rows[3]["chosen"]
    data, pairs = _tokens(rows), tokenize_pairs(rows, small_tokenizer(), max_length=None)
    assert {tree.desirable for tree in data} == {row.desirable for row in data.rows} == {(True, False)}
    assert [tree.completions for tree in data] == [tree.completions for tree in pairs]
    assert {tree.desirable for tree in pairs} == {None}
    assert data.report.notes == ["pairs are taken as one desirable and one undesirable completion each"]
    assert data.report.rows_left_out == {"identical completions": 1} and pairs.report.notes == []


def test_ranked_lists_are_refused_with_what_to_do() -> None:
    row = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 2, 3]}
    with pytest.raises(
        DataError, match=r"ranked lists by scores .*a ranked list a row, but method 'kto' needs .* label"
    ):
        _tokens([row])


def test_a_pair_that_truncation_made_alike_has_no_label_of_its_own() -> None:
    rows = [{"prompt": "q", "chosen": "the cat sat on the mat", "rejected": "the cat sat on the dog"}] + [
        {"prompt": "q", "chosen": "yes", "rejected": "no"}
    ] * 30
    data = _tokens(rows, max_completion_length=3)
    assert data.report.rows_left_out == {"identical after truncation": 1} and _accounted(data)


def test_labels_stay_with_completions_that_are_cut() -> None:
    whole = _tokens(_rows(3, label=False, completion="the cat sat on the mat"))
    cut = _tokens(_rows(3, label=False, completion="the cat sat on the mat"), max_length=8)
    assert cut.report.truncated == 3 and {tree.desirable for tree in cut} == {(False,)}
    assert [tree.completions[0] for tree in cut] == [tree.completions[0][: 8 - len(tree.prompt_ids)] for tree in whole]


def test_several_turns_and_transcripts_go_through_the_chat_template() -> None:
    row = {"prompt": [USER], "completion": [GOOD, USER, GOOD], "label": 0}
    [tree] = _tokens([row], small.CHATML)
    pair = {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": "bad"}
    [same] = tokenize_pairs([pair], small_tokenizer(chat_template=small.CHATML), max_length=None)
    assert tree.scored is not None and same.scored is not None
    assert (tree.prompt_ids, tree.completions[0], tree.scored[0]) == (
        same.prompt_ids,
        same.completions[0],
        same.scored[0],
    )
    [spoken] = _tokens([{"prompt": HH, "completion": " good", "label": 1}], small.CHATML)
    [same] = tokenize_pairs(
        [{"chosen": HH + " good", "rejected": HH + " bad"}],
        small_tokenizer(chat_template=small.CHATML),
        max_length=None,
    )
    assert (spoken.prompt_ids, spoken.completions[0]) == (same.prompt_ids, same.completions[0])


def test_files_rows_and_streams_give_the_same_trees(tmp_path: Path) -> None:
    rows = [*_rows(40), *_rows(30, label=False)]
    rows[5]["completion"] = ""
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options: dict[str, Any] = {"max_length": 32, "method": "kto", "kind": "unpaired"}
    tokenizer = small_tokenizer()
    listed = tokenize_pairs(rows, tokenizer, **options)
    read = load_pairs(path, tokenizer, **options)
    stream = PairStream(rows, tokenizer, source="rows", **options)
    streamed = [tree for tree, _ in zip(stream, range(len(read)), strict=False)]
    seen = [[(t.prompt_ids, t.completions, t.desirable) for t in trees] for trees in (listed, read, streamed)]
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 69
    few = load_pairs(path, tokenizer, limit=3, **options)
    assert len(few) == 3 and _accounted(few) and _accounted(read)
    assert load_row(path, 41, tokenizer, **options).desirable == (False,)
    source = check_source(path, method="kto", kind="unpaired")
    assert source.kind == "unpaired" and len(load_pairs(source, tokenizer, max_length=32)) == 69
    with pytest.raises(ConfigError, match="kind='ranked', but check_source read the rows as 'unpaired'"):
        load_pairs(source, tokenizer, max_length=32, kind="ranked")
    with pytest.raises(ConfigError, match="kind='lists' is not known; expected one of pairs, unpaired, ranked"):
        check_source(path, kind="lists")
    with pytest.raises(DataError, match="method 'dpo' needs pairs; set method: kto"):
        next(iter(PairStream(rows, tokenizer, source="rows", max_length=32)))


def test_rows_of_ids_with_labels_are_taken_as_they_stand() -> None:
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "label": number % 2, "ref_logps": -1.0}
        for number in range(4)
    ]
    assert token_columns(rows[0]) == LABELLED
    assert token_columns(rows[0] | {"completion": "text"}) is None
    bounds: dict[str, Any] = {"max_length": 4, "truncation": "keep_start", "method": "kto", "kind": "unpaired"}
    data = pairs_of_ids(rows, LABELLED, "train_dataset", **bounds)
    assert [tree.desirable for tree in data] == [(False,), (True,)] * 2
    assert {(tuple(tree.prompt_ids), tuple(tree.completions[0])) for tree in data} == {((1, 2), (3, 4))}
    assert [row.desirable for row in data.rows] == [tree.desirable for tree in data] and data.report.truncated == 4
    with pytest.raises(DataError, match="method 'dpo' compares completions; set method: kto"):
        pairs_of_ids(rows, LABELLED, "train_dataset", **bounds | {"method": "dpo", "kind": "pairs"})
    rows[2]["label"] = 7
    with pytest.raises(DataError, match="train_dataset:row 3: column 'label' must be true or false"):
        pairs_of_ids(rows, LABELLED, "train_dataset", **bounds)
    assert len(pairs_of_ids(rows, LABELLED, "train_dataset", skip_bad_rows=True, **bounds)) == 3


def test_pairs_of_ids_become_what_the_kind_needs() -> None:
    rows = [{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}]
    columns = token_columns(rows[0])
    assert columns is not None
    found = {
        kind: pairs_of_ids(rows, columns, "rows", max_length=None, truncation="keep_start", kind=kind)[0]
        for kind in ("pairs", "unpaired", "ranked")
    }
    assert [(tree.desirable, tree.ranks) for tree in found.values()] == [
        (None, None), ((True, False), None), (None, (0, 1))
    ]  # fmt: skip


def test_real_unpaired_data_is_read_as_it_stands() -> None:
    path = SHARED / "kto_en_demo.json"
    if not path.is_file():
        pytest.skip("kto_en_demo.json is not on this machine")
    source = check_source(path, method="kto", kind="unpaired")
    assert str(source.format) == "unpaired messages: messages, label"
    assert (source.report.rows_read, len(source.rows), source.report.rows_left_out) == (300, 300, {})
    assert sum(row.desirable == (True,) for row in source.rows) == 150
    assert all(isinstance(row.completions[0], list) and len(row.completions[0]) == 1 for row in source.rows)
    data = load_pairs(source, small_tokenizer(chat_template=small.CHATML), max_length=512, limit=32)
    assert len(data) == 32 and _accounted(data)
