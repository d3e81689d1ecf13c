"""What does one of TRL's trainers do in a few steps, with `dpo_engine.integrations.trl` or without? One run, one process.

    python -m benchmarks.integrations.case SPEC.json        `run.py` writes SPEC.json

It must run beside every release that the table in `releases.py` names, from transformers 4.57 on. Of the engine it
imports only the integration, and only where the run is to have it. What is recorded is what the trainer does, not what it
prints: the loss that a step returns, every metric handed to `log`, the gradients of the first step before anything is clipped.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import reset_peak_rss, rss_mb

# Where a trainer stands depends on the release; the first that has it is taken.
PLACES = {
    "DPO": ("trl",),
    "KTO": ("trl", "trl.experimental.kto"),
    "CPO": ("trl.experimental.cpo", "trl"),
    "ORPO": ("trl.experimental.orpo", "trl"),
    "SFT": ("trl",),
    "GRPO": ("trl",),
    "RLOO": ("trl",),
}
ONLINE = ("GRPO", "RLOO")  # those that sample completions and are given rewards
PACKAGES = ("torch", "trl", "transformers", "peft", "datasets", "accelerate")
ALL, NEWEST = ("0.24", "1.8", "1.13", "1.16"), ("1.16",)
WITHOUT_METRIC = ("runtime", "per_second", "epoch", "total_flos", "step_time", "train_loss")  # clocks, and copies


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trainer and how it is set up."""

    trainer: str
    config: dict[str, Any] = field(default_factory=dict)
    lora: bool = True
    reference: bool = False  # a second model as the reference; else the adapter switched off, or a copy that TRL makes
    model: str = "llama"
    releases: tuple[str, ...] = ALL


CASES = {
    "dpo": Case(trainer="DPO"),
    "dpo-full": Case(trainer="DPO", lora=False),
    "dpo-ref-model": Case(trainer="DPO", lora=False, reference=True),
    "dpo-checkpointing": Case(trainer="DPO", config={"gradient_checkpointing": True}),
    "dpo-softcap": Case(trainer="DPO", model="gemma2"),
    "dpo-wpo": Case(trainer="DPO", config={"use_weighting": True}),
    # TRL 1.8 by itself does not find what it wrote for a data set in memory.
    "dpo-precomputed": Case(
        trainer="DPO",
        config={"precompute_ref_log_probs": True, "loss_type": "ipo"},
        releases=("0.24", "1.13", "1.16"),
    ),
    "kto": Case(trainer="KTO"),
    "cpo": Case(trainer="CPO", config={"loss_type": "sigmoid"}),
    "simpo": Case(trainer="CPO", config={"loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": Case(trainer="ORPO", lora=False),
    "sft": Case(trainer="SFT", releases=NEWEST),
    "grpo": Case(trainer="GRPO", config={"num_generations": 4, "max_completion_length": 8}, releases=NEWEST),
    "grpo-entropy": Case(
        trainer="GRPO",
        config={"num_generations": 4, "max_completion_length": 8, "entropy_coef": 0.1, "temperature": 0.7},
        releases=NEWEST,
    ),
    "rloo": Case(trainer="RLOO", config={"num_generations": 4, "max_completion_length": 8}, releases=NEWEST),
}


def run(spec: dict[str, Any], *, witness: bool = True) -> dict[str, Any]:
    """Train as `spec` says.

    Args:
        spec: `case`, `engine` (with the integration?), `steps`, `batch`; `model_path` and `rows` (prompt, chosen, rejected)
            for a real model, else a tiny random one on random words.
        witness: count the calls of the engine's operator. Slows a step down.

    Returns:
        Loss and metrics of each step, gradients by parameter, seconds of each step after the first, MiB.
    """
    case = CASES[spec["case"]]
    torch.manual_seed(0)
    with _engine(spec["engine"]), tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, spec, folder)
        record = _Record(trainer)
        calls = _EngineCalls()
        before = rss_mb()
        reset_peak_rss()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with calls if witness else contextlib.nullcontext():
            trainer.train()
    on_card = torch.cuda.is_available()
    return {
        "losses": record.losses,
        "metrics": record.metrics,
        "gradients": record.gradients,
        "engine_calls": calls.number if witness else None,
        "step_seconds": [end - begin for begin, end in zip(record.ends, record.ends[1:], strict=False)],
        "before_mb": before,
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if on_card else rss_mb(peak=True),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
    }


class _Record:
    """What a trainer does in each step, taken from outside."""

    def __init__(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        self.losses: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.ends: list[float] = []
        record, own_step = self, trainer.training_step

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                record.ends.append(time.perf_counter())

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if "loss" in logs:
                    kept = {key: float(value) for key, value in logs.items()}
                    record.metrics.append(
                        {key: value for key, value in kept.items() if not any(word in key for word in WITHOUT_METRIC)}
                    )

        def training_step(model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = own_step(model, *args, **kwargs)
            record.losses.append(float(loss))
            if not record.gradients:  # nothing is clipped before the optimiser's step
                record.gradients = {
                    name: parameter.grad.detach().clone().cpu()
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            return loss

        trainer.training_step = training_step
        trainer.add_callback(Watch())


class _EngineCalls(TorchDispatchMode):
    """Counts calls of the engine's operators, whoever makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += getattr(func, "namespace", "") == "dpo_engine"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _engine(installed: bool) -> Iterator[None]:
    if not installed:
        yield
        return
    integration = importlib.import_module("dpo_engine.integrations.trl")
    with integration.installed():
        yield


def _trainer(case: Case, spec: dict[str, Any], folder: str) -> Any:
    from datasets import Dataset

    rows = spec.get("rows") or _random_rows(spec["steps"] * spec["batch"])
    tokenizer = _real_tokenizer(Path(spec["model_path"])) if spec.get("model_path") else _tiny_tokenizer()
    make = (
        (lambda: _real_model(Path(spec["model_path"]))) if spec.get("model_path") else _tiny_model(case.model, folder)
    )
    arguments: dict[str, Any] = {
        "model": make(),
        "args": _config(case, spec, folder),
        "train_dataset": Dataset.from_list(_rows_for(case.trainer, rows)),
        "processing_class": tokenizer,
    }
    if case.reference:
        arguments["ref_model"] = _moved(make())
    if case.lora:
        from peft import LoraConfig

        # B as it is initialised would leave policy and reference equal in the first step, and every gradient of A zero.
        arguments["peft_config"] = LoraConfig(
            task_type="CAUSAL_LM",
            r=16 if spec.get("model_path") else 4,
            target_modules="all-linear",
            lora_dropout=0.0,
            init_lora_weights=bool(spec.get("model_path")),
        )
    if case.trainer in ONLINE:
        arguments["reward_funcs"] = _mean_number
    return _found(case.trainer, "Trainer")(**arguments)


def _found(trainer: str, what: str) -> Any:
    for place in PLACES[trainer]:
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(place), f"{trainer}{what}")
    raise ImportError(f"{trainer}{what} is in none of {', '.join(PLACES[trainer])}")


def _config(case: Case, spec: dict[str, Any], folder: str) -> Any:
    on_cpu = not torch.cuda.is_available()
    values: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["batch"],
        "learning_rate": 1e-4,
        "max_grad_norm": 1e9,  # the norm is logged and nothing is clipped
        "gradient_checkpointing": False,
        "bf16": False,
        "fp16": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    config = _found(case.trainer, "Config")
    if case.trainer not in ONLINE:
        values["max_length"] = spec.get("max_length", 64)
        if "max_prompt_length" in {
            entry.name for entry in fields(config)
        }:  # up to 0.28 the prompt has a limit of its own
            values["max_prompt_length"] = values["max_length"] // 2
    return config(**{**values, **case.config})


def _rows_for(trainer: str, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    if trainer == "KTO":
        keys = (("chosen", True), ("rejected", False))
        return [{"prompt": r["prompt"], "completion": r[key], "label": good} for r in rows for key, good in keys]
    if trainer == "SFT":
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    if trainer in ONLINE:
        return [{"prompt": row["prompt"]} for row in rows]
    return rows


def _mean_number(completions: list[str], **_: Any) -> list[float]:
    numbers = [[int(word[1:]) for word in completion.split() if word[1:].isdigit()] for completion in completions]
    return [sum(some) / WORDS / max(1, len(some)) for some in numbers]


# ---- a tiny model on random words ----

WORDS = 300


def _random_rows(number: int) -> list[dict[str, str]]:
    """Prompts that differ, completions of several lengths."""
    draw = random.Random(5)

    def words(at_least: int, at_most: int) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(at_least, at_most)))

    return [
        {"prompt": words(4, 12), "chosen": " " + words(3, 14), "rejected": " " + words(3, 14)} for _ in range(number)
    ]


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(WORDS))]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _tiny_model(name: str, folder: str) -> Any:
    """A function that loads it: trainers load their reference from where the policy says that it came from."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    # Weights as wide as these make the model sure of itself, as trained ones are, and a softcap bend its logits.
    sizes = {
        "vocab_size": WORDS + 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if name == "gemma2":
        gemma = {"head_dim": 12, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
        kind, config = Gemma2ForCausalLM, Gemma2Config(**sizes, **gemma)
    else:
        kind, config = LlamaForCausalLM, LlamaConfig(**sizes)
    torch.manual_seed(11)
    model = kind(config)
    with torch.no_grad():  # else the mean of all logits, which trainers log, is too near to zero to be told from it
        model.get_output_embeddings().weight.add_(0.1)
    model.save_pretrained(f"{folder}/model")
    eager = {"attn_implementation": "eager"} if name == "gemma2" else {}
    return lambda: kind.from_pretrained(f"{folder}/model", **eager)


def _moved(model: Any) -> Any:
    """The same model with other weights, so that a reference is told from the policy."""
    torch.manual_seed(12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


# ---- a real one ----


def _real_model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    rope = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("rope_parameters") or {}
    if hasattr(config, "rope_theta"):  # before transformers 5 that was a key of its own, and the new one is not read
        config.rope_theta = rope.get("rope_theta", config.rope_theta)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.to(torch.float32)


def _real_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {key: said[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if said.get(key)}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    for one in spec["runs"]:
        outcome = run(one, witness=spec["witness"])
        torch.save(outcome, one["outcome"])  # at once: whoever asked sees how far this came
    summary = {key: value for key, value in outcome.items() if key not in ("gradients", "metrics")}
    print(json.dumps({**summary, "packages": {name: metadata.version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
