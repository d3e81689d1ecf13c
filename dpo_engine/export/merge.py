"""How do base and adapter become one set of weights?

    policy = put_on(held_base(path, dtype), adapter)
    model = merge(policy, dtype, quantised)          W + scale * B @ A, layer by layer in float32, each rounded once

In the base's own dtype a bfloat16 delta would be rounded before it is added. An adapter trained on NF4 weights learnt to correct
those, so what they stand for is what it is merged into.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.errors import ExportError
from dpo_engine.model.loading import load_model

NARROW = (torch.bfloat16, torch.float16)
EXACT = 1e-4
"""Float32: how far a merged layer may be off, of its largest output."""


def held_in(target: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """What weights are kept in while they are merged: 16 bits where they come from 16 bits and go to 16, else float32."""
    return stored if target in NARROW and stored in NARROW else torch.float32


def quantised_base(path: str, dtype: torch.dtype) -> Any:
    """The base as a 4-bit run read it, in `dtype`."""
    return load_model(path, dtype=dtype, trainable=False, in_4bit=True)


@torch.no_grad()
def merge(policy: Any, dtype: torch.dtype, quantised: nn.Module | None = None) -> Any:
    """The plain model that a PeftModel computes, each adapted weight rounded to `dtype` once; its own weights are changed.

    Args:
        policy: its base in a dtype that holds the base's weights exactly.
        quantised: the base in 4 bits, whose weights are taken instead.

    Raises:
        ExportError: an adapter that cannot be merged, or whose merge is not finite or nothing that `dtype` can hold.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    opened = {} if quantised is None else _quantised_layers(quantised)
    for name, layer in list(policy.get_base_model().named_modules()):
        adapted = isinstance(layer, BaseTunerLayer)
        plain: Any = layer.get_base_layer() if adapted else layer
        if name in opened:
            weight = _opened(opened[name])
            plain.weight.data = weight.t().contiguous() if type(plain).__name__ == "Conv1D" else weight
        elif adapted:
            plain.weight.data = plain.weight.data.float()
        if adapted:
            _merge_layer(name, layer, plain)
        if adapted or name in opened:
            plain.weight.data = _rounded(f"{name}.weight", plain.weight.data, dtype)
    model = policy.merge_and_unload()  # all is merged: what is left is to take the adapters off
    config = model.config
    for tag in ("quantization_config", "auto_map"):  # a plain model, which asks for no code of its own
        if hasattr(config, tag):
            delattr(config, tag)
    return model


def round_once(model: Any, dtype: torch.dtype) -> None:
    """Every parameter in `dtype`, but those that this architecture keeps in float32.

    Raises:
        ExportError: a weight that `dtype` cannot hold.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if dtype != torch.float32 and any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept):
            continue
        parameter.data = _rounded(name, parameter.data, dtype)
    model.config.dtype = dtype


def _merge_layer(name: str, layer: Any, plain: Any) -> None:
    """Add a layer's adapter to its float32 weight, and hold the sum to what the adapter on it gave."""
    probe = _probe(plain)
    wanted = None if probe is None else layer(probe)
    try:
        layer.merge(safe_merge=True)
    except (
        ValueError,
        NotImplementedError,
        AttributeError,
        TypeError,
        RuntimeError,
    ) as error:  # peft has no type for it
        raise ExportError(f"the adapter cannot be merged: {name}: {' '.join(str(error).split())}") from error
    if wanted is not None:
        _require_same(name, wanted, plain(probe))


def _probe(layer: Any) -> Tensor | None:
    """Random rows for a linear layer; None for another kind."""
    if not isinstance(layer, nn.Linear):
        return None
    return torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))


def _require_same(name: str, wanted: Tensor, found: Tensor) -> None:
    """A layer, merged and not yet rounded, must give what the adapter on it gave."""
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not off <= EXACT:
        raise ExportError(
            f"the adapter cannot be merged: {name}, merged in float32, is off by {off:.2g} of its largest output; expected at "
            f"most {EXACT:g}: serve base and adapter as they are"
        )


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = weight.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise ExportError(f"{name} has values that {_name(dtype)} cannot hold; expected another --dtype: bfloat16")
    return rounded


def _quantised_layers(model: nn.Module) -> dict[str, Any]:
    import bitsandbytes as bnb

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}


def _opened(layer: Any) -> Tensor:
    """What a 4-bit weight stands for, not rounded to the dtype it was computed in."""
    import bitsandbytes as bnb

    state = layer.weight.quant_state
    before, state.dtype = state.dtype, torch.float32
    try:
        return bnb.functional.dequantize_4bit(layer.weight.data, state)
    finally:
        state.dtype = before


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
