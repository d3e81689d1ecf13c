"""Does `dpo-engine inspect` account for a file as training would, without weights, and show any row's tokens?"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from dpo_engine.cli.app import inspect as inspect_verb
from dpo_engine.cli.inspect import model_cost
from dpo_engine.cli.main import main
from dpo_engine.data import load_pairs
from dpo_engine.data.inspection import training_order
from dpo_engine.train.config import DPOConfig
from dpo_engine.train.run import TrainConfig
from dpo_engine.train.trainer import DPOTrainer
from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_models import tiny_model
from support.tiny_pairs import random_pairs, tiny_llama

ROWS = [
    {"prompt": f"where is the {animal}?", "chosen": f"on the {animal}.", "rejected": f"the {animal} ran away from us."}
    for animal in ("cat", "dog", "mat", "man", "hat", "bat", "rat", "cow", "pig", "hen", "fox", "owl")
] * 3
IDENTICAL = {"prompt": "where is it?", "chosen": "here.", "rejected": "here."}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer: no weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer)).config.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, IDENTICAL, *ROWS[:3]]), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_colour_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `dpo-engine inspect ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["dpo-engine", "inspect", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_the_report_accounts_for_rows_and_tokens_without_weights(
    model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not list(model_folder.glob("*.safetensors"))
    code, out, err = run(monkeypatch, capsys, data, "--model", model_folder, "--json")
    assert code == 0, err
    [line] = out.splitlines()
    found = json.loads(line)
    pairs = load_pairs(data, small_tokenizer(chat_template=CHATML), max_length=1024)
    assert found["schema"] == 1 and found["model_path"] == str(model_folder) and found["source"] == str(data)
    assert (found["rows_read"], found["rows_used"]) == (40, 39)
    assert found["rows_left_out"] == {"identical completions": 1}
    shared = sum(len(tree.prompt_ids) + sum(len(ids) - 1 for ids in tree.completions) for tree in pairs)
    assert found["layouts"]["shared"]["tokens"] == shared
    assert found["layouts"]["shared"]["tokens"] < found["layouts"]["packed"]["tokens"]
    assert found["layouts"]["packed"]["tokens"] < found["layouts"]["padded"]["tokens"]
    assert (found["repeated_prompts"], found["pairs_with_repeated_prompts"]) == (12, 39)
    assert 1 < found["predicted_speed"]["shared_over_packed"] < found["predicted_speed"]["shared_over_padded"]
    for text in (
        "39 of 40 rows used",
        "left out: 1 identical completions (pairs.jsonl:37)",
        "12 prompts occur in more than one pair, in 39 pairs together",
        "rectangles of 16 rows (8 pairs)",
    ):
        assert text in err


def test_flags_change_what_is_read_and_how_it_is_batched(
    model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def numbers(*flags: str) -> dict[str, Any]:
        code, out, err = run(monkeypatch, capsys, data, "--model", model_folder, "--json", *flags)
        assert code == 0, err
        return json.loads(out)

    whole = numbers()
    assert numbers("--max_length", "none") == whole
    few = numbers("--max-pairs", "5", "--per_device_train_batch_size=2")
    assert few["rows_used"] == 5 and few["rows_left_out"] == {
        "identical completions": 1,
        "beyond limit": 34,
    }
    assert few["batch_size"] == 2
    cut = numbers("--max_length", "18", "--truncation", "keep_end")
    assert cut["truncated"] > 0 and cut["lengths"]["prompt"]["most"] < whole["lengths"]["prompt"]["most"]
    plain = numbers("--chat-template", "off")
    assert plain["lengths"]["prompt"]["most"] < whole["lengths"]["prompt"]["most"]
    assert "plain text" in plain["format"]
    with data.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    code, _, err = run(monkeypatch, capsys, data, "--model", model_folder)
    assert code == 2 and "pairs.jsonl:41: broken JSON" in err
    assert numbers("--skip_bad_rows")["rows_left_out"]["could not be parsed"] == 1


def test_defaults_are_those_of_training() -> None:
    defaults = {field: inspect.signature(inspect_verb).parameters[field].default for field in ("seed", "max_pairs")}
    ours = {name: parameter.default for name, parameter in inspect.signature(inspect_verb).parameters.items()}
    train = TrainConfig(model="m", data="d", output_dir="o")
    assert defaults == {"seed": train.seed, "max_pairs": train.max_pairs}
    assert ours["split"] == train.data_split and ours["max_length"] == str(train.max_length)
    assert ours["truncation"] == train.truncation and ours["chat_template"] == train.chat_template
    assert ours["batch_size"] == train.per_device_train_batch_size and ours["skip_bad_rows"] == train.skip_bad_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_length", "many"], "max_length='many'; expected a number of tokens, or none"),
        (["--truncation", "middle"], "truncation is 'middle'"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 is out of range"),
        (["--row", "37"], "pairs.jsonl:37 is left out: identical completions"),
        (["--row", "41"], "has no row 41; its last is pairs.jsonl:40"),
        (["--row", "1", "--max_length", "5"], "pairs.jsonl:1 is left out: completion lost by truncation"),
        (["--model", "./no-such-model"], "no such folder"),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_exit_code_2(
    model_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    model = [] if "--model" in arguments else ["--model", str(model_folder)]
    code, out, err = run(monkeypatch, capsys, data, *model, *arguments)
    assert code == 2 and out == "" and len(err.splitlines()) == 1, err
    assert err.startswith("error: ") and message in err


def test_a_row_is_shown_with_marks_where_there_is_no_colour(
    model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, data, "--model", model_folder, "--row", "2")
    assert code == 0, err
    assert out.startswith("pairs.jsonl:2, ") and "\x1b" not in out
    tree = load_pairs(data, small_tokenizer(chat_template=CHATML), max_length=1024)[1]
    head, prompt, chosen, rejected = out.split("\n\n")
    assert "[scored] (not scored) *special" in head
    assert prompt.startswith(f"prompt: {len(tree.prompt_ids)} tokens, 0 scored\n(*<|im_start|>)(user)(↵)\n")
    assert "(·dog)" in prompt and "[" not in prompt
    assert chosen.startswith(
        f"chosen: {len(tree.completions[0])} tokens, {len(tree.completions[0])} scored\n[on][·the]"
    )
    assert rejected.rstrip().endswith("[*<|im_end|>]") and "(" not in rejected
    marked = re.findall(r"\[([^]]*)\]", chosen)
    assert len(marked) == len(tree.completions[0])
    code, out, _ = run(monkeypatch, capsys, data, "--model", model_folder, "--row", "2", "--ids")
    ids = [int(number) for number in re.findall(r":(\d+)\]", out.split("\n\n")[2])]
    assert code == 0 and ids == tree.completions[0]


def test_a_row_is_coloured_on_a_terminal_unless_colour_is_not_wanted(
    model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = run(monkeypatch, capsys, data, "--model", model_folder, "--row", "2")
    prompt, chosen = out.split("\n\n")[1:3]
    assert "\x1b[2m·dog\x1b[0m" in prompt and "\x1b[30;42m" not in prompt
    assert "\x1b[30;42mon\x1b[0m\x1b[30;46m·the\x1b[0m" in chosen and "[on]" not in chosen
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = run(monkeypatch, capsys, data, "--model", model_folder, "--row", "2")
    assert "\x1b[3" not in out and "[on][·the]" in out


def test_turns_of_others_are_told_from_scored_ones(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [("assistant", "on the mat"), ("user", "and the dog"), ("assistant", "the dog ran")]
    row = {
        "prompt": [{"role": "user", "content": "where is the cat?"}],
        "chosen": [{"role": role, "content": content} for role, content in turns],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    path = tmp_path / "turns.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    code, out, err = run(monkeypatch, capsys, path, "--model", model_folder, "--row", "1")
    assert code == 0, err
    chosen = out.split("\n\n")[2].replace("\n", "")
    assert "[·mat][*<|im_end|>](↵)(*<|im_start|>)(user)(↵)(an)(d)" in chosen
    assert "(·dog)(*<|im_end|>)(↵)" in chosen and "(assistant)(↵)[the][·dog]" in chosen
    code, out, _ = run(monkeypatch, capsys, path, "--model", model_folder, "--json")
    found = json.loads(out.splitlines()[-1])
    data = load_pairs(path, small_tokenizer(chat_template=CHATML), max_length=None)
    assert found["scored_tokens"] == sum(map(sum, data[0].scored)) < sum(map(len, data[0].completions))
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = run(monkeypatch, capsys, path, "--model", model_folder, "--row", "1")
    assert "\x1b[90muser\x1b[0m" in out.split("\n\n")[2]


def test_a_row_as_json_holds_every_token(
    model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, data, "--model", model_folder, "--row", "40", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    tree = load_pairs(data, small_tokenizer(chat_template=CHATML), max_length=1024)[38]
    assert found["schema"] == 1 and found["origin"] == tree.origin == "pairs.jsonl:40"
    for name, ids in zip(("prompt", "chosen", "rejected"), (tree.prompt_ids, *tree.completions), strict=True):
        assert [index for piece in found[name] for index in piece["ids"]] == ids
        assert {piece["scored"] for piece in found[name]} == {name != "prompt"}
    assert [piece["text"] for piece in found["chosen"]][-1] == "<|im_end|>" and found["chosen"][-1]["special"]


def test_the_order_of_rectangles_is_the_order_of_training(tmp_path: Path) -> None:
    data = random_pairs(11)
    args = DPOConfig(
        output_dir=str(tmp_path), seed=5, per_device_train_batch_size=3, num_train_epochs=1, save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(model=tiny_llama(), args=args, train_dataset=data)
    collate, seen = trainer.data_collator, []

    def recorded(trees: list[Any]) -> Any:
        seen.append([tree.origin for tree in trees])
        return collate(trees)

    trainer.data_collator = recorded
    trainer.train()
    order = [data[index].origin for index in training_order(11, 5)]
    assert seen == [order[start : start + 3] for start in range(0, 11, 3)]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mixtral"])
def test_predicted_arithmetic_is_what_a_counter_of_operations_counts(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    options = {"experts_implementation": "eager"} if name == "Mixtral" else {}
    model = tiny_model(name, attn_implementation="eager", **options)
    cost = model_cost(model.config)
    for length in (8, 32):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.arange(length)[None] % 90, use_cache=False)
        expected = cost.per_token * length + cost.per_attended * length**2 + cost.per_scored * length
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_labelled_completions_are_inspected_for_kto_with_their_baseline(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"where is the {n}", "completion": "on the mat", "label": n % 4 == 0} for n in range(20)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = run(monkeypatch, capsys, path, "--model", model_folder)
    assert code == 2 and out == "" and "method 'dpo' needs pairs; set method: kto" in err
    code, out, err = run(monkeypatch, capsys, path, "--model", model_folder, "--method", "kto", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["labels"] == {
        "desirable": 5, "undesirable": 15, "desirable_weight": 3.0, "undesirable_weight": 1.0
    }  # fmt: skip
    trees = load_pairs(path, small_tokenizer(chat_template=CHATML), max_length=None, kind="unpaired").trees
    assert found["scored_tokens"] == sum(2 * len(tree.completions[0]) for tree in trees)  # all alike, so all lent alike
    assert "each row is computed with another prompt's completion besides" in err and found["rows_used"] == 20
    code, out, _ = run(monkeypatch, capsys, path, "--model", model_folder, "--method", "kto", "--row", "2")
    assert code == 0 and "\nundesirable: " in out and "chosen" not in out
    code, out, err = run(monkeypatch, capsys, path, "--model", model_folder, "--method", "ktoo")
    assert code == 2 and "method='ktoo' is not known" in err


def test_ranked_lists_are_inspected_with_their_lengths_and_ties(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "where is it", "completions": ["on the mat", "no", "the cat"], "scores": [1, 3, score]}
        for score in (1, 2, 3)
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for method in ("plackett_luce", "dpo"):
        code, out, err = run(monkeypatch, capsys, path, "--model", model_folder, "--method", method, "--json")
        assert code == 0, err
        found = json.loads(out.splitlines()[-1])
        assert found["lists"] == {"completions": {"3": 3}, "with_ties": 2} and found["labels"] is None
        assert "ranked lists by scores (higher is better)" in found["format"]
    code, out, _ = run(monkeypatch, capsys, path, "--model", model_folder, "--row", "1")
    assert code == 0
    heads = [part.splitlines()[0].split(":")[0] for part in out.split("\n\n")[1:]]
    assert heads == ["prompt", "completion 1, rank 0", "completion 2, rank 1", "completion 3, rank 1"]
    code, _, err = run(monkeypatch, capsys, path, "--model", model_folder, "--method", "kto")
    assert code == 2 and "method 'kto' needs completions that are labelled" in err
