"""What is resident in each part of a training run? One run of a few optimiser steps, in a process of its own.

    python -m benchmarks.memory.phases SPEC.json        prints one JSON object; `step.py` writes SPEC.json

Any `transformers.Trainer` will do, the engine's and TRL's alike: a step is forward until its loss is handed to
`accelerator.backward`, backward within that, and the optimiser's from the last of these to the end of its own step (clipping
is part of it). A trainer that takes a step in several forwards has several of each; the largest counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import reset_peak_rss, rss_mb

OF_A_STEP = ("forward", "backward", "optimizer")


@dataclass
class Phase:
    """MiB that were resident."""

    before: float
    peak: float
    after: float


class Marks:
    """Phases of a run in the order they ended; Linux only, since the peak of a phase is reset where it begins."""

    def __init__(self) -> None:
        self.phases: dict[str, list[Phase]] = {}
        self._name: str | None = None
        self._before = 0.0

    def begin(self, name: str) -> None:
        """End the phase that is on, if one is, and begin another."""
        self.end()
        reset_peak_rss()
        self._name, self._before = name, rss_mb()

    def end(self) -> None:
        if self._name is None:
            return
        phase = Phase(before=self._before, peak=rss_mb(peak=True), after=rss_mb())
        self.phases.setdefault(self._name, []).append(phase)
        self._name = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        yield
        self.end()

    def parts(self) -> tuple[dict[str, float], dict[str, float]]:
        """`(peaks, what stays)` in MiB by part: weights and adapters beyond what was resident before each of them, the parts
        of a step beyond what was resident before the first step.
        """
        peaks, stays = {}, {}
        start = self.phases["forward"][0].before
        for name in ("weights", "adapters"):
            [phase] = self.phases[name]
            peaks[name], stays[name] = phase.peak - phase.before, phase.after - phase.before
        for name in OF_A_STEP:
            peaks[name] = max(phase.peak for phase in self.phases[name]) - start
            stays[name] = max(phase.after for phase in self.phases[name]) - start
        return _rounded(peaks), _rounded(stays)

    def levels(self) -> dict[str, float]:
        """MiB resident after each part, all told."""
        found = {name: phases[-1].after for name, phases in self.phases.items() if name not in OF_A_STEP}
        return _rounded(found | {"before_the_first_step": self.phases["forward"][0].before})

    @property
    def peak(self) -> float:
        return max(phase.peak for phases in self.phases.values() for phase in phases)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}


def watch(trainer: Any, marks: Marks) -> None:
    """Mark the steps of a trainer from now on."""
    from transformers import TrainerCallback

    own_step, own_backward = trainer.training_step, trainer.accelerator.backward

    def training_step(*args: Any, **kwargs: Any) -> Any:
        marks.begin("forward")
        loss = own_step(*args, **kwargs)
        marks.begin("optimizer")
        return loss

    def backward(*args: Any, **kwargs: Any) -> None:
        marks.begin("backward")
        own_backward(*args, **kwargs)
        marks.begin("forward")  # of the next forest; after the last one nothing of note

    class EndOfStep(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            marks.end()

    trainer.training_step, trainer.accelerator.backward = training_step, backward
    trainer.add_callback(EndOfStep())


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as `spec` says.

    Returns:
        Parts, what stays of them, levels, and the tokens of the largest forward that recorded gradients.
    """
    with ExitStack() as stack:
        return _run(spec, stack)


def _run(spec: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
    marks = Marks()
    make = {"engine": _engine, "trl": _trl}[spec["side"]]
    trainer, embedding = make(spec, marks, stack)
    tokens: dict[int, int] = {}  # number of the forward -> what it computed, perhaps in several sheets

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        import torch

        if torch.is_grad_enabled():
            number = len(marks.phases.get("backward", ()))
            tokens[number] = tokens.get(number, 0) + inputs[0].numel()

    embedding.register_forward_pre_hook(count)
    watch(trainer, marks)
    trainer.train()
    marks.end()
    peaks, stays = marks.parts()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {
        "parts": peaks,
        "stays": stays,
        "levels": marks.levels(),
        "peak_mb": round(marks.peak, 1),
        "largest_forward_tokens": max(tokens.values()),
        "first_loss": first,
        "optimiser": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
    }


def _engine(spec: dict[str, Any], marks: Marks, stack: ExitStack) -> tuple[Any, Any]:
    with marks.phase("imports"):
        import torch

        from benchmarks.steps.engine import force_layout, pair_data
        from dpo_engine import DPOConfig, DPOTrainer
        from dpo_engine.model.adapters import add_lora
        from dpo_engine.model.loading import load_model
    torch.set_num_threads(spec["threads"])
    with marks.phase("weights"):
        model = load_model(spec["model_path"], dtype=torch.float32, trainable=False)
    embedding = model.get_input_embeddings()
    with marks.phase("adapters"):
        adapted = add_lora(model, r=spec["lora_r"], alpha=spec["lora_alpha"])
    trainer = DPOTrainer(
        model=adapted,
        args=DPOConfig(
            **_common(spec),
            precompute_ref_log_probs=spec["precompute"],
            reference_cache="off",
            share_prompt="auto" if spec["layout"] == "shared" else "off",
            backend=spec["backend"],
        ),
        train_dataset=pair_data(spec["pairs"]),
    )
    force_layout(trainer, spec["layout"])
    return trainer, embedding


def _trl(spec: dict[str, Any], marks: Marks, stack: ExitStack) -> tuple[Any, Any]:
    with marks.phase("imports"):
        import torch
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig

        from benchmarks.steps.trl import IDS, TimedTrainer, compaction
    torch.set_num_threads(spec["threads"])
    with marks.phase("weights"):
        model = AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=torch.float32)
    embedding = model.get_input_embeddings()
    with marks.phase("adapters"):
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=spec["lora_r"], lora_alpha=spec["lora_alpha"], target_modules="all-linear"
        )
        adapted = get_peft_model(model, lora)
    stack.enter_context(compaction(spec["compaction"]))
    checkpointing = {} if spec["checkpointing"] is None else {"gradient_checkpointing": spec["checkpointing"]}
    trainer = TimedTrainer(
        model=adapted,
        args=DPOConfig(**_common(spec), precompute_ref_log_probs=spec["precompute"], report_to="none", **checkpointing),
        train_dataset=Dataset.from_list([{name: pair[name] for name in IDS} for pair in spec["pairs"]]),
        processing_class=AutoTokenizer.from_pretrained(spec["model_path"]),
    )
    return trainer, embedding


def _common(spec: dict[str, Any]) -> dict[str, Any]:
    """What both sides are told in the same words."""
    return {
        "output_dir": spec["output_dir"],
        "max_length": spec["max_length"],
        "beta": 0.1,
        "learning_rate": 5e-6,
        "per_device_train_batch_size": spec["batch"],
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def main() -> None:
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
