"""How do base and adapter become one set of weights?

    base = float32_base(path, four_bit=None)         full precision, or what NF4 made of it
    model = merge(put_on(base, adapter))             W + scale * B @ A, in float32
    round_once(model, dtype)

Everything happens in float32, so that each weight is rounded once: in the base's own dtype a bfloat16 delta would be rounded
before it is added. An adapter trained on NF4 weights learnt to correct those, so they are what it is merged into.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from dpo_engine.errors import ExportError
from dpo_engine.model.loading import load_model


def float32_base(path: str, *, four_bit: torch.dtype | None = None) -> Any:
    """The base in float32.

    Args:
        path: accepted by `check_model`.
        four_bit: dtype that a 4-bit run read the weights in; its linear layers then hold the values that NF4 stands for.

    Raises:
        EngineError: weights that cannot be read; 4 bits without bitsandbytes.
    """
    model = load_model(path, dtype=torch.float32, trainable=False)
    if four_bit is not None:
        quantised = load_model(path, dtype=four_bit, trainable=False, in_4bit=True)
        _copy_dequantised(quantised, model)
    return model


def merge(policy: Any) -> Any:
    """The plain model that a PeftModel in float32 computes; its own weights are changed.

    Raises:
        ExportError: an adapter that cannot be merged, or whose merge is not finite.
    """
    try:
        model = policy.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        raise ExportError(f"the adapter cannot be merged: {' '.join(str(error).split())}") from error
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
        rounded = parameter.data.to(dtype)
        if not bool(rounded.isfinite().all()):
            raise ExportError(f"{name} has values that {_name(dtype)} cannot hold; expected another --dtype: bfloat16")
        parameter.data = rounded
    model.config.dtype = dtype


def _copy_dequantised(quantised: nn.Module, model: nn.Module) -> None:
    import bitsandbytes as bnb

    plain = dict(model.named_modules())
    with torch.no_grad():
        for name, layer in quantised.named_modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                state = layer.weight.quant_state
                state.dtype = torch.float32  # what it stands for, not rounded to the dtype it was computed in
                target: Any = plain[name]
                target.weight.copy_(bnb.functional.dequantize_4bit(layer.weight.data, state))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
