"""What does `linear_logps` mean? The plain definition, which builds the logits.

It is the oracle of the tests and the naive path of the benchmarks, and nothing else: at N=8192, V=128256 it needs
gigabytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_engine.ops.head import Head


def logps_by_definition(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """`log_softmax(z)[labels]` with `z = softcap(logit_scale * (hidden @ weight.T + bias))`, upcast before the softmax.

    Args:
        hidden: (N, D).
        head: weight (V, D) and bias (V,) in the dtype of `hidden`.
        labels: (N,) int64, each in `[0, V)`.

    Returns:
        (N,) float32, or float64 for float64 inputs; differentiable by ordinary autograd.
    """
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)  # (N, V)
    logits = logits.to(torch.promote_types(hidden.dtype, torch.float32)) * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
