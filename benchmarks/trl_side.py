"""How long does TRL's own DPOTrainer take for the same pairs? One run in a process of its own.

    python benchmarks/trl_side.py SPEC.json        prints one JSON object; `train_vs_trl.py` writes SPEC.json

TRL is used as its documentation does: a model object, a `LoraConfig`, a `datasets.Dataset`. What it does to the text is
checked: the ids it trains on must be the ids of the specification, or the run is refused.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl import __version__ as trl_version


class TimedTrainer(DPOTrainer):
    """TRL's trainer, with a clock around its reference pass."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - begin
        return dataset


class StepClock(TrainerCallback):
    """Seconds of each optimiser step, as dpo-engine's own clock takes them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as `spec` says.

    Returns:
        Step times, TRL's log, the seconds of its reference pass, and how many positions it put through the head.
    """
    dtype = getattr(torch, spec["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model_path"])
    model = AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=dtype)
    columns = ("prompt", "chosen", "rejected")
    clock = StepClock()
    trainer = TimedTrainer(
        model=model,
        args=DPOConfig(
            output_dir=spec["output_dir"],
            precompute_ref_log_probs=spec["precompute"],
            max_length=spec["max_length"],
            beta=spec["beta"],
            learning_rate=spec["learning_rate"],
            per_device_train_batch_size=spec["batch"],
            gradient_checkpointing=spec["gradient_checkpointing"],
            num_train_epochs=1,
            max_steps=spec["max_steps"],
            train_sampling_strategy="sequential",
            seed=spec["seed"],
            bf16=spec["dtype"] == "bfloat16",
            fp16=spec["dtype"] == "float16",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=1,
            logging_first_step=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{name: pair[name] for name in columns} for pair in spec["pairs"]]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=spec["lora_r"], lora_alpha=spec["lora_alpha"], target_modules="all-linear"
        ),
        callbacks=[clock],
    )
    check_ids(trainer.train_dataset, spec["pairs"])
    trainer.train()
    history = trainer.state.log_history
    return {
        "trl": trl_version,
        "step_seconds": clock.seconds,
        "reference_seconds": trainer.reference_seconds,
        "train_seconds": history[-1]["train_runtime"],
        "log": [entry for entry in history if "loss" in entry],
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "head_positions": head_positions(trainer, len(clock.seconds)),
        "peak_cuda_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
    }


def check_ids(dataset: Dataset, pairs: list[dict[str, Any]]) -> None:
    """Refuse to go on unless TRL's tokens are the specification's, row by row."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    found = [{name: row[name] for name in names} for row in dataset]
    wanted = [{name: pair[name] for name in names} for pair in pairs]
    differ = [index for index, (mine, its) in enumerate(zip(wanted, found, strict=False)) if mine != its]
    if len(found) != len(wanted) or differ:
        raise SystemExit(
            f"error: TRL trains on other tokens: {len(found)} rows of {len(wanted)}, and rows {differ[:8]} differ in their ids"
        )


def head_positions(trainer: DPOTrainer, steps: int) -> int:
    """Rows of hidden states that TRL scores in the policy's forwards: on CUDA the completions, elsewhere every position."""
    total = 0
    for number, batch in enumerate(trainer.get_train_dataloader()):
        if number == steps:
            break
        mask = batch["completion_mask"][:, 1:]
        total += int(mask.sum()) if mask.is_cuda else mask.numel()
    return total


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    print(json.dumps(run(spec)))


if __name__ == "__main__":
    main()
