"""What is the mean of a token's logits over the vocabulary? A number that some trainers log; nothing trains by it.

Without a softcap the mean goes through the product, `mean_v(h . w_v) = h . mean_v(w_v)`, and costs one row of the head. With
one it takes a matrix product, slab by slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_engine.ops.weights import DenseWeight, is_quantised, quantised_weight

_SLAB = 4096  # rows of the head at a time
_ROWS = 2048  # tokens at a time


@torch.no_grad()
def mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    *,
    lora: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature).mean(-1)`, without gradient.

    Args:
        hidden, weight, bias, logit_scale, softcap, temperature, lora: as for `linear_logps`; `weight` whole, not a `DTensor`.

    Returns:
        (...) float32 (float64 for float64 inputs).
    """
    head = quantised_weight(weight) if is_quantised(weight) else DenseWeight(weight)
    vocabulary = head.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.reshape(-1, hidden.shape[-1])
    inner, outer = (None, None) if lora is None else (lora[0].reshape(rows.shape[0], -1), lora[1])
    slabs = [(first, min(first + _SLAB, vocabulary)) for first in range(0, vocabulary, _SLAB)]
    with torch.autocast(hidden.device.type, enabled=False):
        if softcap is None:
            total = rows.to(wide) @ torch.stack([head.slab(*slab).to(wide).sum(0) for slab in slabs]).sum(0)
            total += 0 if bias is None else bias.to(wide).sum()
            total += 0 if inner is None or outer is None else inner.to(wide) @ outer.to(wide).sum(0)
        else:
            total = rows.new_zeros(rows.shape[0], dtype=wide)
            for first, last in slabs:
                slab = head.slab(first, last)
                for start in range(0, rows.shape[0], _ROWS):
                    span = slice(start, start + _ROWS)
                    logits = (rows[span].to(slab.dtype) @ slab.T).to(wide)
                    logits += 0 if bias is None else bias[first:last].to(wide)
                    if inner is not None and outer is not None:
                        logits += inner[span].to(wide) @ outer[first:last].to(wide).T
                    total[span] += softcap * torch.tanh(logits * (logit_scale / softcap)).sum(-1)
    factor = 1.0 if softcap is not None else logit_scale
    return (total * (factor / (vocabulary * temperature))).view(hidden.shape[:-1])
