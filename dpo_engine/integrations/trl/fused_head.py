"""What stands in the place of TRL's own chunked log-prob function?

`_ChunkedLogProbFunction.apply` of TRL 1.14 and later, with `linear_logps` inside: two matrix products where the head is frozen
instead of three, log-probs that were never rounded to 16 bits. The entropy's gradient, which only an entropy bonus asks for, stays
TRL's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_engine.integrations.scoring import say
from dpo_engine.ops import linear_logps
from dpo_engine.ops.mean_logits import mean_logits

# TRL's names of what else it may ask for, and those of `linear_logps`.
_EXTRAS = {"entropy": "entropy", "log_sum_sq_probs": "log_sum_squares", "is_top1": "is_top1"}


class FusedHead:
    """Called like TRL's function: `FusedHead(original, fields).apply(hidden, weight, ...)`."""

    def __init__(self, original: Any, fields: tuple[str, ...]) -> None:
        self.original = original
        self.fields = fields  # what is returned after the log-probs, in TRL's order

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """`(log-probs, *fields)` of (N,) targets; a field that is not among `outputs` is None.

        Args:
            hidden: (N, D).
            weight: (V, D).
            chunk_size: not used; tiles have the operator's own sizes.
            outputs: names among `fields`; None for all, as the version that had no such argument.
        """
        rest: tuple[Any, ...] = (temperature, chunk_size, final_logit_softcapping, logit_scale)
        if outputs is not None:
            rest += (outputs,)
        wanted = self.fields if outputs is None else tuple(name for name in self.fields if name in outputs)
        if why := _why_not(hidden, weight, bias, "entropy" in wanted):
            say(f"left to TRL's own operator: {why}")
            return self.original.apply(hidden, weight, bias, targets, *rest)
        ours: Any = tuple(_EXTRAS[name] for name in wanted if name in _EXTRAS)
        scored: Any = linear_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            logit_scale=float(logit_scale),
            softcap=final_logit_softcapping,
            ignore_index=None,
            temperature=float(temperature),
            extras=ours,
        )
        logps, extras = scored if ours else (scored, None)
        found = {name: getattr(extras, _EXTRAS[name]) for name in wanted if name in _EXTRAS}
        if "mean_logits" in wanted:
            found["mean_logits"] = mean_logits(
                hidden, weight, bias, float(logit_scale), final_logit_softcapping, float(temperature)
            )
        if "entropy" in found and logps.requires_grad:
            found["entropy"] = _Entropy.apply(
                found["entropy"], hidden, weight, bias, targets, self.original, rest, len(self.fields) > 1
            )
        return logps, *(found.get(name) for name in self.fields)


def _why_not(hidden: Tensor, weight: Tensor, bias: Tensor | None, entropy: bool) -> str:
    """Why this call is better left to TRL; nothing if it is not."""
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if hasattr(weight, "ds_id") and (trains or (entropy and hidden.requires_grad)):
        return "the backward pass reads a head that ZeRO-3 has partitioned, which it gathers only while TRL's operator runs"
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        return f"hidden states in {hidden.dtype} before a head in {weight.dtype} (cast_lm_head_to_fp32)"
    return ""


class _Entropy(torch.autograd.Function):
    """The entropy as it was computed; its gradient, should anyone ask, by TRL's function once more."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        entropy, hidden, weight, bias, targets, original, rest, by_name = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        device = hidden.device.type
        enabled = torch.is_autocast_enabled(device)
        ctx.autocast = device, torch.get_autocast_dtype(device) if enabled else None
        ctx.call = original, (*rest[:4], ("entropy",)) if by_name else rest
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return (None,) * 8
        *inputs, targets = ctx.saved_tensors
        original, rest = ctx.call
        device, dtype = ctx.autocast
        leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            entropy = original.apply(*leaves, targets, *rest)[1]
        trained = [x for x in leaves if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(entropy, trained, grads[0]))
        gradients = [next(found) if x is not None and x.requires_grad else None for x in leaves]
        return (None, *gradients, *(None,) * 4)
