"""How does torch see the operator? As two registered operators, opaque to `torch.compile`, with shapes and a derivative.

    dpo_engine::linear_logps            log-probs, and what their gradients will need
    dpo_engine::linear_logps_backward   gradients by recomputing each tile

What the forward keeps is a word:

    "nothing"      no input takes a gradient                 1 GEMM
    "unit"         the weight and the bias are frozen        2 GEMMs; then d_hidden_i = grad_i * u_i, with none
    "statistics"   anything else                             1 GEMM; four numbers a row are kept, backward costs up to 3

LoRA on a frozen weight keeps the unit; the gradient of its B asks the backward for the tiles again, one GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_engine.errors import BackendError
from dpo_engine.ops.head import Head, Rows
from dpo_engine.ops.passes import TilePasses, passes_for
from dpo_engine.ops.statistics import RowStatistics
from dpo_engine.ops.tiled import head_backward, row_statistics, rows_and_unit
from dpo_engine.ops.weights import weight_from_parts

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, "
    "Tensor[] quantised, str layout, float logit_scale, float? softcap, int? ignore_index, ScalarType dtype, "
    "str backend, str keep"
)
_N_INPUTS = 14
TASK_OF = {"nothing": "no_gradient", "unit": "frozen", "statistics": "trainable"}
_DIFFERENTIABLE = ("hidden", "weight", "bias", "lora_hidden", "lora_weight")


@dataclass(frozen=True)
class Call:
    """The inputs that both operators share, in the order of their schema."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D); as bitsandbytes packs it where `layout` is not empty
    labels: Tensor  # (N,) int64
    bias: Tensor | None  # (V,)
    lora_hidden: Tensor | None  # (N, r)
    lora_weight: Tensor | None  # (V, r)
    quantised: list[Tensor]
    layout: str
    logit_scale: float
    softcap: float | None
    ignore_index: int | None
    dtype: torch.dtype
    backend: str
    keep: str

    def head(self) -> Head:
        return Head(
            weight=weight_from_parts(self.weight, self.quantised, self.layout),
            bias=self.bias,
            lora_weight=self.lora_weight,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )

    def scored(self) -> tuple[Tensor | None, Rows]:
        """`(indices of the rows that count, None for all, those rows)`."""
        rows = Rows(hidden=self.hidden, labels=self.labels, lora_hidden=self.lora_hidden)
        if self.ignore_index is None:
            return None, rows
        counts = self.labels != self.ignore_index
        if bool(counts.all()):
            return None, rows
        index = counts.nonzero().squeeze(-1)
        return index, rows.at(index)

    def passes(self, head: Head) -> TilePasses:
        return passes_for(self.backend, self.hidden.device, self.dtype, head.weight.shape, TASK_OF[self.keep])


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    """Refuse a label that is no vocabulary id; on a CPU only, since a GPU would have to be waited for."""
    if labels.device.type != "cpu" or not labels.numel():
        return
    lowest, highest = (int(x) for x in labels.aminmax())
    if lowest < 0 or highest >= vocabulary:
        outside = lowest if lowest < 0 else highest
        raise ValueError(
            f"linear_logps: label {outside} is outside [0, {vocabulary}); "
            f"expected a vocabulary id or ignore_index={ignore_index}"
        )


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *shared, with_extras = inputs
    call = Call(*shared)
    with torch.autocast(call.hidden.device.type, enabled=False):
        return _score(call, with_extras)


def _score(call: Call, with_extras: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(logps (N,), unit (N, D), lora_unit (N, r), statistics (4, N), extras (3, N))`; what is not kept has no rows."""
    index, rows = call.scored()
    head = call.head()
    check_labels(rows.labels, head.weight.shape[0], call.ignore_index)
    passes = call.passes(head)
    unit, lora_unit = call.hidden.new_empty(0, call.hidden.shape[1]), call.hidden.new_empty(0, 0)
    if call.lora_hidden is not None:
        lora_unit = call.lora_hidden.new_empty(0, call.lora_hidden.shape[1])
    accumulate = torch.promote_types(call.dtype, torch.float32)
    stats, extras = (call.hidden.new_empty(size, 0, dtype=accumulate) for size in (4, 3))
    # A weight that must be rounded first would be copied whole: it goes slab by slab instead.
    as_it_is = head.weight.dtype == call.dtype and rows.lora_hidden is None and not with_extras
    if call.keep == "nothing" and as_it_is and passes.logps is not None:
        bias = None if call.bias is None else call.bias.to(call.dtype)
        logps = passes.logps(rows.hidden.to(call.dtype), call.weight, rows.labels, bias, call.logit_scale, call.softcap)
    else:
        if call.keep == "unit":
            scored, units = rows_and_unit(rows, head, call.dtype, passes, with_extras=with_extras)
            unit = _spread(units.hidden, index, call.hidden.shape[0])
            if units.lora_hidden is not None:
                lora_unit = _spread(units.lora_hidden, index, call.hidden.shape[0])
        else:
            scored = row_statistics(rows, head, call.dtype, passes, with_extras=with_extras)
        logps = scored.stats.logps()
        if call.keep != "nothing":
            stats = _spread(scored.stats.stacked().t(), index, call.hidden.shape[0]).t().contiguous()
        if scored.extras is not None:
            extras = _spread(scored.extras.t(), index, call.hidden.shape[0]).t().contiguous()
    return _spread(logps, index, call.hidden.shape[0]), unit, lora_unit, stats, extras


def _spread(rows: Tensor, index: Tensor | None, count: int) -> Tensor:
    """`rows` at `index` of `count` rows, 0 elsewhere."""
    return rows if index is None else rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, index, rows)


def _backward(*inputs: Any) -> list[Tensor]:
    *shared, stats, grad, want = inputs
    call = Call(*shared)
    with torch.autocast(call.hidden.device.type, enabled=False):
        return _gradients(call, stats, grad, want.split())


def _gradients(call: Call, stacked: Tensor, grad: Tensor, want: list[str]) -> list[Tensor]:
    """Gradients in the order of `want`, of `sum_i grad_i * logp_i`."""
    index, rows = call.scored()
    stats = RowStatistics.unstacked(stacked)
    if index is not None:
        stats, grad = stats.at(index), grad[index]
    head = call.head()
    gradients = head_backward(rows, head, stats, grad, call.dtype, call.passes(head), want=want)._asdict()
    for name in ("hidden", "lora_hidden"):
        if gradients[name] is not None:
            gradients[name] = _spread(gradients[name], index, call.hidden.shape[0])
    return [gradients[name] for name in want]


forward_op = torch.library.custom_op(
    "dpo_engine::linear_logps",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, bool with_extras) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    "dpo_engine::linear_logps_backward",
    _backward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor statistics, Tensor grad, str want) -> Tensor[]",
)


@forward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *shared, with_extras = inputs
    call = Call(*shared)
    (n, depth), accumulate = call.hidden.shape, torch.promote_types(call.dtype, torch.float32)
    rank = 0 if call.lora_hidden is None else call.lora_hidden.shape[1]
    lora = call.hidden if call.lora_hidden is None else call.lora_hidden
    kept = n if call.keep == "unit" else 0
    return (
        call.hidden.new_empty(n, dtype=accumulate),
        call.hidden.new_empty(kept, depth),
        lora.new_empty(kept if rank else 0, rank),
        call.hidden.new_empty(4, 0 if call.keep == "nothing" else n, dtype=accumulate),
        call.hidden.new_empty(3, n if with_extras else 0, dtype=accumulate),
    )


@backward_op.register_fake
def _(*inputs: Any) -> list[Tensor]:
    *shared, _, _, want = inputs
    call = Call(*shared)
    return [torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in want.split()]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *shared, _ = inputs
    _, unit, lora_unit, statistics, _ = output
    call = Call(*shared)
    takes_gradient = dict(zip(_DIFFERENTIABLE, _positions(ctx.needs_input_grad), strict=True))
    ctx.has_unit = call.keep == "unit"
    # With a unit in hand, the inputs are needed for the gradient of LoRA's B only.
    again = not ctx.has_unit or takes_gradient["lora_weight"]
    tensors = [call.hidden, call.weight, call.bias, call.lora_hidden, call.lora_weight] if again else [None] * 5
    ctx.save_for_backward(*tensors, call.labels, unit, lora_unit, statistics)
    ctx.rest = shared[6:]
    ctx.ignore_index = call.ignore_index
    ctx.set_materialize_grads(False)


def _positions(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """Those of the five inputs that can take a gradient, of the schema's order."""
    hidden, weight, _, bias, lora_hidden, lora_weight, *_ = needs
    return hidden, weight, bias, lora_hidden, lora_weight


def _differentiate(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    names = [name for name, needed in zip(_DIFFERENTIABLE, _positions(ctx.needs_input_grad), strict=True) if needed]
    rest = [None] * len(ctx.rest[0]), *(None,) * (_N_INPUTS + 1 - 7)  # the quantised parts, and what is no tensor
    if grad is None or not names:
        return (*(None,) * 6, *rest)
    *tensors, labels, unit, lora_unit, statistics = ctx.saved_tensors
    hidden, weight, bias, lora_hidden, lora_weight = tensors
    sources = [tensor for tensor in (grad, *tensors, unit, lora_unit, statistics) if tensor is not None]
    with torch.no_grad():
        if (ignore_index := ctx.ignore_index) is not None:
            grad = grad.masked_fill(labels == ignore_index, 0.0)  # whatever came from upstream for them
        found: dict[str, Tensor] = {}
        if ctx.has_unit:
            # The product is taken in float32 and rounded once, whatever the dtype of the unit.
            for name, value in (("hidden", unit), ("lora_hidden", lora_unit)):
                if name in names:
                    found[name] = torch.mul(value, grad[:, None]).to(value.dtype)
        left = [name for name in names if name not in found]
        if left:
            gradients = torch.ops.dpo_engine.linear_logps_backward(
                hidden, weight, labels, bias, lora_hidden, lora_weight, *ctx.rest, statistics, grad, " ".join(left)
            )  # fmt: skip
            found |= dict(zip(left, gradients, strict=True))
    if torch.is_grad_enabled():
        found = {name: _Once.apply(value, *sources) for name, value in found.items()}
    hidden, weight, bias, lora_hidden, lora_weight = (found.get(name) for name in _DIFFERENTIABLE)
    return (hidden, weight, None, bias, lora_hidden, lora_weight, *rest)


class _Once(torch.autograd.Function):
    """A gradient that says so when it is differentiated again, instead of being taken for a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "linear_logps is differentiable once, and its gradient was differentiated again; "
            'for second derivatives use backend="reference", which builds the logits'
        )


forward_op.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _refuse_vmap(*_: Any) -> Any:
    raise BackendError(
        "linear_logps does not run under vmap; its rows are a batch already: pass hidden (..., D) and labels (...)"
    )


for _op in (forward_op, backward_op):
    _op.register_vmap(_refuse_vmap)
