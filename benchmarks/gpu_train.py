"""How fast does a Llama-3.1-8B-shaped model train with DPO on this card: the engine beside TRL, in one run?

    make gpu PART=train                                                both kinds of weights, in under six minutes
    make gpu PART=train GPU_ARGS='--lengths ultrafeedback --limit_s 90'        all of the time for one data set
    python benchmarks/gpu_train.py --weights nf4 --tiny                the same on two small layers, on a CPU

All rows train on the same random pairs (`gpu_pairs.py`), in the same order, in steps of as many pairs, on one model that is
built once (`gpu_model.py`). pairs/s is over the steps after the first; a reference that is precomputed stands beside. Rows must
start at ln 2 and at the same log-probs, or none of the group is printed. Peak memory is the allocator's, the model included.
Utilisation is model FLOPs (`train_flops.py`) by the rate of a large product measured here, and by the datasheet's.

A row that does not fit its time reads "not measured", a package that is not there "n/a". Targets read "met" or "missed".
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_model import WEIGHTS, llama_config, make_model, make_tokenizer
from gpu_pairs import LENGTHS, draw_pairs
from gpu_tables import show
from harness import ROOT, one_line, reset_peak_rss, rss_mb
from peft import LoraConfig
from roofline import card_of
from torch import nn
from train_flops import gemm_tflops, model_flops
from train_rows import missing_packages
from train_watch import OutOfTime, StepWatch
from transformers import PrinterCallback, set_seed

sys.path.insert(0, str(ROOT))

from op_implementations import peer_errors

Record = dict[str, Any]
LEAST_S = 5.0  # no row starts with less


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train on the pairs."""

    side: str  # engine or trl
    precompute: bool
    checkpointing: bool
    micro: int | None = None  # pairs in TRL's micro-batch; the engine is given a step and packs it


# In the order in which they are measured: what the targets need comes first.
ROWS = {
    "engine": Row(side="engine", precompute=True, checkpointing=True),
    "trl_default": Row(side="trl", precompute=False, checkpointing=True, micro=8),
    "trl_precomputed": Row(side="trl", precompute=True, checkpointing=True, micro=8),
    "engine_stored": Row(side="engine", precompute=True, checkpointing=False),
    "trl_stored": Row(side="trl", precompute=True, checkpointing=False, micro=2),
    "engine_default": Row(side="engine", precompute=False, checkpointing=False),
}


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


# ---- one row ----


def run_row(name: str, model: nn.Module, pairs: list[Record], settings: Settings, until: float) -> Record:
    """Train in one way, and leave the model as it was.

    Returns:
        What was measured, or in `status` why nothing was.
    """
    row = ROWS[name]
    why = missing_packages("trl", "datasets") if row.side == "trl" else None
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
    from train_engine import pair_data

    from dpo_engine import DPOConfig, DPOTrainer

    set_seed(0)  # TRL does it before it draws the adapters
    return DPOTrainer(
        model=model,
        args=DPOConfig(
            **common_arguments(settings, folder),
            per_device_train_batch_size=settings.step,
            gradient_checkpointing=row.checkpointing,
            precompute_ref_log_probs=row.precompute,
            max_tokens_per_forest=settings.forest_tokens,
        ),
        train_dataset=pair_data(pairs),
        peft_config=lora(),
        callbacks=[watch],
    )


def _with_trl(
    row: Row, model: nn.Module, pairs: list[Record], settings: Settings, folder: str, watch: StepWatch
) -> Any:
    from datasets import Dataset, disable_progress_bars
    from train_trl import TimedTrainer, check_ids
    from trl import DPOConfig
    from trl.trainer import dpo_trainer

    disable_progress_bars()
    micro = min(row.micro or settings.step, settings.step)
    # Before it precomputes, TRL copies the model to the host and hashes it for the name of a cache file. That takes longer than
    # what is measured here and is no part of a step, so it is left out.
    with patch.object(dpo_trainer, "hash_module", lambda module: "not hashed"):
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


# ---- all rows ----


def measure(
    groups: Sequence[str],
    rows: Sequence[str],
    run: Callable[[str, str, float], Record],
    *,
    limit_s: float,
    until: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Record]:
    """A record of every row of every group, in order; what finds no time is said to be not measured.

    Args:
        groups: names of `LENGTHS`.
        rows: names of `ROWS`.
        run: group, row and the time by `clock` at which it must be done -> its figures.
        limit_s: of one row.
        until: of all, by `clock`. A group gets its share of what is left.
    """
    for number, group in enumerate(groups):
        share = clock() + (until - clock()) / (len(groups) - number)
        for row in rows:
            left = min(share - clock(), limit_s)
            if left < LEAST_S:
                found: Record = {"status": "not measured: the time that was given is used up"}
            else:
                found = run(group, row, clock() + left)
            yield {"lengths": group, "row": row, **vars(ROWS[row]), **found}


def with_rates(record: Record, config: Any, pairs: list[Record], settings: Settings, peaks: Record) -> Record:
    """The record with tokens/s and utilisation beside pairs/s, of the timed pairs."""
    if record["status"] != "measured" or not record["pairs_per_s"]:
        return record
    timed, seconds = pairs[settings.step : settings.step * settings.steps], sum(record["step_seconds"])
    flops = model_flops(
        config, timed, trainable=record["trainable_parameters"], shared=record.get("layout") == "shared"
    )
    rates = {
        "computed_tokens_per_s": sum(record["step_tokens"][1:]) / seconds,
        "data_tokens_per_s": sum(len(ids) for pair in timed for ids in pair.values()) / seconds,
        "model_tflops_per_s": flops / seconds * 1e-12,
    }
    for name in ("measured", "published"):
        peak = peaks[f"{name}_peak_tflops"]
        rates[f"utilisation_of_{name}"] = rates["model_tflops_per_s"] / peak if peak else None
    return record | rates


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--weights", default="bf16", choices=list(WEIGHTS))
    made.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    made.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    made.add_argument("--step", type=int, default=16, help="pairs a step")
    made.add_argument("--steps", type=int, default=3, help="the first is not timed")
    made.add_argument("--max_length", type=int, default=1024)
    made.add_argument("--forest_tokens", type=int, help="max_tokens_per_forest of the engine; default: its own")
    made.add_argument("--limit_s", type=float, default=45.0, help="seconds of one row")
    made.add_argument("--budget_s", type=float, default=float("inf"), help="seconds of all rows")
    made.add_argument("--device", default=default_device, choices=["cuda", "cpu"])
    made.add_argument("--tiny", action="store_true", help="two small layers and short pairs, in float32 on a CPU")
    made.add_argument("--records", type=Path, help="add each record to this file at once")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.perf_counter()
    os.environ["TQDM_DISABLE"] = "1"  # TRL asks for it
    made = parser()
    args = made.parse_args(arguments)
    if args.steps < 2:
        made.error(f"--steps {args.steps}; expected at least 2, the first is not timed")
    settings = Settings(
        weights=args.weights,
        device=args.device,
        dtype=torch.bfloat16 if args.device == "cuda" else torch.float32,
        step=args.step,
        steps=args.steps,
        max_length=args.max_length // 8 if args.tiny else args.max_length,
        forest_tokens=args.forest_tokens,
        limit_s=args.limit_s,
    )
    config = llama_config(tiny=args.tiny)
    common = {
        "weights": args.weights,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "pairs": args.step * args.steps,
        "pairs_per_step": args.step,
        "max_length": settings.max_length,
        "tiny": args.tiny,
    }
    if args.weights == "nf4" and missing_packages("bitsandbytes"):
        records = [
            {**common, "lengths": n, "row": None, "status": missing_packages("bitsandbytes")} for n in args.lengths
        ]
        _keep(records, args.records)
        print(show(records))
        return 0
    peaks = peak_rates(settings, tiny=args.tiny)
    _say(f"building the model, {args.weights}")
    model = make_model(config, args.weights, args.device, settings.dtype)
    drawn = {
        name: draw_pairs(
            LENGTHS[name],
            args.step * args.steps,
            vocabulary=config.vocab_size,
            max_length=settings.max_length,
            scale=1 / 8 if args.tiny else 1.0,
        )
        for name in args.lengths
    }

    def run(group: str, row: str, until: float) -> Record:
        _say(f"{args.weights}, {group}: {row}")
        return run_row(row, model, drawn[group], settings, until)

    records = []
    found = measure(args.lengths, args.rows, run, limit_s=args.limit_s, until=begin + args.budget_s)
    for record in found:
        full = {**common, **peaks, **with_rates(record, config, drawn[record["lengths"]], settings, peaks)}
        _keep([full], args.records)
        records.append(full)
    print(show(records))
    return 1 if any(r["side"] == "engine" and r["status"].startswith("failed") for r in records) else 0


def peak_rates(settings: Settings, *, tiny: bool) -> Record:
    """TFLOP/s of this device in the rows' dtype: of a large product, and by the datasheet where the card is known."""
    card = card_of(torch.cuda.get_device_name() if settings.device == "cuda" else None)
    return {
        "measured_peak_tflops": gemm_tflops(settings.device, settings.dtype, 128 if tiny else 8192),
        "published_peak_tflops": card.tflops if card else None,
    }


def _keep(records: Sequence[Record], path: Path | None) -> None:
    if path:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
