"""How long does TRL's own DPOTrainer take for given pairs? One run in a process of its own.

    python -m benchmarks.steps.trl SPEC.json        prints one JSON object; `run.py` writes SPEC.json

TRL is used as its documentation does: a model object, a `LoraConfig`, a `datasets.Dataset`. It is handed token ids instead of
text, because it appends an end token to what truncation has cut; what its collator makes of them is compared with the
specification, row by row, and the run is refused where it differs.

On CUDA its fused head scores the completions only; elsewhere every position. `compaction` makes it do on a CPU what it does on
CUDA, by answering for `trl.trainer.utils._use_triton` at the one place that asks there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl import __version__ as trl_version
from trl.trainer import utils as trl_utils

from benchmarks.steps.watch import Refused, StepWatch, peak_cuda_mb

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class TimedTrainer(DPOTrainer):
    """TRL's trainer on token ids, with a clock around its reference pass."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - begin
        return dataset


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as `spec` says.

    Returns:
        Step times and tokens, TRL's log, the seconds of its reference pass, and how many rows its head was given in training.
    """
    model = AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=getattr(torch, spec["dtype"]))
    watch = StepWatch(model.get_input_embeddings())
    with compaction(spec["compaction"]), counted_head_rows() as rows:
        trainer = TimedTrainer(
            model=model,
            args=config(spec),
            train_dataset=Dataset.from_list([{name: pair[name] for name in IDS} for pair in spec["pairs"]]),
            processing_class=AutoTokenizer.from_pretrained(spec["model_path"]),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=spec["lora_r"], lora_alpha=spec["lora_alpha"], target_modules="all-linear"
            ),
            callbacks=[watch],
        )
        check_ids(trainer, spec["pairs"])
        trainer.train()
    watch.close()
    scored = sum(len(pair[name]) for pair in spec["pairs"] for name in IDS[1:])
    if spec["compaction"] and sum(rows) != scored:
        raise Refused(f"TRL's head was given {sum(rows)} rows; with compaction expected the {scored} scored ones")
    return {
        "trl": trl_version,
        "step_seconds": watch.seconds,
        "step_tokens": watch.tokens,
        "pairs_per_s": watch.pairs_per_s(spec["batch"]),
        "reference_s": trainer.reference_seconds,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_cuda_mb": peak_cuda_mb(),
        "head_rows": sum(rows),
    }


def config(spec: dict[str, Any]) -> DPOConfig:
    on_cpu = not torch.cuda.is_available()
    micro = spec["micro"] or spec["batch"]
    return DPOConfig(
        output_dir=spec["output_dir"],
        precompute_ref_log_probs=spec["precompute"],
        gradient_checkpointing=spec["checkpointing"],
        max_length=spec["max_length"],
        beta=spec["beta"],
        learning_rate=spec["learning_rate"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=spec["batch"] // micro,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        seed=spec["seed"],
        bf16=spec["dtype"] == "bfloat16",
        fp16=spec["dtype"] == "float16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        logging_first_step=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


@contextlib.contextmanager
def compaction(forced: bool) -> Iterator[None]:
    """Within it, TRL's fused head is given the scored rows only, as on CUDA. Its kernels still go by the real device."""
    with patch.object(trl_utils, "_use_triton", lambda device: True) if forced else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def counted_head_rows() -> Iterator[list[int]]:
    """Rows of hidden states of each call of TRL's fused head that records gradients."""
    rows: list[int] = []
    own = trl_utils._ChunkedLogProbFunction

    class Counted:
        @staticmethod
        def apply(hidden: torch.Tensor, *args: Any) -> Any:
            if torch.is_grad_enabled():
                rows.append(hidden.shape[0])
            return own.apply(hidden, *args)

    with patch.object(trl_utils, "_ChunkedLogProbFunction", Counted):
        yield rows


def check_ids(trainer: DPOTrainer, pairs: list[dict[str, Any]]) -> None:
    """Refuse to go on unless the rows of TRL's batches are the specification's, and their completions too."""
    found: list[tuple[list[int], int]] = []
    for batch in trainer.get_train_dataloader():
        rows = [
            (ids[mask.bool()].tolist(), int(scored.sum()))
            for ids, mask, scored in zip(
                batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
            )
        ]
        half = len(rows) // 2  # all chosen, then all rejected
        found += [row for pair in zip(rows[:half], rows[half:], strict=True) for row in pair]
    wanted = [(p["prompt_ids"] + p[name], len(p[name])) for p in pairs for name in IDS[1:]]
    differ = [i // 2 for i, (mine, its) in enumerate(zip(wanted, found, strict=False)) if mine != its]
    if len(found) != len(wanted) or differ:
        raise Refused(
            f"TRL trains on other tokens: {len(found)} rows of {len(wanted)}, pairs {differ[:8]} differ in their ids"
        )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    print(json.dumps(run(spec)))


if __name__ == "__main__":
    main()
