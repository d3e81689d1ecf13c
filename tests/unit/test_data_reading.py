"""Is every row of a source read or accounted for, and is every fault named with its place?"""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_engine.data import check_source, read_rows
from dpo_engine.data.pairs import UNPARSED
from dpo_engine.errors import DataError

ROWS = [{"prompt": f"q{number}", "chosen": f"good {number} é", "rejected": "bad"} for number in range(1, 4)]
GOOD = '{"prompt": "q", "chosen": "a", "rejected": "b"}'


def _jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path, rows: list[dict]) -> Path:
    """The rows in the format that the path's ending asks for."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        if ".csv" in path.name:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write(_jsonl(rows) if ".jsonl" in path.name else json.dumps(rows, indent=2))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz"])
def test_every_format_gives_the_same_rows_with_their_origins(tmp_path: Path, ending: str) -> None:
    path = _write(tmp_path / f"pairs{ending}", ROWS)
    read = list(read_rows(path))
    assert [row.columns for row in read] == ROWS
    place = "{}" if ".jsonl" in ending else "row {}"
    assert [row.origin for row in read] == [f"{path.name}:{place.format(number)}" for number in (1, 2, 3)]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + _jsonl(ROWS).encode().replace(b"\n", b"\r\n") + b"\n   \n")
    assert [row.columns for row in read_rows(path)] == ROWS
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\nq,a,b\r\n\r\n")
    assert [row.columns for row in read_rows(path)] == [{"prompt": "q", "chosen": "a", "rejected": "b"}]


def test_a_json_file_may_hold_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(_jsonl(ROWS), encoding="utf-8")
    assert [(row.origin, row.columns) for row in read_rows(path)][1] == ("pairs.json:2", ROWS[1])


def test_a_csv_field_may_be_longer_than_the_csv_modules_limit_which_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit(100_000)
    long = "word " * 40_000
    path = _write(
        tmp_path / "pairs.csv", [{"prompt": "q\nwith a line", "chosen": long, "rejected": 'say "no", please'}]
    )
    (row,) = read_rows(path)
    assert csv.field_size_limit(before) == 100_000
    assert row.columns == {"prompt": "q\nwith a line", "chosen": long, "rejected": 'say "no", please'}


BAD_LINES = {
    "broken JSON": (b'{"prompt": "q", "chosen": "a", ', "broken JSON"),
    "two values": (GOOD.encode() + b" {}", "broken JSON"),
    "not UTF-8": (b'{"prompt": "q", "chosen": "\xff", "rejected": "b"}', "not UTF-8 (byte 0xff at column 28)"),
    "UTF-8 of a surrogate": (b'{"prompt": "q", "chosen": "\xed\xa0\x80", "rejected": "b"}', "not UTF-8"),
    "NUL byte": (b'{"prompt": "q", "chosen": "a\0", "rejected": "b"}', "NUL"),
    "NUL escape": (b'{"prompt": "q", "chosen": "a\\u0000", "rejected": "b"}', "NUL"),
    "lone surrogate": (b'{"prompt": "q", "chosen": "a\\ud800", "rejected": "b"}', "lone surrogate (U+D800)"),
    "lone surrogate in a name": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "\\udfff": 1}', "lone surrogate"),
    "lone surrogate inside": (
        b'{"prompt": "q", "chosen": "a", "rejected": "b", "x": [{"y": "\\ud912"}]}',
        "lone surrog",
    ),
    "NaN": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "score": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "score": -Infinity}', "-Infinity is not JSON"),
    "1e999": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "score": 1e999}', "1e999 is out of range"),
    "endless number": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "n": ' + b"9" * 5000 + b"}", "out of range"),
    "repeated key": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}', "key 'chosen' occurs twice"),
    "repeated key inside": (
        b'{"prompt": "q", "chosen": "a", "rejected": "b", "x": {"y": 1, "y": 2}}',
        "'y' occurs twice",
    ),
    "deep": (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 64 levels deep"),
    "deeper than Python's stack": (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deep"),
    "a list": (b'["q", "a", "b"]', "expected an object with columns, found a list"),
    "a number": (b"3", "expected an object with columns, found a number"),
    "null": (b"null", "expected an object with columns, found null"),
    "missing column": (b'{"prompt": "q", "chosen": "a"}', "missing column 'rejected', found prompt, chosen"),
    "null in a column": (b'{"prompt": "q", "chosen": null, "rejected": "b"}', "'chosen' must be text, found null"),
    "number in a column": (b'{"prompt": 3, "chosen": "a", "rejected": "b"}', "'prompt' must be text, found number"),
    "list in a column": (b'{"prompt": "q", "chosen": ["a"], "rejected": "b"}', "'chosen' must be text, found list"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_stops_with_file_line_and_reason_or_is_skipped_and_counted(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(DataError) as caught:
        check_source(path)
    message = str(caught.value)
    assert message.startswith("pairs.jsonl:3: ") and reason in message and "--skip_bad_rows" in message
    assert "\n" not in message and caught.value.exit_code == 2

    source = check_source(path, skip_bad_rows=True)
    assert [row.origin for row in source.rows] == ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:4"]
    assert source.report.rows_left_out == {UNPARSED: 1}
    assert source.report.examples == {UNPARSED: ["pairs.jsonl:3"]}
    assert source.report.rows_read == 4


@pytest.mark.parametrize(
    "name", ["not UTF-8", "NUL escape", "lone surrogate", "NaN", "1e999", "repeated key", "deep", "null"]
)
def test_a_bad_row_in_a_json_list_does_not_hide_the_rows_after_it(tmp_path: Path, name: str) -> None:
    line, _ = BAD_LINES[name]
    path = tmp_path / "pairs.json"
    path.write_bytes(b"[" + GOOD.encode() + b",\n" + line + b",\n" + GOOD.encode() + b"]\n")
    with pytest.raises(DataError, match=r"^pairs\.json:row 2: "):
        check_source(path)
    source = check_source(path, skip_bad_rows=True)
    assert [row.origin for row in source.rows] == ["pairs.json:row 1", "pairs.json:row 3"]
    assert source.report.rows_left_out == {UNPARSED: 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" + GOOD + ",\n" + GOOD[:-3], r"pairs\.json:2: broken JSON"),
        ("[" + GOOD + "\n" + GOOD + "]", r"pairs\.json:2: broken JSON: Expecting ',' or '\]' after a row at column 1"),
        ("[" + GOOD + ",]", r"pairs\.json:1: broken JSON"),
        ("[" + GOOD + "]\n]", r"pairs\.json:2: broken JSON: Extra data"),
        ("[" + GOOD, r"pairs\.json:1: broken JSON"),
        ("[" + GOOD + ",\n\0]", r"pairs\.json:2: holds a NUL byte"),
        ("[" + "[" * 200_000, r"pairs\.json:row 1: broken JSON: nested too deep"),
        ('{\n"train": [' + GOOD + "]}", "expected a list of objects, or one object a line"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_a_json_file_broken_between_rows_is_refused_even_when_skipping(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        check_source(path, skip_bad_rows=True)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("q,a\n", "has 2 fields, the header has 3"),
        ("q,a,b,c\n", "has 4 fields, the header has 3"),
        (b"q,\xff,b\n", "not UTF-8 (byte 0xff)"),
    ],
)
def test_a_bad_csv_row_is_named_or_skipped(tmp_path: Path, body: str | bytes, reason: str) -> None:
    path = tmp_path / "pairs.csv"
    body = body.encode() if isinstance(body, str) else body
    path.write_bytes(b"prompt,chosen,rejected\nq,a,b\n" + body + b"q,a,b\n")
    with pytest.raises(DataError, match=r"^pairs\.csv:row 2: ") as caught:
        check_source(path)
    assert reason in str(caught.value)
    assert [row.origin for row in check_source(path, skip_bad_rows=True).rows] == ["pairs.csv:row 1", "pairs.csv:row 3"]


@pytest.mark.parametrize("body", ['q,"a,b\nq,a,b\n', 'q,"a"x,b\nq,a,b\n'])
def test_an_unmatched_csv_quote_is_refused_because_it_swallows_rows(tmp_path: Path, body: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nq,a,b\n" + body, encoding="utf-8")
    with pytest.raises(DataError, match="broken CSV"):
        check_source(path, skip_bad_rows=True)


def test_a_column_name_that_occurs_twice_in_a_csv_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,chosen\nq,a,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="occurs twice"):
        check_source(path)


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.json.gz", "pairs.csv.gz", "pairs.parquet"])
def test_a_file_cut_short_or_not_of_its_format_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    whole = _write(tmp_path / name, ROWS * 50).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not of this format"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name.split(".")[0]):
            check_source(tmp_path / name)


def test_null_fields_that_parquet_adds_to_messages_are_no_fault(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": None}
    rows = [
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [message], "rejected": [message | {"content": "b"}]}
    ]
    source = check_source(_write(tmp_path / "chat.parquet", rows))
    assert source.rows[0].chosen == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv", "empty.json"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no rows"):
        check_source(tmp_path / name)


def test_a_file_of_nothing_but_bad_rows_is_refused_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n{\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no row could be parsed.*bad\.jsonl:1, bad\.jsonl:2"):
        check_source(tmp_path / "bad.jsonl", skip_bad_rows=True)


def test_a_missing_file_is_named_with_the_files_beside_it(tmp_path: Path) -> None:
    _write(tmp_path / "preferences.jsonl", ROWS)
    with pytest.raises(DataError, match=r"preference\.jsonl not found; .* holds preferences\.jsonl"):
        check_source(str(tmp_path / "preference.jsonl"))
    with pytest.raises(DataError, match=r"not found: the folder .*nowhere does not exist"):
        check_source(str(tmp_path / "nowhere" / "pairs.jsonl"))


def test_a_folder_or_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"is a folder, expected a data file; it holds pairs\.jsonl"):
        check_source(str(tmp_path))
    (tmp_path / "pairs.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"unknown ending '\.txt', expected one of \.jsonl, \.json, \.csv"):
        check_source(tmp_path / "pairs.txt")


def test_a_name_is_taken_for_a_hub_id_only_when_it_can_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    for path in ("./org/pairs", "org/pairs", "a/b/c", "/abs", "~/pairs", "org\\pairs", "", "pairs.jsonl"):
        with pytest.raises(DataError, match=r"not found|is a folder"):
            read_rows(path)
    read_rows("another/pairs")  # a hub id: nothing is looked up before the first row is asked for


HUB = """
import sys
from dpo_engine.data import check_source
from dpo_engine.errors import DataError
for split in ("test", "absent"):
    try:
        source = check_source("org/pairs", split=split)
        print([(row.origin, row.prompt) for row in source.rows])
    except DataError as error:
        print("DataError:", error)
try:
    check_source("org/missing")
except DataError as error:
    print("DataError:", error)
"""


def test_a_hub_dataset_is_read_from_the_local_hub_cache_and_a_missing_one_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    repo, commit = tmp_path / "hub" / "datasets--org--pairs", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {number}", "chosen": "a", "rejected": "b"} for number in range(2)]
        _write(repo / "snapshots" / commit / f"{split}.jsonl", rows)
    # the hub library reads these settings when it is imported, so this needs a process of its own
    hub = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    names = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in names} | hub
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    found, no_split, missing = done.stdout.splitlines()
    assert found == "[('org/pairs:row 1', 'test 0'), ('org/pairs:row 2', 'test 1')]"
    assert (
        no_split.startswith("DataError: data 'org/pairs'") and "'absent'" in no_split and "'train', 'test'" in no_split
    )
    assert missing.startswith("DataError: data 'org/missing' is no local file") and "check the id" in missing
