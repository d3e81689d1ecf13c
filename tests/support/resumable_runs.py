"""A tiny LoRA run that saves checkpoints, to be gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.train.state import STATE_FILE
from support.tiny_pairs import random_pairs, tiny_llama

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(folder: Path, longest: int = 14, **changes: Any) -> DPOTrainer:
    """Four steps on random pairs, a checkpoint every second one."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    data = random_pairs(16, longest=longest)
    args = DPOConfig(**(settings | changes))
    return DPOTrainer(model=tiny_llama(), args=args, train_dataset=data, peft_config=LORA)


def logged(run: DPOTrainer) -> list[tuple[float, float]]:
    """Loss and margin of every step."""
    return [(entry["loss"], entry["rewards/margins"]) for entry in run.state.log_history if "loss" in entry]


def stored(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about its run."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
