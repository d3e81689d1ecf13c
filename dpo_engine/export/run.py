"""What happens in one `dpo-engine export`? From an adapter folder to commands that serve it, a merged model, a GGUF file.

Everything that can be refused is refused before weights are read; a merged model is called done after it was read back and
said what the adapter on its base says.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_engine.errors import ConfigError, ExportError, ModelError
from dpo_engine.export.adapter import Adapter, check_fit, put_on, read_adapter
from dpo_engine.export.check import NOTABLE, Answers, Difference, answers, compare, probe_sequences, require_same
from dpo_engine.export.folder import check_disk, check_memory, check_output, leftovers, whole_folder
from dpo_engine.export.gguf import OUTTYPES, by_hand_lines, convert, find_converter
from dpo_engine.export.merge import held_in, merge, quantised_base, round_once
from dpo_engine.export.serving import adapter_lines, merged_lines
from dpo_engine.export.wide import in_float32
from dpo_engine.model.loading import DTYPES, check_model, load_model, load_tokenizer, resolve_model
from dpo_engine.train.budget import host_bytes
from dpo_engine.train.card import SCHEMA as CARD_SCHEMA
from dpo_engine.train.card import shape_of, stated_license, versions, write_card

SCHEMA = 1
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `dpo-engine export` is told."""

    adapter: str
    merge: bool = False
    dtype: str = "auto"
    output: str | None = None
    base: str | None = None
    load_in_4bit: str = "auto"
    gguf: bool = False
    outtype: str = "q8_0"
    llama_cpp: str | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", ["auto", *DTYPES]),
            ("load_in_4bit", ["auto", "true", "false"]),
            ("outtype", [*OUTTYPES]),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)} is out of range; expected one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class _Merge:
    """A merge that nothing speaks against."""

    adapter: Adapter
    path: str
    config: Any
    tokenizer: Any
    output: Path
    dtype: torch.dtype
    held: torch.dtype
    """What weights are kept in while they are merged."""
    four_bit: torch.dtype | None
    """The dtype that a 4-bit run read the base in; None for weights that are no NF4."""


def run_export(options: ExportOptions, say: Say) -> dict[str, Any]:
    """Check, merge, convert, say how to serve.

    Args:
        say: gets every line meant for a person.

    Returns:
        What `--json` prints; the keys are in `docs/export.md`.

    Raises:
        EngineError: input that cannot be used, or an export that had to stop.
    """
    begin = time.perf_counter()
    adapter = read_adapter(options.adapter, options.base)
    converter = find_converter(options.llama_cpp) if options.gguf else None
    path = resolve_model(adapter.base, progress=say)
    config = check_model(path)
    fit = check_fit(adapter, path, config)
    say(f"adapter {adapter.folder}: {adapter.config['peft_type']}, rank {adapter.rank}, fits its base {path}")
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "adapter": str(adapter.folder),
        "base": path,
        "rank": adapter.rank,
        "merged": None,
        "dtype": None,
        "from_4bit": None,
        "effect": None,
        "check": None,
        "check_4bit": None,
        "gguf": None,
    }
    lines = adapter_lines(adapter, path, on_head=fit.on_head)
    if options.merge or options.gguf:
        plan = _plan(options, adapter, path, config, fit.parameters, say)
        result |= _merge(plan, say)
        target = plan.output / f"{plan.output.name}-{options.outtype}.gguf"
        if options.gguf and converter is not None:
            say(f"converting to GGUF ({options.outtype}) with {converter}")
            convert(converter, plan.output, target, options.outtype)
            result["gguf"] = str(target)
            say(f"GGUF file: {target} ({target.stat().st_size / 2**20:.0f} MiB)")
        lines = merged_lines(plan.output)
        if options.gguf and converter is None:
            lines += by_hand_lines(plan.output, target, options.outtype)
    for line in ["", "serve it", *lines]:
        say(line)
    return result | {"serve": [line.strip() for line in lines], "seconds": round(time.perf_counter() - begin, 3)}


def _plan(options: ExportOptions, adapter: Adapter, path: str, config: Any, parameters: int, say: Say) -> _Merge:
    """Everything that could speak against a merge, asked before weights are read."""
    folder = adapter.folder.resolve()
    output = (
        Path(options.output).expanduser().resolve() if options.output else folder.with_name(folder.name + "-merged")
    )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"the base {path} is stored quantised, and a merge needs full weights; give those with --base, and --load_in_4bit true "
            "if the adapter was trained on 4 bits"
        )
    check_output(output)
    for path_left in leftovers(output):
        say(f"note: {path_left} is of an export that was killed, or still runs; remove it if none runs")
    stored = _base_dtype(path, config)
    dtype = stored if options.dtype == "auto" else DTYPES[options.dtype]
    from_4bit = adapter.from_4bit if options.load_in_4bit == "auto" else options.load_in_4bit == "true"
    trained_in = str((adapter.facts or {}).get("dtype") or "bfloat16")
    if trained_in not in DTYPES:
        raise ConfigError(
            f"{adapter.folder}: its record says dtype {trained_in!r}; expected one of {', '.join(DTYPES)}"
        )
    four_bit = DTYPES[trained_in] if from_4bit else None
    held = held_in(dtype, four_bit or stored)
    gguf = int(parameters * OUTTYPES[options.outtype]) if options.gguf else 0
    check_disk(output, parameters * dtype.itemsize + gguf)
    # The whole model as it is held, a layer in float32, and the 4-bit weights beside it with their embeddings.
    check_memory(int(parameters * (1.1 * held.itemsize + (0.9 if from_4bit else 0))), host_bytes())
    return _Merge(
        adapter=adapter,
        path=path,
        config=config,
        tokenizer=_tokenizer(adapter, path),
        output=output,
        dtype=dtype,
        held=held,
        four_bit=four_bit,
    )


def _merge(plan: _Merge, say: Say) -> dict[str, Any]:
    name = str(plan.dtype).removeprefix("torch.")
    probes = probe_sequences(plan.tokenizer, plan.config)
    base = f"what NF4 makes of {plan.path}" if plan.four_bit else plan.path
    say(f"merging into {base}, each layer in float32; to be written in {name} to {plan.output}")
    model, wanted, effect, check_4bit = _merged(plan, probes)
    round_once(model, plan.dtype)
    with whole_folder(plan.output) as partial:
        _write(model, plan, partial)
        del model
        gc.collect()
        written = _read_back(partial, plan.dtype)
        with in_float32(written):
            difference = compare(wanted, answers(written, probes, wanted))
        del written
        require_same(difference, plan.dtype)
        say(f"read back from the {name} files, against the adapter on its base: {difference.line()}")
        say(f"for comparison, the adapter itself moves a token by {effect:.2e} nats on average")
        if effect and difference.mean > NOTABLE * effect:
            say(
                f"note: rounding to {name} takes back or adds {difference.mean / effect:.0%} of that; --dtype float32, or float16, "
                "keeps more of what was learnt"
            )
        if check_4bit is not None:
            say(f"the 4-bit weights as they are computed in training, against the same: {_numbers(check_4bit)}")
        export = {"dtype": name, "from_4bit": plan.four_bit is not None, "effect": effect, "check": vars(difference)}
        write_card(partial, _facts(plan) | {"export": export})
    say(f"merged model, {name}: {plan.output}")
    return {
        "merged": str(plan.output),
        "check_4bit": {key: getattr(check_4bit, key) for key in ("tokens", "mean", "max")} if check_4bit else None,
        **export,
    }


def _merged(plan: _Merge, probes: list[list[int]]) -> tuple[Any, Answers, float, Difference | None]:
    """The merged model, what the adapter on its base says, how far it moves a token, and how far 4 bits are from that."""
    quantised = check_4bit = None
    if plan.four_bit is not None:
        policy = put_on(quantised_base(plan.path, plan.four_bit), plan.adapter)
        wanted, effect = _answers_and_effect(policy, probes)
        check_4bit = compare(wanted, answers(policy, probes, wanted))
        quantised = policy.unload()
    plain: Any = load_model(plan.path, dtype=plan.four_bit or plan.held, trainable=False)
    policy = put_on(plain.to(plan.held), plan.adapter)
    if plan.four_bit is None:
        wanted, effect = _answers_and_effect(policy, probes)
    return merge(policy, plan.dtype, quantised), wanted, effect, check_4bit


def _answers_and_effect(policy: Any, probes: list[list[int]]) -> tuple[Answers, float]:
    with in_float32(policy):
        wanted = answers(policy, probes)
        with policy.disable_adapter():
            effect = compare(wanted, answers(policy, probes, wanted)).mean
    return wanted, effect


def _write(model: Any, plan: _Merge, folder: Path) -> None:
    """Weights, config, generation config as the base has it, tokenizer with its chat template."""
    from safetensors import SafetensorError
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    model.generation_config = GenerationConfig()  # the base's may hold what transformers reads but refuses to save
    try:
        model.save_pretrained(folder, max_shard_size="5GB")
    except SafetensorError as error:
        raise ExportError(f"output={plan.output} could not be written ({error}); nothing was kept there") from error
    (folder / "generation_config.json").unlink(missing_ok=True)
    own = cached_file(
        plan.path,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if own is not None:
        shutil.copyfile(own, folder / "generation_config.json")
    plan.tokenizer.init_kwargs.pop("auto_map", None)
    plan.tokenizer.save_pretrained(folder)


def _read_back(folder: Path, dtype: torch.dtype) -> Any:
    return load_model(str(folder), dtype=dtype, trainable=False)


def _tokenizer(adapter: Adapter, path: str) -> Any:
    """The one that training saved beside the adapter, else the base's."""
    return load_tokenizer(str(adapter.folder) if (adapter.folder / "tokenizer_config.json").is_file() else path)


def _base_dtype(path: str, config: Any) -> torch.dtype:
    """What the base says of itself, else what its first weights are in, else float32."""
    stated = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if stated is not None:
        dtype = getattr(torch, str(stated).removeprefix("torch."), torch.float32)
        return dtype if dtype in DTYPES.values() else torch.float32
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(next(iter(names)), torch.float32)
    return torch.float32


def _facts(plan: _Merge) -> dict[str, Any]:
    """The adapter's own record; without one, what is known all the same."""
    named = plan.adapter.base
    facts = plan.adapter.facts or {"schema": CARD_SCHEMA, "method": None, "lora": {"r": plan.adapter.rank}}
    if plan.adapter.facts is None or plan.adapter.facts.get("base", {}).get("path") != plan.path:  # another was given
        facts["base"] = {
            "name": named,
            "path": plan.path,
            "license": stated_license(named, plan.path),
            **shape_of(plan.config),
        }
    return facts | {"versions": versions()}


def _numbers(difference: Difference) -> str:
    return f"{difference.tokens} tokens: mean {difference.mean:.2e}, largest {difference.max:.2e} nats"
