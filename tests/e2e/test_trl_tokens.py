"""Are the tokens that are read, and those that are scored, the ones that TRL's trainer makes of the same rows?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import dpo_engine
from dpo_engine.errors import ConfigError, DataError
from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_pairs import tiny_llama
from support.trl_scripts import CONVERSATIONS, ENDS_WITH_TURN, IMPLICIT, STANDARD, saved_model, script_settings

Ids = list[tuple[list[int], list[int], list[int]]]
Prepared = Callable[..., tuple[Ids, Ids]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """`prepared(rows, tokenizer options, **config)`: prompt, chosen and rejected of each row, by TRL and by the engine."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: make trl installs it")
    from datasets import Dataset

    def both(rows: list[dict[str, Any]], tokenizer: dict[str, Any], **changes: Any) -> tuple[Ids, Ids]:
        folder = tmp_path_factory.mktemp("model")
        model, made = saved_model(folder, **tokenizer), []
        for package in (trl, dpo_engine):
            if package is dpo_engine and "chat_template" not in changes:
                changes["chat_template"] = "on" if isinstance(rows[0]["chosen"], list) else "off"
            args = package.DPOConfig(**script_settings(folder, **changes))
            made.append(package.DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows)).train_dataset)
        length = changes.get("max_length", 64)
        theirs = []
        for row in made[0]:
            prompt, chosen, rejected = (row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            room = length - len(prompt)  # its collator cuts each sequence to max_length
            theirs.append((prompt, chosen[:room], rejected[:room]))
        assert all(tree.scored is None for tree in made[1])  # every token of a completion is scored, as in TRL
        return theirs, [(tree.prompt_ids, *tree.completions) for tree in made[1]]

    return both


@pytest.mark.parametrize(
    ("rows", "tokenizer", "changes"),
    [
        (STANDARD, {}, {}),
        (STANDARD, {"adds_bos": True}, {}),
        (STANDARD, {"chat_template": ENDS_WITH_TURN}, {}),
        (CONVERSATIONS, {"chat_template": ENDS_WITH_TURN}, {}),
        (IMPLICIT, {"chat_template": ENDS_WITH_TURN}, {}),
        (STANDARD, {"adds_bos": True}, {"max_length": 12}),
        (CONVERSATIONS, {"chat_template": ENDS_WITH_TURN}, {"max_length": 24}),
        ([{**row, "chosen": row["chosen"] + "</s>"} for row in STANDARD], {}, {}),
        ([{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in STANDARD], {}, {}),
    ],
    ids=["standard", "BOS", "text with a template", "chat", "implicit chat", "cut", "chat cut", "EOS in it", "implicit text"],
)  # fmt: skip
def test_tokens_are_those_of_trl(
    rows: list[dict[str, Any]], tokenizer: dict[str, Any], changes: dict[str, Any], prepared: Prepared
) -> None:
    theirs, ours = prepared(rows, tokenizer, **changes)
    assert ours == theirs


def test_what_a_template_writes_behind_a_turn_is_scored_by_trl_alone(prepared: Prepared) -> None:
    theirs, ours = prepared(CONVERSATIONS, {"chat_template": CHATML})
    tail = small_tokenizer()("\n", add_special_tokens=False)["input_ids"]
    assert theirs == [(prompt, chosen + tail, rejected + tail) for prompt, chosen, rejected in ours]


def test_where_the_tokenizer_merges_across_the_prompts_end_trl_cuts_the_prompt(prepared: Prepared) -> None:
    rows = [{"prompt": row["prompt"] + " ", **{n: row[n].strip() for n in ("chosen", "rejected")}} for row in STANDARD]
    theirs, ours = prepared(rows, {})
    tokenizer = small_tokenizer()
    for row, (prompt, *_), (our_prompt, *_) in zip(rows, theirs, ours, strict=True):
        assert our_prompt == tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert len(prompt) < len(our_prompt)


def trees(rows: Any, tmp_path: Path, **changes: Any) -> Any:
    tokenizer = small_tokenizer()
    args = dpo_engine.DPOConfig(**script_settings(tmp_path, **changes))
    model = tiny_llama(vocab_size=len(tokenizer))
    return dpo_engine.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train_dataset


@pytest.mark.parametrize("form", ["{}_ids", "{}_input_ids"])
def test_columns_of_ids_are_taken_as_they_stand(form: str, tmp_path: Path) -> None:
    ids = {"prompt": [5, 6, 7, 8], "chosen": [9, 10, 11], "rejected": [12]}
    rows = [{form.format(name): value for name, value in ids.items()}] * 2
    for changes, expected in (
        ({}, ([5, 6, 7, 8], ([9, 10, 11], [12]))),
        ({"max_prompt_length": 2, "max_completion_length": 2}, ([7, 8], ([9, 10], [12]))),
        ({"max_length": 5}, ([5, 6, 7, 8], ([9], [12]))),
    ):
        tree = trees(rows, tmp_path, **changes)[1]
        assert (tree.prompt_ids, tree.completions) == expected
    with pytest.raises(DataError, match=r"train_dataset:row 1: column '.*' is a list, \[\]; expected"):
        trees([{name: [] for name in rows[0]}], tmp_path)


def test_prompts_and_completions_have_bounds_of_their_own(tmp_path: Path) -> None:
    whole = trees(STANDARD, tmp_path)
    cut = trees(STANDARD, tmp_path, max_prompt_length=3, max_completion_length=2)
    for tree, short in zip(whole, cut, strict=True):
        assert short.prompt_ids == tree.prompt_ids[-3:]
        assert short.completions == tuple(completion[:2] for completion in tree.completions)
    with pytest.raises(ConfigError, match="max_prompt_length=0 is out of range"):
        trees(STANDARD, tmp_path, max_prompt_length=0)


def test_trls_columns_of_reference_log_probs_are_ours(tmp_path: Path) -> None:
    rows = [{**row, "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.25} for row in STANDARD]
    assert trees(rows, tmp_path)[0].reference_logps == (-3.5, -4.25)
    both = [{**row, "reference_chosen_logps": -3.5, "reference_rejected_logps": -4.25} for row in rows]
    with pytest.raises(DataError, match="are both there"):
        trees(both, tmp_path)


@pytest.mark.parametrize("column", ["images", "image", "tools", "chat_template_kwargs"])
def test_columns_that_would_change_a_row_and_cannot_be_used_are_refused(column: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"column '{column}' is not empty"):
        trees([{**row, column: {"a": 1}} for row in STANDARD], tmp_path)
    assert len(trees([{**row, column: None, "score": 1.0} for row in STANDARD], tmp_path)) == len(STANDARD)
