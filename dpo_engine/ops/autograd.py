"""How does autograd see the tiled paths? Two functions: one for a frozen head, one for a head that trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dpo_engine.ops.head import Head
from dpo_engine.ops.tiled import RowStatistics, TilePasses, head_backward, logps_and_unit, logps_only


class FrozenHeadLogps(torch.autograd.Function):
    """`logps(hidden)` where only `hidden` trains: 2 GEMMs in forward, and backward is `d_hidden_i = grad_i * u_i`.

    `u (N, D)` is kept in place of `hidden`. Do not put this under activation checkpointing: it would run twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, labels: Tensor, dtype: torch.dtype, passes: TilePasses) -> Tensor:
        logps, unit = logps_and_unit(hidden, head, labels, dtype, passes)
        ctx.save_for_backward(unit)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        # The product is taken in float32 and rounded once, whatever the dtype of `unit`.
        return torch.mul(unit, grad[:, None]).to(unit.dtype), None, None, None, None


class TrainableHeadLogps(torch.autograd.Function):
    """`logps(hidden, weight, bias)` with any upstream gradient: 1 GEMM in forward, up to 3 in backward.

    Four numbers a row are kept beside the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        labels: Tensor,
        dtype: torch.dtype,
        passes: TilePasses,
    ) -> Tensor:
        head = Head(weight=weight, bias=bias, logit_scale=logit_scale, softcap=softcap)
        stats = logps_only(hidden, head, labels, dtype, passes)
        ctx.save_for_backward(
            hidden, weight, bias, labels, stats.constants, stats.sums, stats.label_logits, stats.label_slopes
        )
        ctx.arguments = logit_scale, softcap, dtype, passes
        return stats.logps()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, constants, sums, label_logits, label_slopes = ctx.saved_tensors
        logit_scale, softcap, dtype, passes = ctx.arguments
        head = Head(weight=weight, bias=bias, logit_scale=logit_scale, softcap=softcap)
        stats = RowStatistics(constants=constants, sums=sums, label_logits=label_logits, label_slopes=label_slopes)
        want = _wanted(ctx)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = head_backward(hidden, head, labels, stats, grad, dtype, passes, want=want)
        return *grads, None, None, None, None, None


def _wanted(ctx: FunctionCtx) -> tuple[bool, bool, bool]:
    hidden, weight, bias, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
    return hidden, weight, bias
