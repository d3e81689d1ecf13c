"""What does an adapter folder hold, and does it fit a base?

adapter = read_adapter(folder, base=None)        its files, before any model is looked at
fit = check_fit(adapter, path, config)           names and shapes against the base's, without its weights
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_engine.errors import ModelError
from dpo_engine.model.fingerprint import weights_fingerprint
from dpo_engine.train.card import read_facts, shape_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder."""

    folder: Path
    config: dict[str, Any]
    """Its adapter_config.json."""
    base: str
    """The model it is put on: as the user said, or as its config names it."""
    facts: dict[str, Any] | None
    """Its dpo_engine_run.json."""
    shapes: dict[str, tuple[int, ...]]
    """Of its tensors, by name."""

    @property
    def rank(self) -> int | None:
        """Its largest rank; None for an adapter that has none."""
        ranks = [self.config.get("r"), *(self.config.get("rank_pattern") or {}).values()]
        return max((rank for rank in ranks if isinstance(rank, int)), default=None)

    @property
    def from_4bit(self) -> bool:
        """Whether its record says that it was trained on 4-bit weights."""
        return bool((self.facts or {}).get("load_in_4bit"))


@dataclass(frozen=True)
class Fit:
    """An adapter on its base, as far as shapes tell."""

    parameters: int
    """Of the base."""
    on_head: bool
    """Whether the head is adapted."""


def read_adapter(folder: str | Path, base: str | None = None) -> Adapter:
    """The adapter in `folder`.

    Args:
        base: the model it is put on, instead of the one that its config names.

    Raises:
        ModelError: no such folder, no adapter in it, an adapter that cannot be read or that is no adapter of weights.
        ConfigError: its record is of another version.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ModelError(f"adapter {folder}: no such folder; expected the output folder of a LoRA run")
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"adapter folder {folder} has no {CONFIG}; {_what_instead(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}); expected what peft saved") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ModelError(f"{path} names no peft_type; expected what peft saved")
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise ModelError(f"{path} names no base model; say which one with --base")
    return Adapter(folder=folder, config=config, base=str(named), facts=read_facts(folder), shapes=_shapes(folder))


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (Path(folder).expanduser() / CONFIG).is_file()


def check_fit(adapter: Adapter, path: str, config: Any) -> Fit:
    """Whether the adapter's tensors are those that this base takes; only shapes are built.

    Args:
        path: the base, for messages.
        config: the base's, as `check_model` returned it.

    Raises:
        ModelError: an adapter of another base, one that cannot be merged, or one on the head of a base that ties it.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    _check_recorded_shape(adapter, path, config)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        parameters = sum(parameter.numel() for parameter in base.parameters())
        tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
        try:
            peft_config = PeftConfig.from_pretrained(str(adapter.folder))
            if getattr(peft_config, "is_prompt_learning", False):
                raise ModelError(
                    f"adapter {adapter.folder} is of type {adapter.config['peft_type']}, which adds tokens and no weights: it "
                    "cannot be merged; expected LoRA"
                )
            peft_config.inference_mode = True
            model: Any = get_peft_model(base, peft_config, low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
            if isinstance(error, ModelError):
                raise
            said = " ".join(str(error).split())
            raise ModelError(
                f"adapter {adapter.folder} does not fit the base {path}: {said[:300]}; give its own base with --base"
            ) from error
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    _compare(adapter, path, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    plain = model.get_base_model()
    adapted = [_is_adapted(module) for module in (plain.get_output_embeddings(), plain.get_input_embeddings())]
    if tied and any(adapted):
        raise ModelError(
            f"adapter {adapter.folder} changes the {'head' if adapted[0] else 'input embeddings'}, and the base {path} ties its "
            "head to its input embeddings: merging would change both, and the merged model would be another one; serve base and "
            "adapter as they are"
        )
    return Fit(parameters=parameters, on_head=adapted[0])


def put_on(model: nn.Module, adapter: Adapter) -> Any:
    """The model with the adapter on it, frozen, in eval mode; adapter weights in float32.

    Raises:
        ModelError: the adapter's weights do not fit.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        policy = PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=False)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise ModelError(f"adapter {adapter.folder} cannot be put on its base: {said[:300]}") from error
    return policy.requires_grad_(False).eval()


def _what_instead(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return "it holds a whole model, which needs no merging: serve it as it is"
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    if checkpoints:
        return f"expected an adapter; it holds {', '.join(checkpoints[-3:])}: give one of these"
    return "expected the output folder of a LoRA run"


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = ", only adapter_model.bin, a pickle, which can run code" * (folder / "adapter_model.bin").is_file()
        raise ModelError(f"adapter folder {folder} has no {WEIGHTS}{pickled}; expected what training saved")
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); expected what training saved") from error


def _check_recorded_shape(adapter: Adapter, path: str, config: Any) -> None:
    recorded = (adapter.facts or {}).get("base") or {}
    for name, found in shape_of(config).items():
        if name in recorded and recorded[name] != found:
            raise ModelError(
                f"adapter {adapter.folder} was trained on {recorded.get('name')} with {name} {recorded[name]}, and the base {path} "
                f"has {found}; give its own base with --base"
            )
    begun = (adapter.facts or {}).get("from_adapter") or {}
    if begun.get("mode") == "stack" and path == recorded.get("path"):
        raise ModelError(
            f"adapter {adapter.folder} was trained on {path} with the adapter {begun.get('folder')} merged into it; give that "
            f"merged model with --base (dpo-engine export {begun.get('folder')} --merge)"
        )
    known, now = recorded.get("fingerprint"), weights_fingerprint(path)
    if known and now and known != now:
        raise ModelError(
            f"adapter {adapter.folder} was trained on other weights ({recorded.get('name')}, fingerprint {known}) than those of "
            f"the base {path} ({now}); give its own base with --base"
        )


def _compare(adapter: Adapter, path: str, wanted: dict[str, tuple[int, ...]]) -> None:
    # Where embeddings are adapted, peft saves their own weights too.
    found = {name: shape for name, shape in adapter.shapes.items() if ".base_layer." not in name}
    extra = {name for name in found if name not in wanted and not _of_embeddings(name)}
    lines = [f"{name} is missing" for name in wanted if name not in found]
    lines += [f"{name} has no place there" for name in found if name in extra]
    lines += [
        f"{name} is {shape} instead of {wanted[name]}"
        for name, shape in found.items()
        if name in wanted and wanted[name] != shape
    ]
    if lines:
        more = f" and {len(lines) - 2} more" if len(lines) > 2 else ""
        raise ModelError(
            f"adapter {adapter.folder} does not fit the base {path}: {'; '.join(lines[:2])}{more}; give its own base with --base"
        )


def _of_embeddings(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "lm_head", "wte", "embed_out", "embeddings"))


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
