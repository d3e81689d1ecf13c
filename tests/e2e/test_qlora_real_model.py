"""Does QLoRA train the real 135M model: NF4, adapters, forests, cache, start to finish, as its weights opened would train?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("gguf")
pytest.importorskip("bitsandbytes")

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.data import load_pairs
from dpo_engine.errors import ModelError
from dpo_engine.model.adapters import add_lora
from dpo_engine.model.loading import load_model, load_tokenizer
from dpo_engine.model.smollm2 import smollm2_folder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return str(smollm2_folder())
    except ModelError as error:
        pytest.skip(f"the packaged model cannot be had here: {error}")


def trained(folder: str, output: Path, layers: int, *, in_4bit: bool, opened: bool = False) -> DPOTrainer:
    """Two steps of two pairs, judged on two others, with the cache, by the first of the model's layers."""
    model: Any = load_model(folder, dtype=torch.float32, trainable=False, in_4bit=in_4bit)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if opened:
        model = model.dequantize()
        model.requires_grad_(False)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(folder)
    train, held_out = (
        load_pairs(EXAMPLES / name, tokenizer, max_length=64, limit=limit)
        for name, limit in (("concise_train.jsonl", 4), ("concise_eval.jsonl", 2))
    )
    args = DPOConfig(
        output_dir=str(output), use_cpu=True, per_device_train_batch_size=2, max_steps=2, learning_rate=5e-4,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, gradient_checkpointing=in_4bit and not opened, reference_cache=str(output / "cache"),
    )  # fmt: skip
    policy = add_lora(model)
    trainer = DPOTrainer(
        model=policy, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("layers", [4, pytest.param(30, marks=pytest.mark.slow)])  # of 30: all take more than a minute
def test_qlora_of_the_real_model_trains_as_its_opened_weights_do_and_as_the_unquantised_learn(
    folder: str, tmp_path: Path, layers: int
) -> None:
    runs = {
        "nf4": trained(folder, tmp_path / "nf4", layers, in_4bit=True),
        "opened": trained(folder, tmp_path / "opened", layers, in_4bit=True, opened=True),
        "full": trained(folder, tmp_path / "full", layers, in_4bit=False),
    }
    losses = {name: [e["loss"] for e in run.state.log_history if "loss" in e] for name, run in runs.items()}
    judged = {name: run.evaluate() for name, run in runs.items()}
    assert runs["nf4"].layout.name == "shared" and runs["nf4"].references.filled.computed > 0
    assert all(first[0] == pytest.approx(math.log(2), abs=1e-4) for first in losses.values())
    # The same weights, held in 4 bits or opened: the same run, to rounding.
    assert losses["nf4"] == pytest.approx(losses["opened"], rel=1e-4)
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert judged["nf4"][name] == pytest.approx(judged["opened"][name], rel=1e-3), name
    # Other weights, by what rounding them to 4 bits does: another model that learns the same.
    assert judged["nf4"]["eval_rewards/accuracies"] == judged["full"]["eval_rewards/accuracies"] == 1.0
    assert 0.5 < judged["nf4"]["eval_rewards/margins"] / judged["full"]["eval_rewards/margins"] < 2
