"""What is the function from hidden states to logits?

    x = logit_scale * (hidden @ weight.T + lora_hidden @ lora_weight.T + bias)
    z = softcap * tanh(x / softcap)

`Head` holds what that line needs of the vocabulary, `Rows` what it needs of the tokens, and here are the two small
functions that every path shares: the logit of a row's own label, and the slope `dz/dx` of the softcap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_engine.ops.weights import HeadWeight


@dataclass(frozen=True, kw_only=True)
class Head:
    weight: HeadWeight  # (V, D)
    bias: Tensor | None = None  # (V,)
    lora_weight: Tensor | None = None  # (V, r)
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Scored tokens: each row of `hidden` predicts its label."""

    hidden: Tensor  # (N, D)
    labels: Tensor  # (N,) int64, each in [0, V)
    lora_hidden: Tensor | None = None  # (N, r)

    @property
    def count(self) -> int:
        return self.hidden.shape[0]

    def at(self, span: slice | Tensor) -> Rows:
        """Those rows only."""
        lora_hidden = None if self.lora_hidden is None else self.lora_hidden[span]
        return Rows(hidden=self.hidden[span], labels=self.labels[span], lora_hidden=lora_hidden)


def softcap_slope(x: Tensor, softcap: float) -> Tensor:
    """`1 - tanh(x / softcap)**2`, as `4 / (e + 1 / e + 2)` with `e = exp(2 |x / softcap|)`: nothing cancels.

    Not by `cosh`: on a CPU its last bits depend on where in the tensor a number stands.
    """
    e = (x / softcap).abs_().mul_(2.0).exp_()
    return e.addcdiv_(e.new_ones(()), e).add_(2.0).reciprocal_().mul_(4.0)


def capped(x: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """`(z, dz/dx)`; the slope is 1 without a softcap."""
    if softcap is None:
        return x, torch.ones_like(x)
    return softcap * torch.tanh(x / softcap), softcap_slope(x, softcap)
