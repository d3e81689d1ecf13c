"""What is the function from hidden states to logits?

    z = softcap(logit_scale * (hidden @ weight.T + bias))        softcap(x) = softcap * tanh(x / softcap)

`Head` holds the four numbers of that line, and the two small functions every path shares: the logit of one row's own
label, and the slope `dz/dx` of the softcap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Head:
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None


def softcap_slope(x: Tensor, softcap: float) -> Tensor:
    """`1 - tanh(x / softcap)**2`, as `1 / cosh(x / softcap)**2`: the difference would cancel where tanh saturates."""
    return (x / softcap).cosh_().reciprocal_().square_()


def label_logits(hidden: Tensor, head: Head, label_rows: Tensor, label_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`z[i, labels[i]]` by one dot product a row, and the slope of the softcap there.

    Args:
        hidden: (N, D), in the accumulation dtype (float32, or float64 for float64 inputs).
        label_rows: (N, D) `weight[labels]`, in the dtype of `hidden`.
        label_bias: (N,) `bias[labels]`, likewise, or None.

    Returns:
        `(z, slope)`, both (N,) in the dtype of `hidden`; the slope is 1 without a softcap.
    """
    x = torch.linalg.vecdot(hidden, label_rows)
    if label_bias is not None:
        x += label_bias
    x *= head.logit_scale
    if head.softcap is None:
        return x, torch.ones_like(x)
    return head.softcap * torch.tanh(x / head.softcap), softcap_slope(x, head.softcap)
