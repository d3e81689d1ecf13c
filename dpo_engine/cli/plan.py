"""`dpo-engine plan`: will it fit, before anything is downloaded?

Of the models that come along, and of a folder, only config.json is read; nothing here imports torch or transformers unless
data is to be looked at, for which a tokenizer is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_engine.errors import ConfigError, DataError, ModelError
from dpo_engine.memory.cards import card_here, read_card
from dpo_engine.memory.plan import USUAL_PAIR, Plan, make_plan
from dpo_engine.memory.recipe import recipe
from dpo_engine.memory.shapes import ModelShape, read_shape, shipped_config, shipped_names, shipped_shape
from dpo_engine.memory.step import BYTES, MIB, STATE_BYTES, StepSettings

SIZES_OF_TABLE = ("12GB", "16GB", "24GB")
_WORDS = {
    "weights": "weights",
    "adapters": "adapters (float32)",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "reference": "reference of its own",
    "activations": "activations",
    "attention": "attention",
    "head": "head",
    "opened": "a 4-bit weight, opened",
    "allocator": "context and allocator",
}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the command was told."""

    model: str | None
    method: str
    gpu: str | None
    data: str | None
    max_length: int | None
    load_in_4bit: bool
    dtype: str
    lora_r: int
    lora_target_modules: str | None
    lora_head: bool
    optim: str | None
    gradient_checkpointing: bool
    activation_offload: bool


def plan_command(options: PlanOptions, *, output: str | None, as_json: bool) -> None:
    """Print a plan; write its YAML to `output`. Without a model, a table of those that come along.

    Raises:
        ConfigError, ModelError, DataError: what cannot be planned, or nothing that fits.
    """
    if options.model is None:
        _refuse_what_needs_a_model(options, output, as_json)
        print(table())
        return
    settings = settings_of(options)
    model, shape = shape_for(options.model)
    _check_adapters(shape, settings)
    card = read_card(options.gpu) if options.gpu else card_here()
    longest, largest, found = _of_data(options, model)
    plan = make_plan(shape, settings, card, max_length=options.max_length, largest_pair=largest)
    if longest is not None and options.max_length is None and plan.fits:
        plan = replace(plan, max_length=longest)
    say = _to(sys.stderr if as_json else sys.stdout)
    for line in [*found, *lines(plan)]:
        say(line)
    yaml = recipe(plan, model=model, method=options.method, data=options.data or "pairs.jsonl") if plan.fits else None
    if yaml is not None and output:
        _write(Path(output), yaml)
        say(f"\nwritten to {output}; next: dpo-engine train {output}")
    elif yaml is not None:
        say(f"\n{yaml}\n(--output FILE writes it)")
    if as_json:
        print(json.dumps(plan.as_json()))
    if not plan.fits:
        raise ConfigError(refusal(plan))


def switch(name: str, value: str) -> bool:
    """What `--name true` or `--name false` means, as for `dpo-engine train`.

    Raises:
        ConfigError: another word.
    """
    words = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
    if value.lower() not in words:
        raise ConfigError(f"{name}={value!r}; expected true or false")
    return words[value.lower()]


def settings_of(options: PlanOptions) -> StepSettings:
    """The options as settings of a step.

    Raises:
        ConfigError: a value that is unknown, or two that contradict.
    """
    dtype = {"auto": "bfloat16", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
        options.dtype, options.dtype
    )
    if dtype not in BYTES:
        raise ConfigError(f"dtype={options.dtype!r}; expected one of auto, {', '.join(BYTES)}")
    if options.lora_r < 0:
        raise ConfigError(f"lora_r={options.lora_r}; expected a rank above 0, or 0 to train every parameter")
    if options.max_length is not None and options.max_length < 2:
        raise ConfigError(f"max_length={options.max_length}; expected at least 2 tokens")
    optimiser = options.optim or ("paged_adamw_8bit" if options.lora_r else "adamw_torch_fused")
    if optimiser not in STATE_BYTES:
        raise ConfigError(f"optim={optimiser!r} is not planned for; expected one of {', '.join(STATE_BYTES)}")
    if options.activation_offload and not options.gradient_checkpointing:
        raise ConfigError(
            "activation_offload moves checkpoints, and gradient_checkpointing is off; leave one of them out"
        )
    targets = options.lora_target_modules
    in_4bit = options.load_in_4bit and options.lora_r > 0
    return StepSettings(
        weights="nf4" if in_4bit else dtype,
        compute=dtype,
        lora_r=options.lora_r,
        lora_targets=None if targets in (None, "all-linear") else tuple(name.strip() for name in targets.split(",")),
        lora_head=options.lora_head,
        optimiser=optimiser,
        checkpointing=options.gradient_checkpointing,
        offload=options.activation_offload,
        reference=_reference(options),
    )


def _reference(options: PlanOptions) -> str:
    """Where the method's reference comes from.

    Raises:
        ConfigError: an unknown method, or one whose steps are not planned for.
    """
    if options.method == "dpo":  # the table of losses brings torch along, which takes longer than the plan
        return "adapters_off" if options.lora_r else "model_copy"
    from dpo_engine.losses import get_method

    method = get_method(options.method)
    if method.token_kl:
        raise ConfigError(
            f"method={options.method!r} meets two models' heads in a step, which is not planned for; train without a plan"
        )
    if options.lora_r:
        return "adapter_copy" if method.moving_reference else "adapters_off"
    return "model_copy" if method.needs_reference else "adapters_off"


def _check_adapters(shape: ModelShape, settings: StepSettings) -> None:
    """Refuse adapters on what the model does not have, as `train` will."""
    has = [linear.name for linear in shape.linears]
    unknown = [name for name in settings.lora_targets or () if name not in has]
    if unknown:
        raise ConfigError(
            f"lora_target_modules names {unknown[0]!r}, which is no linear layer of {shape.name}; it has {', '.join(has)}"
        )
    if settings.lora_head and shape.tied:
        raise ConfigError(f"lora_head: the head of {shape.name} is tied to its input embeddings; leave it out")


def shape_for(model: str) -> tuple[str, ModelShape]:
    """`(what train is to load, its shape)` of a short name, a folder, a config.json or a hub id.

    Raises:
        ModelError: no config there, or one that memory is not planned for.
    """
    model = {"smollm2": "smollm2-135m"}.get(model, model)
    if model in shipped_names():
        return shipped_config(model)["_name_or_path"], shipped_shape(model)
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        folder = path if path.is_dir() else path.resolve().parent
        return str(folder), read_shape(_read_config(path), folder.name)
    if model.startswith((".", "/", "~")):
        raise ModelError(f"model {model!r}: no such folder or file; give one, a short name or a hub id")
    if "/" not in model:
        return model, shipped_shape(model)  # which refuses, with the names that are known
    return model, read_shape(_read_config(_fetched_config(model)), model)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as a config ({type(error).__name__}); expected config.json") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}; expected the object of a config.json")
    return config


def _fetched_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {model}: its config.json cannot be fetched ({said}); give a folder, a config.json, or one of "
            f"{', '.join(shipped_names())}"
        ) from error


def _of_data(options: PlanOptions, model: str) -> tuple[int | None, int | None, list[str]]:
    """`(longest row, tokens of the largest pair, what to say)` of the data, where there is some."""
    if options.data is None:
        return None, None, []
    from dpo_engine.batch import packed_cost
    from dpo_engine.data import check_source, load_pairs
    from dpo_engine.losses import get_method
    from dpo_engine.model.loading import load_tokenizer, resolve_model

    if options.model in shipped_names() and not Path(model).is_dir():
        try:
            tokenizer = load_tokenizer(resolve_model(model))
        except ModelError as error:
            raise ModelError(
                f"data was given, and the tokenizer of {model} cannot be had ({error}); give the model's folder as --model, "
                "or leave --data out"
            ) from error
    else:
        tokenizer = load_tokenizer(resolve_model(model))
    wanted: dict[str, Any] = {"method": options.method, "kind": get_method(options.method).kind}
    pairs = load_pairs(check_source(options.data, **wanted), tokenizer, max_length=options.max_length, **wanted)
    if not len(pairs):
        raise DataError(f"{options.data}: no row is left; expected preference data")
    costs = [packed_cost(tree, "shared", None) for tree in pairs.trees]
    rows = [len(tree.prompt_ids) + max(map(len, tree.completions)) for tree in pairs.trees]
    mean = sum(costs) / len(costs)
    said = f"{options.data}: {len(costs)} rows, {mean:.0f} tokens a row in the mean, {max(costs)} in the largest"
    return max(rows), max(costs), [*pairs.report.lines(), said, ""]


def lines(plan: Plan) -> list[str]:
    """A plan, for people."""
    parts, settings = plan.parts.in_mb(), plan.settings
    kind = (
        f"{settings.weights} weights, {settings.compute}" if settings.lora_r else f"every parameter, {settings.compute}"
    )
    adapters = f", LoRA r={settings.lora_r}" if settings.lora_r else ""
    how = (
        "checkpoints in host memory"
        if settings.offload
        else "checkpointing"
        if settings.checkpointing
        else "no checkpointing"
    )
    found = [
        f"{plan.shape.name}: {plan.shape.parameters / 1e9:.2f} B parameters, {kind}{adapters}, {how}, {settings.optimiser}",
        f"at {plan.tokens} tokens per forest, the fullest moment of a step:",
        *(f"  {_WORDS[name]:24s}{value:10,.0f} MiB" for name, value in parts.items() if value >= 0.5),
        f"  {'in all':24s}{plan.parts.total / MIB:10,.0f} MiB of {plan.card.memory / MIB:,.0f} ({plan.card.name})",
    ]
    if plan.fits:
        length = "max_length as asked for" if plan.is_asked else "largest safe max_length"
        if plan.largest_pair and not plan.is_asked:
            length = "longest row of the data (a pair has one prompt and two completions):"
        found.append(f"fits: {length} {plan.max_length}, up to {plan.tokens} tokens per forest")
        if plan.pairs_per_s:
            slow, fast = plan.pairs_per_s
            found.append(
                f"speed: of the order of {slow:.2g} to {fast:.2g} pairs/s for pairs of {USUAL_PAIR} tokens (arithmetic from "
                "datasheets, not measured)"
            )
    return found


def refusal(plan: Plan) -> str:
    """Why nothing fits, and the cheapest change."""
    return (
        f"{plan.shape.name} does not fit {plan.card.name}: forests of {plan.tokens} tokens, which is the least for "
        f"{'this data' if plan.largest_pair else f'max_length {plan.tokens // 2}'}, take {plan.parts.total / MIB:,.0f} MiB of "
        f"{plan.card.memory / MIB:,.0f}; the cheapest change: {plan.change}"
    )


def table() -> str:
    """Markdown: for each model that comes along, the largest safe max_length by card, under QLoRA."""
    rows = [
        "| QLoRA, r=16, all linear layers | weights and adapters | " + " | ".join(SIZES_OF_TABLE) + " |",
        "|---" * (2 + len(SIZES_OF_TABLE)) + "|",
    ]
    for name in shipped_names():
        cells, static = [], 0
        for size in SIZES_OF_TABLE:
            plan = make_plan(shipped_shape(name), StepSettings(), read_card(size))
            static = plan.parts.weights + plan.parts.adapters
            cells.append(f"{plan.max_length}" if plan.fits else f"needs {plan.change}")
        rows.append(f"| {name} | {static / 2**30:.1f} GiB | {' | '.join(cells)} |")
    return "\n".join(rows)


def _refuse_what_needs_a_model(options: PlanOptions, output: str | None, as_json: bool) -> None:
    given = [name for name in ("gpu", "data", "max_length", "optim", "lora_target_modules") if getattr(options, name)]
    given += ["output"] * bool(output) + ["json"] * as_json
    if given:
        raise ConfigError(
            f"{given[0]} is given without a model; expected --model with one of {', '.join(shipped_names())}, a folder, a "
            "config.json or a hub id"
        )


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"output={path} exists; expected a file that does not, so that nothing is overwritten"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"output={path} cannot be written ({error.strerror}); expected a file in a folder you may write to"
        ) from error


def _to(stream: Any) -> Callable[[str], None]:
    return lambda line: print(line, file=stream)
