"""Does the backbone run on Liger's kernels, and are they right on this model?

    use = choose_liger(model, "auto", torch.device("cuda"))

Norms, rope and gated activations are Liger's then, by transformers' own mechanism; its losses never are: log-probs come from the
engine's operator. What it replaces in a module of transformers (rope, and classes) it replaces for every model of that kind in the
process, and it cannot be taken back; so a model is asked for log-probs before and after.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model.layout import choose_layout
from dpo_engine.model.probe import TOLERANCES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIGER = ("auto", "on", "off")
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
_MARK = "liger_kernels"
_LENGTH = 24  # tokens of the probe


@dataclass(frozen=True)
class LigerUse:
    """Whether Liger's kernels are in place, and what to say of it."""

    on: bool
    line: str | None = None


def has_liger(model: Any) -> bool:
    """Whether `apply_liger` changed this model."""
    return bool(getattr(model, _MARK, False))


def choose_liger(
    model: PreTrainedModel,
    choice: str,
    device: torch.device,
    *,
    share_prompt: str = "auto",
    parts: dict[str, bool] | None = None,
) -> LigerUse:
    """Put Liger's kernels in place where they are asked for, or can be.

    Args:
        model: the causal language model itself, bound (`bind_scoring`), where it will compute.
        choice: "on", "off", or "auto": where liger-kernel is installed, on a CUDA device, for a model that it supports.
        device: where the run computes.
        share_prompt: as for `choose_layout`.
        parts: which of its kernels (rope, rms_norm, swiglu, ...); all that the model can have if not given.

    Raises:
        ConfigError: "on", and something is missing.
        ModelError: with the kernels the model says something else.
    """
    if choice == "off":
        return LigerUse(on=False)
    missing = why_not_liger(model, device)
    if missing is not None:
        if choice == "on":
            raise ConfigError(f"use_liger_kernel=on, but {missing}; set it to auto or off")
        return LigerUse(on=False, line=f"liger kernels: none ({missing})" if device.type == "cuda" else None)
    before = choose_layout(model, share_prompt)
    line = apply_liger(model, parts)
    after = choose_layout(model, share_prompt)
    if (after.name, after.longest) != (before.name, before.longest):
        line += (
            f"; with them the probe agrees to layout {after.name}, without to {before.name}: try use_liger_kernel: off"
        )
    return LigerUse(on=True, line=line)


def why_not_liger(model: PreTrainedModel, device: torch.device) -> str | None:
    """What is missing, for a sentence; None for nothing."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    if device.type != "cuda":
        return f"its kernels are for CUDA devices, and this run is on {device.type}"
    if model.device.type != "cuda":
        return f"the weights are on {model.device.type} until they are sharded, where its kernels cannot be probed"
    if model.config.model_type not in _supported():
        return f"liger-kernel {_version()} does not support model_type {model.config.model_type!r}"
    return None


def apply_liger(model: PreTrainedModel, parts: dict[str, bool] | None = None) -> str:
    """Replace norms, rope and gated activations of a model by Liger's, and prove that it says the same.

    Returns:
        What to say of it.

    Raises:
        ModelError: it does not say the same, or this version of liger-kernel does not fit.
    """
    from transformers.integrations.liger import apply_liger_kernel

    off = dict.fromkeys(LOSSES, False)
    known = inspect.signature(_supported()[model.config.model_type]).parameters
    names = [
        name for name, it in known.items() if name not in (*LOSSES, "model") and (parts or {}).get(name, it.default)
    ]
    before = _logps(model)
    try:
        apply_liger_kernel(model, {**(parts or {}), **off})
        after = _logps(model)
    except (AttributeError, TypeError, ValueError, RuntimeError, ImportError) as error:
        why = " ".join(str(error).split())[:160]
        raise ModelError(
            f"liger-kernel {_version()} cannot run {type(model).__name__} ({type(error).__name__}: {why}); "
            "set use_liger_kernel: off"
        ) from error
    difference = float(((after - before).abs() / before.abs().clamp(min=1)).max())
    if not difference <= TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16]):
        raise ModelError(
            f"with the kernels of liger-kernel {_version()} a log-prob of {type(model).__name__} is off by "
            f"{difference:.2g} of itself; expected rounding only: set use_liger_kernel: off"
        )
    setattr(model, _MARK, True)
    return f"liger kernels: {', '.join(names)} of {model.config.model_type} (liger-kernel {_version()})"


def _supported() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def _version() -> str:
    return importlib.metadata.version("liger-kernel")


@torch.no_grad()
def _logps(model: PreTrainedModel) -> Tensor:
    """What the model's own forward says of some tokens."""
    generator = torch.Generator().manual_seed(0)
    size = min(model.config.get_text_config().vocab_size, 4096)
    ids = torch.randint(size, (1, _LENGTH), generator=generator).to(model.device)
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    finally:
        for module, mode in training:
            module.training = mode
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])
