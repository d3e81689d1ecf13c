"""Does `dpo-engine cache` build what `dpo-engine train` looks for, and tell the truth about what is on the disk?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

from safetensors.torch import load_file, save_file

from dpo_engine.cli.main import main
from dpo_engine.reference.files import EntryFile, entry_files
from dpo_engine.reference.store import ReferenceStore
from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_pairs import tiny_llama

ANIMALS = ["cat", "dog", "mat", "man", "hat"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=3, bos_token_id=0).save_pretrained(folder)
    return folder


def write_pairs(path: Path, count: int = 12) -> Path:
    rows = [
        {"prompt": f"where is the {a}?", "chosen": f"on the {b}.", "rejected": f"the {a} ran after the {b} and away."}
        for a in ANIMALS
        for b in ANIMALS
        if a != b
    ][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Cli:
    """`dpo-engine`, called in this process."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.folder, self.model, self.monkeypatch, self.capsys = folder, model, monkeypatch, capsys
        self.data = write_pairs(folder / "pairs.jsonl")
        self.cache = folder / "cache"
        self.err = ""

    def run(self, *arguments: Any) -> tuple[int, str]:
        self.monkeypatch.setattr("sys.argv", ["dpo-engine", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self.capsys.readouterr()
        self.err = captured.err
        return code, captured.out

    def json(self, verb: str, *arguments: Any, model: bool = True, expect: int = 0) -> dict[str, Any]:
        given = ["--model", self.model, "--data", self.data] if model else []
        dtype = [] if "--dtype" in arguments else ["--dtype", "float32"]
        code, out = self.run("cache", verb, *given, "--reference_cache", self.cache, *dtype, *arguments, "--json")
        assert code == expect, self.err
        (line,) = out.splitlines()
        return json.loads(line)

    def train(self, *arguments: Any) -> dict[str, Any]:
        code, out = self.run(
            "train", "--model", self.model, "--data", self.data, "--reference_cache", self.cache, "--dtype", "float32",
            "--output_dir", self.folder / "out", "--overwrite_output_dir", "--picture", "false", "--save_strategy", "no",
            "--lora_r", 4, "--per_device_train_batch_size", 4, "--disable_tqdm", "true", *arguments, "--json",
        )  # fmt: skip
        assert code == 0, self.err
        return json.loads(out.splitlines()[-1])


@pytest.fixture
def cli(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Cli:
    return Cli(tmp_path, model_folder, monkeypatch, capsys)


COUNTS = {"rows", "reused", "computed", "entries", "bad", "seconds"}


def test_build_computes_what_is_missing_and_train_finds_it(cli: Cli) -> None:
    first = cli.json("build")
    assert first.keys() >= COUNTS
    assert (first["rows"], first["reused"], first["computed"], first["entries"], first["bad"]) == (12, 0, 12, 24, 0)
    again = cli.json("build")
    assert (again["rows"], again["reused"], again["computed"]) == (12, 12, 0)
    write_pairs(cli.data, 15)
    more = cli.json("build")
    assert (more["rows"], more["reused"], more["computed"]) == (15, 12, 3)
    trained = cli.train("--num_train_epochs", 1)
    assert (trained["reference_rows_reused"], trained["reference_rows_computed"]) == (15, 0)
    assert "15 of 15 rows (30 entries) from the cache" in cli.err


def test_build_of_any_training_options_serves_any_other(cli: Cli) -> None:
    cli.json("build", "--lora_r", 8, "--beta", 0.3, "--method", "ipo", "--per_device_train_batch_size", 2, "--seed", 5)
    assert cli.json("build", "--lora_r", 0)["reused"] == 12
    assert cli.json("info", "--method", "ld_dpo")["reused"] == 12


def test_build_for_kto_computes_the_completions_that_other_rows_lend(cli: Cli) -> None:
    rows = [
        {"prompt": f"where is the {a}?", "completion": f"on the {b}.", "label": a < b} for a in ANIMALS for b in ANIMALS
    ]
    cli.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    built = cli.json("build", "--method", "kto")
    assert (built["computed"], built["entries"]) == (25, 50)
    trained = cli.train("--method", "kto", "--num_train_epochs", 1)
    assert (trained["reference_rows_reused"], trained["reference_rows_computed"]) == (25, 0)


def test_a_yaml_file_gives_the_keys(cli: Cli) -> None:
    file = cli.folder / "run.yaml"
    file.write_text(
        f"model: {cli.model}\ndata: {cli.data}\nreference_cache: {cli.cache}\ndtype: float32\noutput_dir: x\n"
    )
    code, out = cli.run("cache", "build", file, "--json")
    assert code == 0 and json.loads(out)["computed"] == 12


def test_info_counts_a_folder_and_the_rows_of_a_data_set(cli: Cli) -> None:
    empty = cli.json("info", model=False)
    assert empty.keys() >= COUNTS and empty["entries"] == 0 and empty["spaces"] == []
    cli.json("build", "--max_pairs", 5)
    found = cli.json("info", model=False)
    assert found["entries"] == 10 and found["spaces"][0]["model"] == "LlamaForCausalLM"
    rows = cli.json("info")
    assert (rows["rows"], rows["reused"], rows["computed"]) == (12, 5, 0)
    assert rows["space"] == found["spaces"][0]["address"]


def test_info_says_why_nothing_is_known(cli: Cli) -> None:
    cli.json("build")
    cli.json("info", "--dtype", "bfloat16")
    assert "nothing is known of this model as it is loaded" in cli.err
    assert "compute.dtypes: ['bfloat16'] here, ['float32'] there" in cli.err


def test_verify_checks_rows_against_the_model(cli: Cli) -> None:
    cli.json("build")
    found = cli.json("verify", "--all")
    assert found.keys() >= COUNTS
    assert (found["rows"], found["reused"], found["computed"], found["mismatched"], found["bad"]) == (12, 12, 12, 0, 0)
    assert cli.json("verify")["computed"] == 4


def test_verify_names_rows_that_are_something_else(cli: Cli) -> None:
    """Values of a slightly other model, put under this one's address."""
    address, model = cli.json("build")["space"], cli.model
    other = cli.folder / "other"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    cli.model, cli.cache = other, cli.folder / "wrong"
    wrong = cli.json("build")["space"]
    assert wrong != address
    (path,) = entry_files(cli.cache / wrong)
    target = ReferenceStore(cli.cache / address, address)
    target.put((entry, values) for entry, values in EntryFile(path, wrong).entries() if values is not None)
    cli.model = model
    found = cli.json("verify", "--all", expect=1)
    assert found["mismatched"] == 12 and found["bad"] == 0
    assert "pairs.jsonl:1 chosen: " in cli.err
    code, _ = cli.run(
        "train", "--model", cli.model, "--data", cli.data, "--reference_cache", cli.cache, "--dtype", "float32",
        "--output_dir", cli.folder / "out",
    )  # fmt: skip
    assert code == 1 and "is not what the reference says now: pairs.jsonl:" in cli.err


def test_verify_sets_damaged_entries_aside_and_says_so_with_its_exit_code(cli: Cli) -> None:
    space = cli.json("build")["space"]
    (path,) = entry_files(cli.cache / space)
    _, values = next(iter(EntryFile(path, space).entries()))
    assert values is not None
    path.write_bytes(path.read_bytes().replace(values, bytes(len(values))))
    found = cli.json("verify", model=False, expect=1)
    assert found["bad"] == 1 and found["entries"] == 23
    assert cli.json("verify", model=False)["bad"] == 0
    rebuilt = cli.json("build")
    assert (rebuilt["reused"], rebuilt["computed"]) == (11, 1)
    assert cli.json("prune", model=False)["spaces"][0]["damaged_files"] == 0


def test_merge_puts_files_and_folders_together(cli: Cli) -> None:
    cli.json("build", "--max_pairs", 5)
    cli.json("build", "--max_pairs", 8)
    here, cli.cache = cli.cache, cli.folder / "elsewhere"
    cli.json("build")
    cli.cache = here
    merged = cli.json("merge", "--from", cli.folder / "elsewhere", model=False)
    assert merged["entries"] == 24 and merged["spaces"][0]["files"] == 1
    assert cli.json("build")["reused"] == 12


def test_prune_removes_a_space_by_its_address_or_its_age(cli: Cli) -> None:
    address = cli.json("build")["space"]
    assert cli.json("prune", "--unused_days", 1, model=False)["removed"] == []
    assert cli.json("prune", "--space", address[:6], model=False)["removed"] == [address]
    assert cli.json("info", model=False)["spaces"] == []
    code, _ = cli.run("cache", "prune", "--reference_cache", cli.cache, "--space", address[:6])
    assert code == 1 and "0 spaces" in cli.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build"], "cache build needs model and data"),
        (["verify", "--all"], "give model and data"),
        (["info", "--model", "x"], "model is given without data"),
        (["info", "--reference_cache", "off"], "reference_cache: off; expected a folder"),
        (["info", "--betta", "1"], "betta is not an option; did you mean beta?"),
        (["build", "--method", "dqo"], "method='dqo' is not known"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(cli: Cli, arguments: list[str], said: str) -> None:
    code, _ = cli.run("cache", *arguments)
    assert code == 2 and said in cli.err and len(cli.err.strip().splitlines()) == 1


def test_four_betas_on_one_cache_run_the_reference_once(cli: Cli) -> None:
    found = []
    for beta in (0.05, 0.1, 0.2, 0.5):
        result = cli.train("--beta", beta, "--num_train_epochs", 1)
        found.append((result["reference_rows_reused"], result["reference_rows_computed"]))
    assert found == [(0, 12), (12, 0), (12, 0), (12, 0)]
