"""Do the example loops train as DPO written in plain lines over full logits does?"""

from __future__ import annotations

import ast
import importlib.util
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import peft

from support.imports import ROOT
from support.naive_dpo import NaiveRun, train_naively
from support.small_tokenizers import small_tokenizer
from support.tiny_pairs import random_pairs, tiny_llama

STEPS, PAIRS, LR, BETA, ADAPTER_SEED = 4, 3, 5e-3, 0.5, 7
TREES = random_pairs(STEPS * PAIRS).trees
BATCHES = [TREES[start : start + PAIRS] for start in range(0, len(TREES), PAIRS)]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def naive_full() -> NaiveRun:
    return train_naively(tiny_llama().train(), BATCHES, beta=BETA, lr=LR)


@pytest.fixture(scope="module")
def naive_lora() -> NaiveRun:
    model, config = tiny_llama(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(ADAPTER_SEED)
    return train_naively(peft.get_peft_model(model, config).train(), BATCHES, beta=BETA, lr=LR)


@pytest.fixture
def same_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's first weights are drawn; the examples draw those that the naive run drew."""
    real = peft.get_peft_model

    def seeded(model: Any, config: Any) -> Any:
        torch.manual_seed(ADAPTER_SEED)
        return real(model, config)

    monkeypatch.setattr(peft, "get_peft_model", seeded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, as a script would be given it."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(path)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(path)
    return path


def assert_the_losses_are(expected: list[float], found: list[float]) -> None:
    assert len(found) == STEPS and expected[0] == pytest.approx(math.log(2))
    assert abs(expected[-1] - expected[0]) > 0.01, "the steps changed nothing that a loss would show"
    assert found == pytest.approx(expected, rel=1e-4)


def run_as_a_script(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "examples" / f"{name}.py"
    data = str(ROOT / "examples" / "concise_train.jsonl")
    monkeypatch.setattr(sys, "argv", [str(script), "--data", data, *arguments])
    runpy.run_path(str(script), run_name="__main__")


def test_the_plain_loop(naive_full: NaiveRun) -> None:
    losses = list(example("plain_loop").train(tiny_llama(), TREES, STEPS, PAIRS, LR, BETA))
    assert_the_losses_are(naive_full.losses, losses)


def test_the_plain_loop_is_thirty_lines_of_code() -> None:
    tree = ast.parse((ROOT / "examples" / "plain_loop.py").read_text("utf-8"))
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    code = {node.lineno for node in ast.walk(tree) if hasattr(node, "lineno")} - docstrings
    assert len(code) <= 30


def test_the_accelerate_loop(naive_full: NaiveRun) -> None:
    from accelerate import Accelerator

    losses = example("accelerate_loop").train(tiny_llama(), TREES, Accelerator(cpu=True), STEPS, PAIRS, LR, BETA)
    assert_the_losses_are(naive_full.losses, losses)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_transformers_trainer(accumulated: int, naive_lora: NaiveRun, same_adapters: None, tmp_path: Path) -> None:
    losses = example("transformers_trainer").train(
        tiny_llama(),
        TREES,
        str(tmp_path),
        beta=BETA,
        learning_rate=LR,
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS // accumulated,
        gradient_accumulation_steps=accumulated,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    assert_the_losses_are(naive_lora.losses, losses)


def test_the_lightning_module(naive_lora: NaiveRun, same_adapters: None) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    losses = example("lightning_module").train(tiny_llama(), TREES, STEPS, PAIRS, beta=BETA, lr=LR)
    assert_the_losses_are(naive_lora.losses, losses)


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "transformers_trainer", "lightning_module"])
def test_it_runs_as_a_script(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="lightning is not installed")
    more = ["--output", str(tmp_path)] if name == "transformers_trainer" else []
    run_as_a_script(name, ["--model", str(folder), *more], monkeypatch)
    assert "0.693" in capsys.readouterr().out
