"""Does the packaged 135M model learn a real preference, from a loss of log 2, in a few steps?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("gguf")

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


def test_a_few_steps_teach_the_real_model_to_prefer_concise_answers(folder: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    model = add_lora(load_model(folder, dtype=torch.float32, trainable=False))
    train, held_out = (
        load_pairs(EXAMPLES / name, tokenizer, max_length=256, limit=limit)
        for name, limit in (("concise_train.jsonl", 12), ("concise_eval.jsonl", 6))
    )
    args = DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        precompute_ref_log_probs=True,
    )
    trainer = DPOTrainer(model=model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] > 0.8
    assert metrics["eval_rewards/margins"] > 0.2
    assert metrics["eval_loss"] < 0.65
