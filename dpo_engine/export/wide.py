"""How does a model compute in float32 while its weights lie in 16 bits? Each module's are widened while it runs.

with in_float32(model):
    model(...)                  # one module's weights are there twice, for as long as its forward takes

What float32 weights would give to the last bit, since widening is exact; an 8B model takes 16 GB for it instead of 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, every module with weights of 16 bits runs on float32 copies of them, and 4-bit layers multiply in float32."""
    held: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def widen(module: nn.Module, *_: Any) -> None:
        narrow = [p for p in module.parameters(recurse=False) if p.dtype in _NARROW]
        held[module] = [(parameter, parameter.data) for parameter in narrow]
        for parameter in narrow:
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter, data in held.pop(module, []):
            parameter.data = data

    handles: list[Any] = []
    multiplied: list[tuple[Any, torch.dtype, torch.dtype]] = []
    try:
        for module in model.modules():
            layer: Any = module  # one of bitsandbytes has its own compute dtype; an adapter around it does not
            state = layer.weight.quant_state if hasattr(layer, "compute_dtype") else None
            if state is not None:
                multiplied.append((layer, layer.compute_dtype, state.dtype))
                layer.compute_dtype = state.dtype = torch.float32
            if any(parameter.dtype in _NARROW for parameter in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(widen))
                handles.append(module.register_forward_hook(restore, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(held):
            restore(module)
        for layer, compute, opened in multiplied:
            layer.compute_dtype, layer.weight.quant_state.dtype = compute, opened
