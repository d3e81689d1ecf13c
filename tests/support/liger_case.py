"""A model on Liger's kernels under Triton's interpreter, apart from the tests: what Liger replaces it replaces for the process.

Run as `TRITON_INTERPRET=1 python -m support.liger_case`; it prints one JSON object.
"""

from __future__ import annotations

import json
from typing import Any

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

from dpo_engine.batch import build_forest
from dpo_engine.model.layout import prepare_model
from dpo_engine.model.liger import apply_liger, has_liger
from dpo_engine.model.scoring import forest_token_logps
from dpo_engine.reference.space import reference_space
from support.tiny_pairs import random_pairs, tiny_llama

_convert = interpreter._implicit_cvt


def _with_floats(value: Any) -> Any:
    """The interpreter hands a kernel its floating-point arguments as Python numbers; compiled kernels get values with `.to`."""
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), tl.float32), tl.float32)
    return _convert(value)


def main() -> None:
    import liger_kernel.ops.rms_norm as rms_norm

    interpreter._implicit_cvt = _with_floats
    rms_norm.rsqrt = lambda value: tl.math.rsqrt(value)  # libdevice's is for a card
    model: Any = tiny_llama()
    layout = prepare_model(model).name
    forest = build_forest(random_pairs(4).trees, layout)
    before, addresses = scored(model, forest), [reference_space(model)]
    line = apply_liger(model)
    after = scored(model, forest)
    addresses.append(reference_space(model))
    calls = {model.model.norm.forward.__func__.__qualname__, model.model.layers[0].mlp.forward.__func__.__qualname__}
    print(
        json.dumps(
            {
                "layout": layout,
                "line": line,
                "marked": has_liger(model),
                "replaced": sorted(calls),
                "logps": float((after[0] - before[0]).abs().max()),
                "gradients": max(float((b - a).norm() / a.norm()) for a, b in zip(before[1], after[1], strict=True)),
                "space": addresses[1].differences(addresses[0].parts),
            }
        )
    )


def scored(model: Any, forest: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs of a forest and all gradients."""
    model.zero_grad()
    logps = forest_token_logps(model, forest)
    logps.square().sum().backward()
    return logps.detach(), [parameter.grad.clone() for parameter in model.parameters()]


if __name__ == "__main__":
    main()
