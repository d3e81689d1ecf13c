"""What happens in one `dpo-engine train`? From a configuration to a saved model and the numbers that say if it worked.

Everything that can be refused is refused in the order of its cost: configuration, output folder, data, model config,
weights.
"""

from __future__ import annotations

import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint, set_seed

from dpo_engine.data import PairData, PairSource, check_source, load_pairs
from dpo_engine.errors import ConfigError, EngineError
from dpo_engine.model.adapters import ALL_LINEAR, add_lora
from dpo_engine.model.existing_adapters import continue_adapter, merge_adapter, read_adapter
from dpo_engine.model.loading import check_model, cpu_has_bf16, load_model, load_tokenizer, resolve_dtype, resolve_model
from dpo_engine.train.card import write_run_card
from dpo_engine.train.config import DTYPES, DPOConfig, require
from dpo_engine.train.memory import RunMemory, answered, plan_run
from dpo_engine.train.report import NOUNS, draw_training, summary_text
from dpo_engine.train.samples import Answer, answers_to
from dpo_engine.train.trainer import DPOTrainer
from dpo_engine.train.trl_names import TrlScriptArguments
from dpo_engine.train.trl_settle import say_once, settle_names

RESULT_SCHEMA = 1
ADAPTER_MODES = ("continue", "stack")
LORA_DEFAULTS = {
    "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "use_dora": False, "use_rslora": False, "lora_head": False,
}  # fmt: skip
NO_STACK = "continue, or load_in_4bit: false: in 4 bits the merged adapter would be rounded away"
Say = Callable[[str], None]


@dataclass
class TrainConfig(TrlScriptArguments, DPOConfig):
    """What `dpo-engine train` is told: the keys of its YAML file, and its flags."""

    model: str | None = field(
        default=None, metadata={"help": "Model folder, hub id, or smollm2 (a small packaged model)."}
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Pairs, labelled completions or ranked lists: .jsonl, .json, .csv (also .gz), .parquet, or a hub dataset id."
        },
    )
    data_split: str = field(default="train", metadata={"help": "Split of a hub dataset to train on."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out rows, judged before and after training."})
    eval_split: str = field(default="test", metadata={"help": "Split of a hub dataset to judge on."})
    max_pairs: int | None = field(default=None, metadata={"help": "Train on the first so many usable rows only."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16). Trainable weights are always float32."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: frozen weights in 4 bits (NF4, double quantisation; bitsandbytes), adapters on top."},
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Folder of a LoRA adapter of this model to go on from; adapter_mode says how."}
    )
    adapter_mode: str = field(
        default="continue",
        metadata={
            "help": "continue: the adapter trains on, and a frozen copy of it is the reference. stack: it is merged into the "
            "model, which is the reference, and a new one trains on top."
        },
    )
    use_peft: bool | None = field(
        default=None,
        metadata={
            "help": "false trains every parameter, as lora_r: 0 does. If not given, on; with TRL's model_name_or_path, off."
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": "LoRA rank, 16 if not given; 0 trains every parameter."})
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "LoRA scale, 32 if not given: adapters are multiplied by lora_alpha / lora_r."},
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout in front of the adapters, in [0, 1); 0 if not given."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get adapters; all linear layers but the head if not given."},
    )
    lora_head: bool | None = field(
        default=None, metadata={"help": "An adapter on the LM head too, beside those of lora_target_modules."}
    )
    use_rslora: bool | None = field(
        default=None, metadata={"help": "Rank-stabilised LoRA: adapters are multiplied by lora_alpha / sqrt(lora_r)."}
    )
    use_dora: bool | None = field(
        default=None, metadata={"help": "DoRA: adapters turn a weight, and its columns' lengths train beside them."}
    )
    disable_dropout: bool = field(
        default=False,
        metadata={"help": "Switch off every nn.Dropout of the models, that of LoRA too (lora_dropout)."},
    )
    gradient_checkpointing: bool | None = field(  # a bool once checked
        default=None,
        metadata={
            "help": "Compute layers anew in the backward pass instead of keeping what they computed. On with load_in_4bit if "
            "not given, off without it."
        },
    )
    check_memory: bool = field(
        default=True,
        metadata={"help": "Refuse, before any weight is read, a run whose planned memory exceeds what is free."},
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew although output_dir holds checkpoints of another run."}
    )
    sample_prompts: int = field(default=0, metadata={"help": "Held-out prompts to answer before and after training."})
    sample_tokens: int = field(default=80, metadata={"help": "Most tokens of such an answer."})
    picture: bool = field(default=True, metadata={"help": "Draw training.png in output_dir."})

    def require_inputs(self) -> None:
        """Raise a `ConfigError` for the first of the keys that must be given and is not."""
        require(bool(self.model), "model", self.model, "a model folder, a hub id, or smollm2")
        require(bool(self.data), "data", self.data, "a file of preference data or a hub dataset id")
        require(bool(self.output_dir), "output_dir", self.output_dir, "a folder to write to")

    def __post_init__(self) -> None:
        self._settle_script()
        self.require_inputs()
        for name in ("model_init_kwargs", "ref_model_init_kwargs"):
            require(
                getattr(self, name) is None,
                name,
                getattr(self, name),
                "none: `dpo-engine train` has dtype and load_in_4bit",
            )
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        self._settle_adapter()
        assert self.lora_r is not None and self.lora_alpha is not None and self.lora_dropout is not None
        require(self.lora_r >= 0, "lora_r", self.lora_r, "a rank above 0, or 0 to train every parameter")
        require(
            not self.load_in_4bit or self.lora_r > 0,
            "lora_r",
            self.lora_r,
            "a rank above 0 with load_in_4bit: 4-bit weights cannot train",
        )
        require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "a number above 0")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a number in [0, 1)")
        for name in ("lora_head", "use_dora", "use_rslora"):
            require(
                self.lora_r > 0 or not getattr(self, name),
                name,
                True,
                "false with lora_r: 0, which puts no adapters on",
            )
        require(
            not (self.lora_head and self.use_dora),
            "lora_head",
            self.lora_head,
            "false with use_dora: DoRA on the head is not plain LoRA, which is all that the engine can follow there",
        )
        require(self.max_pairs is None or self.max_pairs > 0, "max_pairs", self.max_pairs, "a number above 0, or none")
        require(self.sample_prompts >= 0, "sample_prompts", self.sample_prompts, "a number of at least 0")
        require(self.sample_tokens > 0, "sample_tokens", self.sample_tokens, "a number above 0")
        require(not self.bf16 and not self.fp16, "bf16/fp16", True, "dtype: bfloat16 or float16 instead")
        if self.eval_strategy != "no" and not self.eval_data:
            raise ConfigError(f"eval_strategy={self.eval_strategy} needs held-out rows; give eval_data")
        if not torch.cuda.is_available():
            self.use_cpu = True
            self.dataloader_pin_memory = False
        dtype = resolve_dtype(self.dtype)
        self.bf16, self.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        if self.fp16 and self.use_cpu:
            raise ConfigError(
                "dtype=float16 needs a GPU (its loss scaling is not done on a CPU); use float32 or bfloat16"
            )
        self._choose_checkpointing()
        super().__post_init__()
        _check_report_to(self.report_to)

    def _settle_script(self) -> None:
        """Take what TRL's scripts call model, data and adapters for ours, with the meaning that it has there.

        There a model is trained whole unless `use_peft` is true, and evaluated on another split of the data it trains on.
        """
        is_of_trl, brings_data = self.model_name_or_path is not None, self.dataset_name is not None  # type: ignore[attr-defined]
        settle_names(self)
        if self.lora_target_modules == [ALL_LINEAR]:
            self.lora_target_modules = None
        if is_of_trl and self.use_peft is None and self.adapter is None:
            say_once(
                "model_name_or_path (TRL's) without use_peft: every parameter trains, as there; use_peft: true is LoRA"
            )
            self.use_peft = False
        if self.use_peft:
            require(self.lora_r != 0, "lora_r", self.lora_r, "a rank above 0 with use_peft: true")
        elif self.use_peft is not None:
            for name in [*LORA_DEFAULTS, "lora_target_modules"]:
                given = getattr(self, name)
                unset = given in (None, 0) if name == "lora_r" else not given
                require(unset, name, given, "it left out, or use_peft: true: no adapters are put on without it")
            self.lora_r = 0
        if brings_data and self.eval_strategy != "no" and self.eval_data is None and not Path(str(self.data)).is_file():
            self.eval_data = self.data

    def _settle_adapter(self) -> None:
        """LoRA settings as they are given, or as the adapter that trains on has them."""
        require(
            self.adapter_mode in ADAPTER_MODES, "adapter_mode", self.adapter_mode, f"one of {', '.join(ADAPTER_MODES)}"
        )
        settled: dict[str, Any] = dict(LORA_DEFAULTS)
        if self.adapter is not None:
            inside = Path(str(self.output_dir)).expanduser().resolve()
            folder = Path(self.adapter).expanduser().resolve()
            require(
                not folder.is_relative_to(inside),
                "adapter",
                self.adapter,
                f"a folder outside of output_dir={self.output_dir}, where it would be written over",
            )
            config = read_adapter(self.adapter)
            if self.adapter_mode == "continue":
                settled = {
                    "lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
                    "use_dora": config.use_dora, "use_rslora": config.use_rslora, "lora_head": None,
                }  # fmt: skip
                for name, has in settled.items():
                    given = getattr(self, name)
                    require(given is None or given == has, name, given, _continued(name, has, self.adapter))
                mine, its = self.lora_target_modules, config.target_modules
                same = mine is None or (not isinstance(its, str) and set(mine) == set(its or ()))
                require(same, "lora_target_modules", mine, _continued("lora_target_modules", its, self.adapter))
            else:
                require(not self.load_in_4bit, "adapter_mode", "stack", f"with load_in_4bit {NO_STACK}")
                require(self.lora_r != 0, "lora_r", self.lora_r, "a rank above 0 with adapter_mode: stack")
        for name, value in settled.items():
            if getattr(self, name) is None:
                setattr(self, name, bool(value) if name.startswith("use_") else value)

    def _choose_checkpointing(self) -> None:
        """On for 4-bit weights unless someone said otherwise: who has no room for weights has none for activations."""
        newer = "activation_checkpointing"  # transformers' other name for it, of which its later versions have both
        asked = getattr(self, newer, None)
        if asked is None:
            asked = self.gradient_checkpointing
        self.gradient_checkpointing = self.load_in_4bit if asked is None else asked
        if hasattr(self, newer):
            setattr(self, newer, self.gradient_checkpointing)


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """Everything that training needs, before anything was scored."""

    trainer: DPOTrainer
    data: PairData
    held_out: PairData | None
    tokenizer: Any
    model_path: str
    memory: RunMemory | str
    """What the run was planned at, or why it was not planned."""


def prepare_run(config: TrainConfig, say: Say, *, trains: bool = True) -> PreparedRun:
    """Read data and model, refusing what cannot work in the order of its cost.

    Args:
        trains: whether a step is to come, for which memory is planned; scoring alone takes far less.

    Raises:
        EngineError: input that cannot be used, or that does not fit.
    """
    train_source = _source(config.data, config.data_split, config)
    held_out_source = _source(config.eval_data, config.eval_split, config)
    model_path = resolve_model(config.model, progress=say)  # type: ignore[arg-type]
    model_config = check_model(model_path)
    tokenizer = load_tokenizer(model_path)
    data = _pairs(train_source, tokenizer, config, config.max_pairs)
    assert data is not None
    held_out = _pairs(held_out_source, tokenizer, config, None)
    for source in (data, held_out):
        for line in source.report.lines() if source else []:
            say(line)
    memory = plan_run(config, model_config, [*data.trees, *(held_out.trees if held_out else [])])
    if trains:
        _check_memory(config, memory, say)
    with answered(memory):
        trainer = DPOTrainer(
            model=_load_policy(config, model_path, say),
            args=config,
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
    trainer.references.say = say
    trainer.remove_callback(ProgressCallback)
    return PreparedRun(
        trainer=trainer,
        data=data,
        held_out=held_out,
        tokenizer=tokenizer,
        model_path=str(model_path),
        memory=memory,
    )


def _check_memory(config: TrainConfig, memory: RunMemory | str, say: Say) -> None:
    if isinstance(memory, str):
        say(f"memory: no plan ({memory})")
        return
    if config.check_memory:
        memory.check()
    say(memory.line())


def run_training(config: TrainConfig, say: Say) -> dict[str, Any]:
    """Train, judge, save.

    Args:
        config: checked settings.
        say: gets every line meant for a person.

    Returns:
        What `--json` prints; the keys are in `docs/stability.md`.

    Raises:
        EngineError: input that cannot be used, or a run that must stop.
    """
    made = not Path(str(config.output_dir)).exists()
    output = _prepare_output(config)
    try:
        prepared = prepare_run(config, say)
    except EngineError:
        if made and not any(output.iterdir()):
            output.rmdir()  # a run that was refused leaves nothing
        raise
    trainer, data, held_out, tokenizer = prepared.trainer, prepared.data, prepared.held_out, prepared.tokenizer
    model: Any = trainer.model
    clock = _StepClock()
    trainer.add_callback(clock)
    if not config.disable_tqdm:
        trainer.add_callback(_Progress(say))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"training {trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters with {described(config)}")
    trainer.restore_run(config.resume)  # before anything is scored
    for line in trainer.lines():
        say(line)

    prompts = [tree.prompt_ids for tree in held_out.trees[: config.sample_prompts]] if held_out else []
    with answered(prepared.memory, trainer.budget.tokens):
        before = _judge(trainer, held_out, say, "before training")
        answers_before = answers_to(model, tokenizer, prompts, config.sample_tokens)
        trainer.train(resume_from_checkpoint=config.resume or None)
        after = _judge(trainer, held_out, say, "after training")
        answers_after = answers_to(model, tokenizer, prompts, config.sample_tokens)
    answers = [
        Answer(prompt=_user_text(row.prompt), before=b, after=a)
        for row, b, a in zip(held_out.rows if held_out else [], answers_before, answers_after, strict=False)
    ]

    trainer.save_model(str(output))
    trainer.save_state()
    picture = None
    if config.picture:
        title = f"{config.method} · {config.model} · {len(data)} {NOUNS[config.entry.kind]}"
        start = [{"step": 0, **before}] if before and not config.resume else []
        picture = draw_training([*start, *trainer.state.log_history], output / "training.png", title=title)
    result = {
        "schema": RESULT_SCHEMA,
        "method": config.method,
        "data_kind": config.entry.kind,
        "model_path": prepared.model_path,
        "output_dir": str(output),
        "steps": trainer.state.global_step,
        "pairs_per_step": config.train_batch_size * config.gradient_accumulation_steps * config.world_size,
        "rows_read": data.report.rows_read,
        "rows_used": data.report.rows_used,
        "rows_left_out": data.report.rows_left_out,
        "held_out_rows": len(held_out) if held_out else 0,
        "accuracy": _before_after(before, after, "eval_rewards/accuracies"),
        "margin": _before_after(before, after, "eval_rewards/margins"),
        "held_out_loss": _before_after(before, after, "eval_loss"),
        "pairs_per_s": clock.pairs_per_second(config),
        "reference_s": trainer.reference_seconds,
        "reference_rows_reused": trainer.references.filled.reused,
        "reference_rows_computed": trainer.references.filled.computed,
        "peak_rss_mb": _peak_rss_mb(),
        "planned_mb": None if isinstance(prepared.memory, str) else round(prepared.memory.planned / 2**20, 1),
        "peak_cuda_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
        "dtype": str(resolve_dtype(config.dtype)).removeprefix("torch."),
        "device": str(config.device),
        "backend": trainer.backend.name,
        "layout": trainer.layout.name,
        "max_tokens_per_forest": trainer.budget.tokens,
        "picture": str(picture) if picture else None,
        "answers": [vars(answer) for answer in answers],
    }
    write_run_card(output, config, prepared, result)
    say(summary_text(result, answers, picture))
    return result


def described(config: TrainConfig) -> str:
    """The method and what it is told, for people."""
    parts = config.entry.parts or ((1.0, config.entry),)
    said = []
    for weight, method in parts:
        told = ", ".join(f"{name} {value}" for name, value in method.settings(config).items())
        said.append((f"{weight:g} " if len(parts) > 1 else "") + method.name + (f" ({told})" if told else ""))
    return " + ".join(said)


def _continued(name: str, has: Any, folder: str) -> str:
    """What a setting may be where an adapter trains on."""
    if name == "lora_head":
        return f"it left out: which layers have adapters, the one in {folder} says"
    shown = sorted(has) if isinstance(has, set) else has
    return f"it left out, or {shown!r} as the adapter in {folder} has it (adapter_mode: stack puts a new one on top)"


def _check_report_to(names: str | list[str] | None) -> None:
    """Refuse what would fail only after the model was loaded."""
    installed = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names or []:
        if name not in ("none", "all") and name not in installed:
            raise ConfigError(
                f"report_to={name!r} is not installed or not known; installed: {', '.join(installed) or 'nothing'}; "
                "install it, or use report_to: none"
            )


def _prepare_output(config: TrainConfig) -> Path:
    """The output folder, made and proven writable; refuses to mix two runs' checkpoints."""
    output = Path(config.output_dir)  # type: ignore[arg-type]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir={output} cannot be written ({error.strerror}); expected a folder you may write to"
        ) from error
    last = get_last_checkpoint(str(output))
    if config.resume and last is None:
        raise ConfigError(
            f"resume: {output} holds no checkpoint; leave --resume out, or set save_strategy and save_steps first"
        )
    if last is not None and not config.resume and not config.overwrite_output_dir:
        raise ConfigError(
            f"output_dir={output} holds {os.path.basename(last)} of an earlier run; go on with --resume, start anew "
            "with --overwrite_output_dir, or choose another folder"
        )
    return output


def _source(source: str | None, split: str, config: TrainConfig) -> PairSource | None:
    if source is None:
        return None
    kind = config.pair_options()["kind"]
    return check_source(source, split=split, skip_bad_rows=config.skip_bad_rows, method=config.method, kind=kind)


def _pairs(source: PairSource | None, tokenizer: Any, config: TrainConfig, limit: int | None) -> PairData | None:
    if source is None:
        return None
    return load_pairs(source, tokenizer, limit=limit, **config.pair_options())


def _load_policy(config: TrainConfig, model_path: str, say: Say) -> Any:
    """The model that trains: with adapters, or whole."""
    gc.collect()  # a trainer lies in cycles, so the model of a run before, in the same process, may still be there
    dtype = resolve_dtype(config.dtype)
    if config.use_cpu and dtype == torch.bfloat16 and not cpu_has_bf16():
        say("note: this CPU has no bfloat16 instructions; dtype: float32 (or auto) is many times faster here")
    say(f"loading {config.model} ({model_path}) in {str(dtype).removeprefix('torch.')} on {config.device}")
    if config.load_in_4bit and (Path(model_path) / "dpo_engine_run.json").is_file():
        say(
            "note: this model has an adapter merged into it; in 4 bits its weights are rounded again, which can take the adapter "
            "back: compare before you trust it"
        )
    model = load_model(
        model_path, dtype=dtype, trainable=config.lora_r == 0, in_4bit=config.load_in_4bit, device=config.device
    )
    if config.adapter and config.adapter_mode == "continue":
        say(f"the adapter in {config.adapter} trains on; a frozen copy of it is the reference")
        return continue_adapter(model, config.adapter)
    if config.adapter:
        say(
            f"the adapter in {config.adapter} is merged into the model in memory; what this run saves belongs on that merged model"
        )
        model = merge_adapter(model, config.adapter)
    if config.lora_r:
        assert config.lora_alpha is not None and config.lora_dropout is not None
        set_seed(config.seed)  # the trainer does this too, but the adapters are drawn before there is one
        model = add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            target_modules=config.lora_target_modules or ALL_LINEAR,
            dropout=config.lora_dropout,
            head=bool(config.lora_head),
            use_dora=bool(config.use_dora),
            use_rslora=bool(config.use_rslora),
        )
    return model


def _judge(trainer: DPOTrainer, held_out: PairData | None, say: Say, when: str) -> dict[str, float] | None:
    if held_out is None:
        return None
    metrics = trainer.evaluate()
    margin = metrics.get("eval_rewards/margins")  # of unpaired data of one class there is none
    shown = "" if margin is None else f", margin {margin:+.3f}"
    say(f"held out, {when}: loss {metrics['eval_loss']:.4f}, accuracy {metrics['eval_rewards/accuracies']:.1%}{shown}")
    return metrics


def _before_after(
    before: dict[str, float] | None, after: dict[str, float] | None, name: str
) -> dict[str, float | None]:
    return {"before": before.get(name) if before else None, "after": after.get(name) if after else None}


def _peak_rss_mb() -> float:
    """Most memory this process ever held, in MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        # Elsewhere than on Linux; there the number also counts the peak of the process that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _user_text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


class _StepClock(TrainerCallback):
    """Time spent inside optimiser steps, the first left out: it pays for warm-up and the check of the start value."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._first = True
        self._begin = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            # Once a step, not once a micro-batch: the clock must not stop before the work does.
            torch.cuda.synchronize()
        if not self._first:
            self.seconds += time.perf_counter() - self._begin
            self.steps += 1
        self._first = False

    def pairs_per_second(self, args: TrainingArguments) -> float | None:
        """Pairs of whole steps per second; None after a single step."""
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.steps * per_step / self.seconds if self.steps else None


class _Progress(ProgressCallback):
    """transformers' progress bar, with the numbers of interest instead of the whole log."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs and self.training_bar is not None:
            shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
            self.training_bar.set_postfix({name: f"{logs[key]:.3f}" for name, key in shown.items() if key in logs})
