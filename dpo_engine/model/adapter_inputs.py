"""In which dtype is a LoRA layer handed its input?

peft casts it to the adapter's dtype, float32, whereupon autocast casts it back to its own: two copies for nothing, one of
which is kept for backward in every adapted layer. Under autocast the adapter can as well be handed what the layer itself was.
The numbers are the same to the last bit wherever the cast does nothing but widen: where no dropout is drawn on it, one adapter
takes it, and that adapter is plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def adapter_inputs_as_they_are(model: nn.Module, autocast: bool) -> Iterator[int]:
    """Within it, adapters of which that changes no number take their inputs uncast.

    It must hold until the backward pass is done: a checkpointed layer runs in it again.

    Args:
        autocast: whether all that runs within is under autocast; else nothing is done.

    Yields:
        How many layers that is.
    """
    layers = _layers(model) if autocast else []
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield len(layers)
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def _layers(model: nn.Module) -> list[Any]:
    if not any(hasattr(module, "peft_config") for module in model.modules()):
        return []
    from peft.tuners.lora import LoraLayer

    return [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer)
        and getattr(module, "cast_input_dtype_enabled", False)
        and len(active := [name for name in module.active_adapters if name in module.lora_A]) == 1
        and isinstance(module.lora_dropout[active[0]], nn.Identity)
        and active[0] not in module.lora_variant
        and not module.lora_bias.get(active[0])
    ]
