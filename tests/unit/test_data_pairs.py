"""Is every row of a source accounted for, and are real data sets read as they stand?"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_engine.data import PairData, TokenizedTree, check_source, load_pairs, tokenize_pairs
from dpo_engine.errors import ConfigError, DataError
from support import small_tokenizers as small
from support.small_tokenizers import small_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY / ".." / "shared" / "data"


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{number}", "chosen": "the cat", "rejected": "the dog"} for number in range(count)]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _accounted(data: PairData) -> bool:
    report = data.report
    return report.rows_read == report.rows_used + sum(report.rows_left_out.values()) and report.rows_used == len(data)


def test_every_row_is_used_or_left_out_for_a_reason_with_examples(tmp_path: Path) -> None:
    rows = _rows(60)
    rows[3]["chosen"] = " "
    rows[10]["rejected"] = rows[10]["chosen"]
    rows[20]["rejected"] = rows[20]["chosen"]
    rows[30]["prompt"] = "the cat " * 30
    path = _write(tmp_path / "pairs.jsonl", rows)
    data = load_pairs(path, small_tokenizer(), max_length=20)
    assert data.report.rows_left_out == {
        "empty completion": 1, "identical completions": 2, "completion lost by truncation": 1
    }  # fmt: skip
    assert data.report.examples["identical completions"] == ["pairs.jsonl:11", "pairs.jsonl:21"]
    assert data.report.examples["completion lost by truncation"] == ["pairs.jsonl:31"]
    assert _accounted(data) and data.report.rows_read == 60 and len(data) == 56
    assert [row.origin for row in data.rows] == [tree.origin for tree in data]
    assert "left out: 2 identical completions (pairs.jsonl:11, pairs.jsonl:21)" in data.report.lines()


@pytest.mark.parametrize(("unusable", "refused"), [(5, False), (6, True)])
def test_five_in_a_hundred_unusable_rows_are_borne_and_more_are_refused_with_the_counts(
    tmp_path: Path, unusable: int, refused: bool
) -> None:
    rows = _rows(100)
    for row in rows[:unusable]:
        row["rejected"] = row["chosen"]
    path = _write(tmp_path / "pairs.jsonl", rows)
    if not refused:
        assert len(check_source(path).rows) == 95
        return
    with pytest.raises(
        DataError, match=r"6 of 100 rows .*more than 5%: 6 identical completions \(pairs\.jsonl:1, "
    ) as caught:
        check_source(path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_truncation_and_skipped_rows_do_not_count_towards_the_unusable_share(tmp_path: Path) -> None:
    rows = _rows(20)
    for row in rows[:8]:
        row["prompt"] = "the cat " * 30
    for row in rows[8:12]:
        del row["rejected"]
    data = load_pairs(_write(tmp_path / "pairs.jsonl", rows), small_tokenizer(), max_length=20, skip_bad_rows=True)
    assert data.report.rows_left_out == {"could not be parsed": 4, "completion lost by truncation": 8}
    assert _accounted(data)


def test_completions_whose_tokens_are_the_same_are_identical_and_count_as_unusable() -> None:
    template = small.CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    rows = [*_rows(10), {"prompt": "q", "chosen": "the cat", "rejected": "the cat "}]
    with pytest.raises(DataError, match=r"1 identical completions \(row 11\)"):
        tokenize_pairs(rows, small_tokenizer(chat_template=template), max_length=None)


def test_completions_that_differ_only_beyond_the_cut_are_left_out_as_truncated() -> None:
    row = {"prompt": "q", "chosen": "the cat " * 20 + "sat", "rejected": "the cat " * 20 + "ran"}
    data = tokenize_pairs([row, *_rows(3)], small_tokenizer(), max_length=20)
    assert data.report.rows_left_out == {"identical after truncation": 1}
    assert _accounted(data) and data.report.truncated == 0


def test_truncated_trees_are_counted_and_share_one_prompt() -> None:
    rows = [*_rows(3), {"prompt": "where is " * 20, "chosen": "the cat", "rejected": "the dog sat on the mat"}]
    data = tokenize_pairs(rows, small_tokenizer(), max_length=16, truncation="keep_end")
    whole = tokenize_pairs(rows, small_tokenizer(), max_length=None)
    assert data.report.truncated == 1
    assert data[3].completions == whole[3].completions
    assert whole[3].prompt_ids[-len(data[3].prompt_ids) :] == data[3].prompt_ids
    assert len(data[3].prompt_ids) + max(map(len, data[3].completions)) == 16


def test_a_source_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"no usable row is left of 3: 3 longer than max_length \(row 1, row 2, row 3\)"
    ):
        tokenize_pairs(_rows(3), small_tokenizer(), max_length=2, truncation="drop")


def test_a_row_too_long_can_be_an_error_with_its_place_and_lengths() -> None:
    rows = [*_rows(1), {"prompt": "the cat " * 9, "chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match=r"^row 2: \d+ prompt tokens and 2 of the longest completion .* max_length 12"):
        tokenize_pairs(rows, small_tokenizer(), max_length=12, truncation="error")


def test_a_limit_keeps_the_first_usable_pairs_and_counts_the_rest() -> None:
    rows = _rows(1200)
    rows[1]["prompt"] = "the cat " * 30
    data = tokenize_pairs(rows, small_tokenizer(), max_length=20, limit=3)
    assert [tree.origin for tree in data] == ["row 1", "row 3", "row 4"]
    assert data.report.rows_left_out == {"completion lost by truncation": 1, "beyond limit": 1196}
    assert _accounted(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "middle"}, "truncation is 'middle', expected one of keep_start, keep_end, drop, error"),
        ({"max_length": 1}, "max_length is 1, expected at least 2"),
        ({"limit": 0}, "limit is 0, expected at least 1"),
    ],
)
def test_an_option_out_of_range_is_a_config_error_before_anything_is_read(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pairs("missing.jsonl", small_tokenizer(), **({"max_length": 8} | options))


def test_a_list_a_dataset_and_a_checked_source_give_the_same_trees(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows, tokenizer = _rows(5), small_tokenizer()

    def ids(data: PairData) -> list[TokenizedTree]:
        return [dataclasses.replace(tree, origin="") for tree in data]

    listed = tokenize_pairs(rows, tokenizer, max_length=32)
    assert [tree.origin for tree in listed] == [f"row {number}" for number in range(1, 6)]
    dataset = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, max_length=32, source="train_dataset")
    assert dataset.trees[4].origin == "train_dataset:row 5" and dataset.report.source == "train_dataset"
    source = check_source(_write(tmp_path / "pairs.jsonl", rows))
    checked = load_pairs(source, tokenizer, max_length=32)
    assert ids(listed) == ids(dataset) == ids(checked) == ids(load_pairs(source, tokenizer, max_length=32))
    assert source.report.format == "text pairs: prompt, chosen, rejected"  # reading a source twice adds nothing to it


def test_rows_in_memory_that_are_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"give one split, such as data\['train'\]"):
        tokenize_pairs({"train": _rows(1)}, small_tokenizer(), max_length=8)
    with pytest.raises(DataError, match=r"^row 2: expected an object, found str"):
        tokenize_pairs([*_rows(1), "text"], small_tokenizer(), max_length=8)
    with pytest.raises(DataError, match=r"^row 1: text holds a lone surrogate"):
        tokenize_pairs([{"prompt": "\ud800", "chosen": "a", "rejected": "b"}], small_tokenizer(), max_length=8)
    with pytest.raises(DataError, match="holds no rows"):
        tokenize_pairs([], small_tokenizer(), max_length=8)


def test_the_data_package_and_a_check_of_a_file_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = _write(tmp_path / "pairs.jsonl", _rows(3))
    code = (
        "import sys; from dpo_engine.data import check_source\n"
        f"assert len(check_source({str(path)!r}).rows) == 3\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "line", "read", "used", "left_out"),
    [
        ("dpo_en_demo.json", "ShareGPT pairs: conversations, chosen, rejected", 299, 299, {}),
        (
            "hh_harmless_test.jsonl.gz",
            "HH-RLHF transcripts: chosen, rejected",
            2312,
            2303,
            {"empty completion": 4, "prompts differ": 5},
        ),
        (
            "polite_vs_rude.json",
            "instruction pairs: instruction, input, chosen, rejected (ignored: output)",
            1100,
            1094,
            {"identical completions": 6},
        ),
    ],
)
def test_real_preference_files_are_read_as_they_stand(
    name: str, line: str, read: int, used: int, left_out: dict[str, int]
) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not on this machine")
    source = check_source(SHARED / name)
    assert str(source.format) == line
    assert (source.report.rows_read, len(source.rows), source.report.rows_left_out) == (read, used, left_out)
    tokenizer = small_tokenizer(chat_template=small.CHATML)
    data = load_pairs(source, tokenizer, max_length=512, limit=32)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for tree, row in zip(data, data.rows, strict=True):
        fits = len(tree.prompt_ids) + max(map(len, tree.completions)) < 512
        assert not fits or all(completion[-1] == end for completion in tree.completions), row.origin
    assert _accounted(data)


def test_real_unpaired_data_is_recognised_and_refused() -> None:
    path = SHARED / "kto_en_demo.json"
    if not path.is_file():
        pytest.skip("kto_en_demo.json is not on this machine")
    with pytest.raises(DataError, match=r"holds unpaired messages: messages, label: .*method 'dpo' needs pairs"):
        check_source(path)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Any]:
    cache = Path(os.environ.get("DPO_ENGINE_CACHE") or Path.home() / ".cache" / "dpo-engine")
    folder = cache / "models" / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"SmolLM2 is not in {cache}")
    from transformers import AutoTokenizer

    yield AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_smollm2_sees_the_prompt_it_is_asked_with_and_its_end_of_turn_is_scored(smollm2: Any) -> None:
    messages = [{"role": "user", "content": "Name a bird."}]
    row = {"prompt": messages, "chosen": "A robin.", "rejected": "\n\nWell, let me think about it."}
    data = tokenize_pairs([row], smollm2, max_length=None)
    tree = data[0]
    assert tree.prompt_ids == smollm2.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm2.decode(tree.prompt_ids).count("<|im_start|>") == 3  # system, user, assistant: no BOS besides
    assert smollm2.pad_token_id == smollm2.eos_token_id == tree.completions[0][-1] == tree.completions[1][-1]
    assert [smollm2.decode(completion) for completion in tree.completions] == [
        "A robin.<|im_end|>",
        "\n\nWell, let me think about it.<|im_end|>",
    ]
    # the newline after "assistant" and the next one would become one token
    assert data.report.notes[0].startswith("1 row: the tokenizer merges across")


def test_smollm2_completions_of_short_real_pairs_are_as_long_as_measured(smollm2: Any) -> None:
    path = SHARED / "polite_vs_rude.json"
    if not path.is_file():
        pytest.skip("polite_vs_rude.json is not on this machine")
    data = load_pairs(path, smollm2, max_length=None, chat_template="off")
    assert len(data) == 1094
    assert max(len(tree.completions[0]) for tree in data) == 61  # the end token included
