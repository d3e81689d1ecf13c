"""How far may a fused log-prob be from the truth?

The oracle is float64 from the same rounded inputs. The bound on row i is

    b_i = 2**-23 * (1 + M_i) * max(16 * max(1, sqrt(D / 512)), D / 16)

with M_i the largest |partial sum| of a logit of the row over the first k products, for every k and v, and at least
max_v |z_iv|: matrix units truncate, so the error grows with D and with what was summed on the way. It holds for every
row and dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logits_in_float64(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """`softcap(logit_scale * (hidden @ weight.T + bias))`, (N, V) float64."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z += bias.double()
    z *= logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def row_bound(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0) -> Tensor:
    """`b_i`, (N,) float64. A softcap is left out of M: it only makes logits smaller after they were rounded."""
    rows, vectors = hidden.double(), weight.double()
    total = torch.zeros(hidden.shape[0], weight.shape[0], dtype=torch.float64, device=hidden.device)
    largest = torch.zeros(hidden.shape[0], dtype=torch.float64, device=hidden.device)
    for k in range(hidden.shape[1]):
        total.addr_(rows[:, k], vectors[:, k])
        largest = torch.maximum(largest, total.abs().amax(1))
    if bias is not None:
        shifted = (total + bias.double()).abs()
        largest = torch.maximum(largest, shifted.where(shifted.isfinite(), 0.0).amax(1))
    depth = hidden.shape[1]
    growth = max(16 * max(1.0, math.sqrt(depth / 512)), depth / 16)
    return 2.0**-23 * (1 + abs(logit_scale) * largest) * growth
