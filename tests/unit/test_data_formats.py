"""Are the shapes of preference data recognised by their columns, and read as what they mean?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpo_engine.data import check_source, detect_format
from dpo_engine.data.formats import preference_row, require_kind
from dpo_engine.data.records import BadRow, PreferenceRow, SourceRow, UnusableRow
from dpo_engine.data.token_columns import pairs_of_ids, token_columns
from dpo_engine.errors import DataError

USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "be brief"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
TOOL = {"role": "tool", "content": "42"}
EARLIER = [USER, {"role": "assistant", "content": "which?"}, {"role": "user", "content": "that one"}]
HH = "\n\nHuman: hi there \n\nAssistant: hello\n\nHuman: what is up?\n\nAssistant:"


def _read(row: dict[str, Any]) -> PreferenceRow:
    return preference_row(detect_format([row]), SourceRow(origin="row 1", columns=row))


SHAPES: dict[str, tuple[dict[str, Any], str, Any, Any, Any]] = {
    "text": (
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "text pairs: prompt, chosen, rejected",
        "q", "good", "bad",
    ),
    "text, system and more columns": (
        {"system": "be brief", "prompt": "q", "chosen": "good", "rejected": "bad", "score": 3, "id": "x"},
        "text pairs: prompt, system, chosen, rejected (ignored: score, id)",
        [SYSTEM, USER], "good", "bad",
    ),
    "empty system": (
        {"system": "", "prompt": "q", "chosen": "good", "rejected": "bad"},
        "text pairs: prompt, system, chosen, rejected",
        "q", "good", "bad",
    ),
    "chat": (
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        "chat pairs: prompt, chosen, rejected",
        [SYSTEM, USER], [GOOD], [BAD],
    ),
    "chat, completions as one message and as text": (
        {"prompt": [USER], "chosen": GOOD, "rejected": "bad"},
        "chat pairs: prompt, chosen, rejected",
        [USER], [GOOD], [BAD],
    ),
    "chat, prompt as text": (
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        "chat pairs: prompt, chosen, rejected",
        [USER], [GOOD], [BAD],
    ),
    "chat, completions repeat the prompt": (
        {"prompt": EARLIER, "chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, BAD]},
        "chat pairs: prompt, chosen, rejected",
        EARLIER, [GOOD], [BAD],
    ),
    "full conversations beside the prompt's text": (
        {"prompt": "q", "prompt_id": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0},
        "chat pairs: prompt, chosen, rejected (ignored: prompt_id, score_chosen)",
        [USER], [GOOD], [BAD],
    ),
    "full conversations alone": (
        {"chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, BAD]},
        "full conversations: chosen, rejected",
        EARLIER, [GOOD], [BAD],
    ),
    "chat, several turns": (
        {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [USER, BAD, TOOL, GOOD]},
        "chat pairs: prompt, chosen, rejected",
        [USER], [GOOD, USER, GOOD], [BAD, TOOL, GOOD],
    ),
    "chat, several turns after a text prompt": (
        {"system": "be brief", "prompt": "q", "chosen": [GOOD, USER, GOOD], "rejected": [BAD]},
        "chat pairs: prompt, system, chosen, rejected",
        [SYSTEM, USER], [GOOD, USER, GOOD], [BAD],
    ),
    "full conversations of several turns beside the prompt's text": (
        {"prompt": "q", "chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
        "chat pairs: prompt, chosen, rejected",
        [USER], [GOOD, USER, GOOD], [BAD, USER, BAD],
    ),
    "transcripts": (
        {"chosen": HH + " good", "rejected": HH + " bad"},
        "HH-RLHF transcripts: chosen, rejected",
        HH, " good", " bad",
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "system", "value": "be brief"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "ShareGPT pairs: conversations, chosen, rejected",
        [SYSTEM, USER], [GOOD], [BAD],
    ),
    "ShareGPT with role and content": (
        {"conversations": [USER], "chosen": GOOD, "rejected": BAD, "system": "be brief"},
        "ShareGPT pairs: conversations, system, chosen, rejected",
        [SYSTEM, USER], [GOOD], [BAD],
    ),
    "messages": (
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        "chat pairs with messages: messages, chosen, rejected",
        [USER], [GOOD], [BAD],
    ),
    "instruction": (
        {"instruction": "do", "input": "this", "output": "x", "chosen": "good", "rejected": "bad"},
        "instruction pairs: instruction, input, chosen, rejected (ignored: output)",
        "do\nthis", "good", "bad",
    ),
    "instruction, empty input": (
        {"instruction": "do", "input": "", "chosen": "good", "rejected": "bad"},
        "instruction pairs: instruction, input, chosen, rejected",
        "do", "good", "bad",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "line", "prompt", "chosen", "rejected"), SHAPES.values(), ids=SHAPES)
def test_a_shape_is_said_in_one_line_and_read(row: dict, line: str, prompt: Any, chosen: Any, rejected: Any) -> None:
    assert str(detect_format([row])) == line
    assert _read(row) == PreferenceRow(prompt=prompt, completions=(chosen, rejected), origin="row 1")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD], "label": True},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "label": False},
        {"prompt": "q", "completion": "a", "label": True},
    ],
)
def test_unpaired_rows_are_recognised_and_refused_by_a_method_that_needs_pairs(row: dict) -> None:
    unpaired = detect_format([row])
    assert unpaired.kind == "unpaired"
    with pytest.raises(DataError, match=r"file\.json holds unpaired .*method 'ipo' needs pairs; set method: kto"):
        require_kind(unpaired, "file.json", "ipo", "pairs")
    with pytest.raises(DataError, match=r"method 'plackett_luce' needs ranked lists, or pairs; set method: kto"):
        require_kind(unpaired, "file.json", "plackett_luce", "ranked")


def test_unknown_columns_are_listed_with_the_shapes_that_are_understood() -> None:
    with pytest.raises(DataError) as caught:
        detect_format([{"question": "q", "answers": ["a"], "prompt": 3}])
    message = str(caught.value)
    assert "found question (text), answers (list), prompt (number)" in message
    for shape in (
        "text pairs (prompt, chosen, rejected)",
        "ShareGPT pairs",
        "instruction pairs",
        "HH-RLHF transcripts",
    ):
        assert shape in message


def test_columns_of_the_right_names_but_wrong_types_are_listed_with_their_types() -> None:
    with pytest.raises(DataError, match=r"found prompt \(null\), chosen \(number\), rejected \(text\)"):
        detect_format([{"prompt": None, "chosen": 1, "rejected": "b"}])


def test_most_rows_decide_on_the_shape_not_the_first() -> None:
    rows = [{"prompt": "q", "chosen": "a"}, *[{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3]
    assert detect_format(rows).shape.name == "text pairs"


UNUSABLE = {
    "empty completion": [
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": " \n\t "},
        {"prompt": [USER], "chosen": [GOOD | {"content": ""}], "rejected": [BAD]},
        {"chosen": HH + " ", "rejected": HH + " b"},
    ],
    "identical completions": [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": [USER], "chosen": GOOD, "rejected": [GOOD]},
    ],
    "prompts differ": [
        {"chosen": HH + " a", "rejected": HH.replace("hello", "hey") + " b"},
        {"chosen": [*EARLIER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "another", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "another", "chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
        {"prompt": "q", "chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, TOOL, BAD]},
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
    ],
    "empty prompt": [
        {"prompt": [], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [GOOD], "rejected": [BAD]},
    ],
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in UNUSABLE.items() for row in rows])
def test_a_row_that_teaches_nothing_is_unusable_for_a_named_reason(reason: str, row: dict) -> None:
    with pytest.raises(UnusableRow, match=f"^{reason}$"):
        _read(row)


BAD_ROWS = [
    (
        {"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]},
        "end with an assistant message, found assistant, user",
    ),
    (
        {"prompt": [USER], "chosen": [SYSTEM, GOOD], "rejected": [BAD]},
        "must begin (after the prompt's messages, at most)",
    ),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "found user"),
    ({"prompt": "q", "chosen": [GOOD, USER], "rejected": [BAD]}, "found assistant, user"),
    ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "found no message"),
    ({"prompt": [USER], "chosen": 3, "rejected": [BAD]}, "'chosen' must be a list of messages, found int"),
    ({"prompt": [{"role": "robot", "content": "q"}], "chosen": [GOOD], "rejected": [BAD]}, "message 1: role 'robot'"),
    (
        {"prompt": [USER | {"content": None}], "chosen": [GOOD], "rejected": [BAD]},
        "content must be text, found NoneType",
    ),
    ({"prompt": [USER, "hi"], "chosen": [GOOD], "rejected": [BAD]}, "message 2: expected an object"),
    ({"prompt": [USER], "chosen": [GOOD | {"tool_calls": [1]}], "rejected": [BAD]}, "'tool_calls' is not supported"),
    ({"prompt": [USER], "chosen": [GOOD | {"thinking": "hm"}], "rejected": [BAD]}, "'thinking' is not supported"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": [{"name": "f"}]}, "'tools' is not empty"),
    ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD], "system": "other"}, "different system texts"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "system": 3}, "'system' must be text, found int"),
    ({"instruction": "q", "input": 3, "chosen": "a", "rejected": "b"}, "'input' must be text, found number"),
    ({"chosen": [USER], "rejected": [USER, BAD]}, "'chosen' must end with an assistant message"),
    ({"chosen": "text\n\nAssistant: a", "rejected": "text\n\nAssistant: b"}, "does not begin with"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_row_that_does_not_hold_what_its_columns_promise_is_a_bad_row(row: dict, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        _read(row)
    assert reason in str(caught.value)


def test_a_row_that_is_no_transcript_among_those_that_are_is_a_bad_row() -> None:
    transcript = {"chosen": HH + " a", "rejected": HH + " b"}
    found = detect_format([transcript] * 3)
    row = SourceRow(origin="row 4", columns={"chosen": "plain", "rejected": "play"})
    with pytest.raises(BadRow, match="there is no 'prompt', and column 'chosen' has no"):
        preference_row(found, row)


def test_texts_without_a_prompt_share_it_as_trl_has_it() -> None:
    row = _read({"chosen": "Q: why? A: because", "rejected": "Q: why? A: no"})
    assert (row.prompt, row.chosen, row.rejected) == ("Q: why? A:", " because", " no")
    with pytest.raises(UnusableRow, match="prompts differ"):
        _read({"chosen": "plain", "rejected": "text"})


def test_a_transcripts_turns_keep_their_order_and_lose_only_the_space_around_them() -> None:
    from dpo_engine.data.formats import as_messages

    inner = "\n\nHuman: say 'Human: x'\n\nand more \n\nAssistant: ok\n\nAssistant: really\n\nHuman: go\n\nAssistant:"
    messages, completions = as_messages(_read({"chosen": inner + " a b ", "rejected": inner + " c"}), transcript=True)
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "say 'Human: x'\n\nand more"),
        ("assistant", "ok"),
        ("assistant", "really"),
        ("user", "go"),
    ]
    assert [completion[0]["content"] for completion in completions] == ["a b", "c"]


def test_a_source_of_unpaired_rows_is_refused_before_it_is_read_to_the_end(tmp_path) -> None:
    path = tmp_path / "kto.jsonl"
    rows = '{"messages": [{"role": "user", "content": "q"}], "label": true}\n' * 150
    path.write_text(rows + "broken beyond the sample\n", encoding="utf-8")
    with pytest.raises(DataError, match="method 'dpo' needs pairs"):
        check_source(path)


def _rows_of_the_page() -> list[tuple[str, dict[str, Any]]]:
    """(kind, row) of every example in docs/data.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text("utf-8")
    kinds = {"Unpaired: a completion and its label": "unpaired", "Ranked lists": "ranked"}
    sections = dict(re.findall(r"^## ([^\n]+)\n(.+?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    return [
        (kind, json.loads(row))
        for heading, kind in kinds.items()
        for row in re.findall(r"^\|.*`(\{.*\})` \|$", sections[heading], re.M)
    ]


def test_every_example_of_the_page_is_read_as_what_it_is_said_to_be() -> None:
    rows = _rows_of_the_page()
    assert len(rows) == 11
    for kind, row in rows:
        if columns := token_columns(row):
            bounds: dict[str, Any] = {"max_length": None, "truncation": "keep_start", "kind": kind}
            assert pairs_of_ids([row], columns, "rows", **bounds)[0].desirable == (True,)
            continue
        assert detect_format([row]).kind == kind, row
        read = preference_row(detect_format([row]), SourceRow(origin="row 1", columns=row), kind)
        best = read.completions[0]
        says = best if isinstance(best, str) else best[-1]["content"]
        is_good = read.desirable is None or read.desirable[0]
        assert ("robin" in says) == is_good, row
