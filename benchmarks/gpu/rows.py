"""How does one row of `train.py` train? The engine and TRL on the same pairs, on a model that is only borrowed."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, set_seed

from benchmarks.gpu.model import make_tokenizer
from benchmarks.harness import one_line, reset_peak_rss, rss_mb
from benchmarks.ops.implementations import peer_errors
from benchmarks.steps.rows import missing_packages
from benchmarks.steps.watch import OutOfTime, StepWatch

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train on the pairs."""

    side: str  # engine or trl
    precompute: bool
    checkpointing: bool
    micro: int | None = None  # pairs in TRL's micro-batch; the engine is given a step and packs it
    liger: bool = False  # Liger's norms, rope and activations; what it replaces stays replaced, so such rows come last


# In the order in which they are measured: what the targets need comes first.
ROWS = {
    "engine": Row(side="engine", precompute=True, checkpointing=True),
    "trl_default": Row(side="trl", precompute=False, checkpointing=True, micro=8),
    "trl_precomputed": Row(side="trl", precompute=True, checkpointing=True, micro=8),
    "engine_stored": Row(side="engine", precompute=True, checkpointing=False),
    "trl_stored": Row(side="trl", precompute=True, checkpointing=False, micro=2),
    "engine_default": Row(side="engine", precompute=False, checkpointing=False),
    "engine_liger": Row(side="engine", precompute=True, checkpointing=True, liger=True),
}
USUAL = tuple(name for name, row in ROWS.items() if not row.liger)
"""Rows that leave the model as it was."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every row is told alike."""

    weights: str
    device: str
    dtype: torch.dtype
    step: int  # pairs a step
    steps: int  # the first is not timed
    max_length: int
    forest_tokens: int | None
    limit_s: float  # of one row
    optim: str = "adamw_torch_fused"
    micro: int | None = None  # pairs in TRL's micro-batch, instead of the row's


def run_row(name: str, model: nn.Module, pairs: list[Record], settings: Settings, until: float) -> Record:
    """Train in one way, and leave the model as it was.

    Returns:
        What was measured, or in `status` why nothing was.
    """
    row = ROWS[name]
    why = missing_packages("trl", "datasets") if row.side == "trl" else None
    if row.liger:
        why = missing_packages("liger_kernel") or ("n/a: needs a CUDA device" if settings.device != "cuda" else None)
    if why:
        return {"status": why}
    watch = StepWatch(model.get_input_embeddings(), until=until)  # type: ignore[operator]
    _reset_peak(settings.device)
    try:
        with borrowed(model), tempfile.TemporaryDirectory(prefix="dpo-gpu-") as folder:
            side = _with_engine if row.side == "engine" else _with_trl
            trainer = side(row, model, pairs, settings, folder, watch)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            log = next(entry for entry in trainer.state.log_history if "loss" in entry)
            found = {
                "status": "measured",
                "pairs_per_s": watch.pairs_per_s(settings.step),
                "step_seconds": watch.seconds,
                "step_tokens": watch.tokens,
                "reference_s": trainer.reference_seconds,
                "first_loss": log["loss"],
                "first_chosen": log["logps/chosen"],
                "first_rejected": log["logps/rejected"],
                "first_grad_norm": log["grad_norm"],
                "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                "peak_mb": _peak_mb(settings.device),
                "reserved_mb": torch.cuda.max_memory_reserved() / 2**20 if settings.device == "cuda" else None,
                **({"layout": trainer.layout.name, "lines": trainer.lines()} if row.side == "engine" else {}),
            }
            del trainer
            return found
    except OutOfTime as late:
        return {"status": f"not measured: {late}"}
    except peer_errors() as error:
        return {"status": f"failed: {one_line(error)}"}
    finally:
        watch.close()


def _with_engine(
    row: Row, model: nn.Module, pairs: list[Record], settings: Settings, folder: str, watch: StepWatch
) -> Any:
    from benchmarks.steps.engine import pair_data
    from dpo_engine import DPOConfig, DPOTrainer

    set_seed(0)  # TRL does it before it draws the adapters
    return DPOTrainer(
        model=model,
        args=DPOConfig(
            **common_arguments(settings, folder),
            per_device_train_batch_size=settings.step,
            gradient_checkpointing=row.checkpointing,
            precompute_ref_log_probs=row.precompute,
            reference_cache="off",
            max_tokens_per_forest=settings.forest_tokens,
            use_liger_kernel="on" if row.liger else "off",
        ),
        train_dataset=pair_data(pairs),
        peft_config=lora(),
        callbacks=[watch],
    )


def _with_trl(
    row: Row, model: nn.Module, pairs: list[Record], settings: Settings, folder: str, watch: StepWatch
) -> Any:
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig
    from trl.trainer import dpo_trainer

    from benchmarks.steps.trl import TimedTrainer, check_ids

    disable_progress_bars()
    micro = min(settings.micro or row.micro or settings.step, settings.step)
    if settings.step % micro:
        raise ValueError(f"a step of {settings.step} pairs is no multiple of TRL's micro-batch of {micro}")
    # Before it precomputes, TRL copies the model to the host and hashes it as float32, for the name of a cache file. That is no
    # part of a step, and there is no time for it here.
    unhashed = patch.object(dpo_trainer, "hash_module", lambda module: "not hashed")
    with unhashed, patch.dict(os.environ, TQDM_DISABLE="1"):
        trainer = TimedTrainer(
            model=model,
            args=DPOConfig(
                **common_arguments(settings, folder),
                report_to="none",
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=settings.step // micro,
                gradient_checkpointing=row.checkpointing,
                precompute_ref_log_probs=row.precompute,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=make_tokenizer(),
            peft_config=lora(),
            callbacks=[watch],
        )
    check_ids(trainer, pairs)
    return trainer


def common_arguments(settings: Settings, folder: str) -> Record:
    """What both sides' configurations are given."""
    on_gpu = settings.device == "cuda"
    return {
        "output_dir": folder,
        "max_length": settings.max_length,
        "max_steps": settings.steps,
        "learning_rate": 5e-6,
        "optim": settings.optim,
        "train_sampling_strategy": "sequential",
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "logging_first_step": True,
        "logging_steps": 1000,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """After it, what trainers put on a model is gone: adapters, forwards, attention, hooks, checkpointing."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from dpo_engine.model.forest_attention import restore_attention
    from dpo_engine.model.scoring import unbind_scoring

    embedding = model.get_input_embeddings()
    hooks, attributes = set(embedding._forward_hooks), set(model.__dict__)
    try:
        yield
    finally:
        unbind_scoring(model)
        restore_attention(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                model.set_submodule(name, module.get_base_layer())
            elif hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        for number in set(embedding._forward_hooks) - hooks:
            del embedding._forward_hooks[number]
        for name in set(model.__dict__) - attributes:  # TRL's forward among them
            del model.__dict__[name]
        model.requires_grad_(False).eval()


def _reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_rss()


def _peak_mb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else rss_mb(peak=True)
