"""Training runs on a reference cache, small enough to be made again with one thing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.reference.filling import Filled
from support.tiny_pairs import random_pairs, tiny_llama

PAIRS = 12


def lora(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def make(folder: Path, *, model: Any = None, data: Any = None, rank: int = 4, **changes: Any) -> DPOTrainer:
    """A run of three steps that would use the cache in `folder`; `changes` are config keys or arguments of the trainer."""
    own = {name: changes.pop(name) for name in ("ref_model", "processing_class", "reference_cache") if name in changes}
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "max_tokens_per_forest": 64,
    }
    return DPOTrainer(
        model=tiny_llama() if model is None else model,
        args=DPOConfig(**(settings | changes)),
        train_dataset=random_pairs(PAIRS) if data is None else data,
        peft_config=lora(rank) if rank else None,
        **({"reference_cache": folder / "cache"} | own),
    )


def known(folder: Path, **changes: Any) -> Filled:
    """What was reused and what computed to have the reference of all pairs at hand."""
    run = make(folder, **changes)
    run.know_reference()
    return run.references.filled


def known_by_one_of_many(number: int, folder: Path) -> None:
    """`known` of 120 pairs, in a process beside others that do the same; what it reused and computed goes into a file."""
    found = known(folder, data=random_pairs(120), max_tokens_per_forest=40)
    (folder / f"{number}.txt").write_text(f"{found.reused} {found.computed}")


def logged(run: DPOTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def forward_calls(model: torch.nn.Module) -> list[int]:
    """A list that gets an entry at every forward of the model's decoder."""
    calls: list[int] = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator,union-attr]
    return calls
