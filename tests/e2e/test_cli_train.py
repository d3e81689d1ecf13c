"""Does `dpo-engine train` do the whole job on a tiny model, and say in one line what it cannot do?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

from dpo_engine.cli.main import main
from dpo_engine.ops import BACKENDS
from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_pairs import tiny_llama

ANIMALS = ["cat", "dog", "mat", "man", "hat", "bat", "rat", "cow", "pig", "hen", "fox", "owl"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    tiny_llama(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), bos_token_id=0
    ).save_pretrained(folder)
    return folder


def write_pairs(path: Path, count: int = 24) -> Path:
    rows = [
        {"prompt": f"where is the {a}?", "chosen": f"on the {b}.", "rejected": f"the {a} ran after the {b} and away."}
        for a in ANIMALS
        for b in ANIMALS
        if a != b
    ][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(model_path: Path, data_path: Path, output: Path, /, **changes: Any) -> list[str]:
    settings = {
        "model": model_path,
        "data": data_path,
        "output_dir": output,
        "dtype": "float32",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_strategy": "no",
        "lora_r": 4,
        "picture": False,
    } | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `dpo-engine train ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["dpo-engine", "train", *arguments])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_trains_judges_saves_and_reports(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, held_out = write_pairs(tmp_path / "pairs.jsonl", 40), write_pairs(tmp_path / "held_out.jsonl", 8)
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "where is it?", "chosen": "here.", "rejected": "here."}) + "\n")
    arguments = flags(
        model_folder,
        data,
        tmp_path / "out",
        eval_data=held_out,
        max_steps=12,
        sample_prompts=1,
        sample_tokens=5,
        picture=True,
    )
    code, out, err = run(monkeypatch, capsys, *arguments, "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["rows_read"] == 41 and result["rows_used"] == 40
    assert result["rows_left_out"] == {"identical completions": 1}
    assert result["steps"] == 12 and result["model_path"] == str(model_folder)
    assert result["accuracy"]["before"] == 0.5 and result["margin"]["before"] == 0.0
    assert result["accuracy"]["after"] > 0.9 and result["margin"]["after"] > 0.1
    assert result["pairs_per_s"] > 0 and result["peak_rss_mb"] > 50
    assert result["peak_cuda_mb"] is None or torch.cuda.is_available()
    assert f"log-probs by the backend {result['backend']} (" in err and result["backend"] in BACKENDS[1:]
    assert "held-out reward accuracy" in err and "identical completions" in err and "Summary" not in out
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    tuned = PeftModel.from_pretrained(base, result["output_dir"])
    tokenizer = AutoTokenizer.from_pretrained(result["output_dir"])
    ids = tokenizer("where is the cat?", return_tensors="pt").input_ids
    with torch.no_grad(), tuned.disable_adapter():
        before = tuned(ids).logits
    with torch.no_grad():
        assert not torch.allclose(tuned(ids).logits, before, atol=1e-3)


def test_full_training_saves_an_ordinary_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    data = write_pairs(tmp_path / "pairs.jsonl")
    code, _, err = run(
        monkeypatch, capsys, *flags(model_folder, data, tmp_path / "out", lora_r=0, max_steps=2, dtype="bf16")
    )
    assert code == 0, err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(saved) is LlamaForCausalLM and saved.config.architectures == ["LlamaForCausalLM"]
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not torch.equal(saved.lm_head.weight, start.lm_head.weight)


def test_resume_goes_on_where_the_checkpoint_stands(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    kept = {"save_strategy": "steps", "save_steps": 3}
    whole = flags(model_folder, data, tmp_path / "whole", **kept)
    assert run(monkeypatch, capsys, *whole)[0] == 0
    output = tmp_path / "halves"
    assert run(monkeypatch, capsys, *flags(model_folder, data, output, **kept))[0] == 0
    # Take the second half away, as if the run had been cut off at step 3.
    for path in [*(output / "checkpoint-6").iterdir()]:
        path.unlink()
    (output / "checkpoint-6").rmdir()
    code, _, err = run(monkeypatch, capsys, *flags(model_folder, data, output, **kept))
    assert code == 2 and "holds checkpoint-3 of an earlier run" in err
    other = flags(model_folder, data, output, backend="reference", **kept)
    code, _, err = run(monkeypatch, capsys, *other, "--resume")
    assert code == 2 and "backend=reference, but" in err and "checkpoint-3 was trained with backend=" in err
    code, out, err = run(monkeypatch, capsys, *flags(model_folder, data, output, **kept), "--resume", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == 6

    from safetensors.torch import load_file

    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", output))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_held_out_pairs_nothing_is_claimed_about_them(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    code, out, err = run(monkeypatch, capsys, *flags(model_folder, data, tmp_path / "out", max_steps=1), "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["accuracy"] == {"before": None, "after": None} and result["held_out_rows"] == 0
    assert result["pairs_per_s"] is None  # one step, and the first one is not timed
    assert "no held-out pairs" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "./no-such-folder"}, "no such folder"),
        ({"bta": "0.1"}, "did you mean beta"),
        ({"beta": "0"}, "expected a finite number above 0"),
        ({"backend": "cuda"}, "expected one of auto, reference, tiled"),
        ({"lora_target_modules": "qproj"}, "no linear layer"),
        ({"lora_target_modules": "embed_tokens"}, "no linear layer"),
        ({"max_tokens_per_forest": "3"}, "max_tokens_per_forest=3"),
        ({"resume": "true"}, "holds no checkpoint"),
        ({"truncation": "error", "max_length": "12"}, "pairs.jsonl:1"),
    ],
)
def test_what_cannot_work_ends_with_one_line_and_exit_code_2(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    code, out, err = run(monkeypatch, capsys, *flags(model_folder, data, tmp_path / "out", **changes), "--json")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert out == "" and "Traceback" not in err


def test_broken_data_is_refused_before_the_model_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 3)
    with data.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    code, _, err = run(monkeypatch, capsys, *flags(Path("./no-such-model"), data, tmp_path / "out"))
    assert code == 2 and "pairs.jsonl:4" in err and "no-such-model" not in err


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs a path nobody can write to")
def test_an_output_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(monkeypatch, capsys, *flags(Path("m"), Path("no.jsonl"), Path("/proc/version/out")))
    assert code == 2 and "cannot be written" in err


def test_the_console_script_exits_with_the_errors_code_and_help_is_quick_to_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "dpo_engine.cli.main", "train", "--model", "m"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert (
        failed.stderr.strip()
        == "error: data=None is out of range; expected a file of preference data or a hub dataset id"
    )
    code, shown, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    for name in (
        "--model",
        "--data",
        "--beta",
        "--lora_r\n",
        "--max_length [1024]",
        "--per_device_train_batch_size",
        "--seed [42]",
    ):
        assert name in shown


def test_the_seed_decides_the_whole_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    data = write_pairs(tmp_path / "pairs.jsonl")
    adapters = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        arguments = flags(model_folder, data, tmp_path / name, seed=seed, max_steps=2)
        assert run(monkeypatch, capsys, *arguments)[0] == 0
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    first, again, other = adapters
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
