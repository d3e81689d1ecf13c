"""What does `linear_logps` mean? The plain definition, which builds the logits.

It is the oracle of the tests and the naive path of the benchmarks, and nothing else: at N=8192, V=128256 it needs
gigabytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_engine.ops.head import Head, Rows


def logits_by_definition(rows: Rows, head: Head) -> Tensor:
    """`z = softcap(logit_scale * (hidden @ weight.T + lora_hidden @ lora_weight.T + bias))`.

    Args:
        rows: `hidden` and `lora_hidden` in one dtype.
        head: its tensors in the dtype of `rows`.

    Returns:
        (N, V) float32, or float64 for float64 inputs.
    """
    logits = torch.nn.functional.linear(rows.hidden, head.weight.slab(0, head.weight.shape[0]), head.bias)  # (N, V)
    if rows.lora_hidden is not None and head.lora_weight is not None:
        logits = logits + rows.lora_hidden @ head.lora_weight.T
    logits = logits.to(torch.promote_types(rows.hidden.dtype, torch.float32)) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
