"""How are log-probs and their gradients computed tile by tile?

The (N, V) logits are never held: a loop over row tiles and vocabulary slabs multiplies with the vendor's GEMM, folds
the tile away with a tile pass, and goes on. Three loops, by what a caller needs:

    logps_only       no gradient, or the forward of a trainable head       1 GEMM
    logps_and_unit   frozen head: the gradient of logp_i before upstream   2 GEMMs, and none in backward
    head_backward    trainable head, any upstream gradient                 3 GEMMs (the recomputed tile, dH, dW)

With `c` the row constant of `tile_pass`, `S = sum_{v != y} exp(z_v - c)` and `t = exp(z_y - c)`:

    logp = -log1p(S / t)        d logp / d hidden = logit_scale * (S * slope_y * W_y - E W) / (S + t)

so a row that is sure of its label (S near 0) loses nothing to cancellation, in value or in gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dpo_engine.ops.head import Head, label_logits
from dpo_engine.ops.tile_pass import tile_backward, tile_pass

ROW_MULTIPLE = 16  # row tiles are padded to this, so that a row's bits do not depend on how many rows came with it
_TILE_ROWS = {"cpu": 512, "cuda": 1024}
_TILE_COLUMNS = {"cpu": 4096, "cuda": 8192}
_SLAB_BYTES = (
    24 << 20
)  # a CPU without bfloat16 instructions multiplies in float32, from a copy of the slab this large at most


@dataclass(frozen=True)
class TilePasses:
    """The two tile passes of a backend: plain torch, or Triton kernels with the same arguments."""

    forward: Callable[..., Tensor] = tile_pass
    backward: Callable[..., None] = tile_backward


TORCH_PASSES = TilePasses()


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What the softmax of each row comes to, relative to its constant: all (N,) in the accumulation dtype."""

    constants: Tensor  # c
    sums: Tensor  # S = sum_{v != y} exp(z_v - c)
    label_logits: Tensor  # z_y
    label_slopes: Tensor  # dz/dx at the label; 1 without a softcap

    @property
    def label_weights(self) -> Tensor:
        """`t = exp(z_y - c)`."""
        return (self.label_logits - self.constants).exp()

    def logps(self) -> Tensor:
        """`-log1p(S / t)`; by `z_y - c - log(S + t)` where `t` is too small to divide by. NaN where `z_y` is +inf."""
        t = self.label_weights
        direct = self.label_logits - self.constants - (self.sums + t).log()
        divisible = (t > 1e-20) & t.isfinite()
        return torch.where(divisible, -(self.sums / t).log1p(), direct)


def logps_only(hidden: Tensor, head: Head, labels: Tensor, dtype: torch.dtype, passes: TilePasses) -> RowStatistics:
    """Row statistics by one GEMM; nothing is kept but four numbers a row.

    Args:
        hidden: (N, D).
        labels: (N,) int64, each in `[0, V)`.
        dtype: what `hidden` and `head.weight` are rounded to before they are multiplied.
    """
    plan = _plan(hidden, head, dtype)
    parts = [
        _fold_vocabulary(rows, head, row_labels, plan, passes, None)
        for rows, row_labels in plan.row_tiles(hidden, labels)
    ]
    return _join(parts, hidden.shape[0], plan)


def logps_and_unit(
    hidden: Tensor, head: Head, labels: Tensor, dtype: torch.dtype, passes: TilePasses
) -> tuple[Tensor, Tensor]:
    """Log-probs and `u = d logp_i / d hidden_i`, by two GEMMs.

    Returns:
        `(logps, u)`: (N,) in the accumulation dtype, and (N, D) in the dtype of `hidden`.
    """
    plan = _plan(hidden, head, dtype)
    n, d = hidden.shape
    unit = hidden.new_empty(n, d)
    accumulator = torch.empty(plan.rows, d, dtype=plan.accumulate, device=hidden.device)
    parts = []
    for start, (rows, row_labels) in zip(range(0, n, plan.rows), plan.row_tiles(hidden, labels), strict=True):
        weighted = accumulator[: rows.shape[0]].zero_()  # E W
        stats = _fold_vocabulary(rows, head, row_labels, plan, passes, weighted)
        parts.append(stats)
        total = (stats.sums + stats.label_weights)[:, None]
        own = plan.label_rows(head, row_labels)
        own.mul_((stats.sums * stats.label_slopes)[:, None]).sub_(weighted).mul_(head.logit_scale).div_(total)
        kept = min(plan.rows, n - start)
        unit[start : start + kept].copy_(own[:kept])
    return _join(parts, n, plan).logps(), unit


def head_backward(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    stats: RowStatistics,
    grad: Tensor,
    dtype: torch.dtype,
    passes: TilePasses,
    *,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `sum_i grad_i * logp_i` by recomputing each tile: up to 3 GEMMs.

    The vocabulary is the outer loop, so that every slab of dW is summed in float32 and written once; dH is summed in
    (N, D) float32 on the way.

    Args:
        stats: what `logps_only` gave for the same inputs.
        grad: (N,).
        want: which of the gradients of (hidden, weight, bias) to compute.

    Returns:
        `(d_hidden, d_weight, d_bias)` in the dtypes of `hidden`, `weight` and `bias`, None where not wanted.
    """
    want_hidden, want_weight, want_bias = want
    plan = _plan(hidden, head, dtype)
    n, d = hidden.shape
    d_hidden = torch.zeros(n, d, dtype=plan.accumulate, device=hidden.device) if want_hidden else None
    d_weight = torch.empty(head.weight.shape, dtype=head.weight.dtype, device=hidden.device) if want_weight else None
    d_bias = torch.empty(head.weight.shape[0], dtype=plan.accumulate, device=hidden.device) if want_bias else None
    scaled = grad.to(plan.accumulate) * head.logit_scale / (stats.sums + stats.label_weights)
    at_label = scaled * stats.sums * stats.label_slopes
    for first, last, slab, bias in plan.slabs(head):
        slab_grad = torch.zeros(last - first, d, dtype=plan.accumulate, device=hidden.device) if want_weight else None
        slab_bias_grad = torch.zeros(last - first, dtype=plan.accumulate, device=hidden.device) if want_bias else None
        for start in range(0, n, plan.rows):
            span = slice(start, min(start + plan.rows, n))
            rows = hidden[span].to(dtype).to(plan.multiply)
            tile, out = plan.tile(rows, slab)
            passes.backward(
                tile, labels[span], stats.constants[span], scaled[span], at_label[span], first,
                bias=bias, logit_scale=head.logit_scale, softcap=head.softcap, out=out,
            )  # fmt: skip
            if d_hidden is not None:
                plan.multiply_into(d_hidden[span], out, slab)
            if slab_grad is not None:
                plan.multiply_into(slab_grad, out.t(), rows)
            if slab_bias_grad is not None:
                slab_bias_grad += out.sum(0, dtype=plan.accumulate)
        if d_weight is not None and slab_grad is not None:
            d_weight[first:last].copy_(slab_grad)
        if d_bias is not None and slab_bias_grad is not None:
            d_bias[first:last] = slab_bias_grad
        del slab  # as in `_fold_vocabulary`
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        d_weight,
        None if d_bias is None or head.bias is None else d_bias.to(head.bias.dtype),
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Tile sizes and dtypes of one call. They depend on the head and the device, never on N."""

    rows: int
    columns: int
    rounded: torch.dtype  # what inputs are rounded to
    multiply: torch.dtype  # what the GEMM is given
    accumulate: torch.dtype
    margin: float
    buffer: Tensor  # one tile in the accumulation dtype
    packed: Tensor | None  # one tile in the GEMM's dtype, where that is another

    def row_tiles(self, hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Row tiles in the GEMM's dtype, the last padded with zero rows of label 0 to a multiple of `ROW_MULTIPLE`."""
        for start in range(0, hidden.shape[0], self.rows):  # no rows, no tile: `split` would yield an empty one
            rows, row_labels = (x[start : start + self.rows] for x in (hidden, labels))
            rows = rows.to(self.rounded).to(self.multiply)
            missing = -rows.shape[0] % ROW_MULTIPLE
            if missing:
                rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
                row_labels = torch.cat([row_labels, row_labels.new_zeros(missing)])
            yield rows, row_labels

    def slabs(self, head: Head) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """`(first, last, weight[first:last] in the GEMM's dtype, bias[first:last])` over the vocabulary."""
        vocabulary = head.weight.shape[0]
        for first in range(0, vocabulary, self.columns):
            last = min(first + self.columns, vocabulary)
            bias = None if head.bias is None else head.bias[first:last].to(self.rounded).to(self.accumulate)
            yield first, last, head.weight[first:last].to(self.rounded).to(self.multiply), bias

    def label_rows(self, head: Head, labels: Tensor) -> Tensor:
        """`weight[labels]`, (N, D), rounded like the slabs and in the accumulation dtype."""
        return head.weight.index_select(0, labels).to(self.rounded).to(self.accumulate)

    def label_bias(self, head: Head, labels: Tensor) -> Tensor | None:
        """`bias[labels]`, (N,), rounded like the slabs' and in the accumulation dtype; None without a bias."""
        return None if head.bias is None else head.bias.index_select(0, labels).to(self.rounded).to(self.accumulate)

    def tile(self, rows: Tensor, slab: Tensor) -> tuple[Tensor, Tensor]:
        """`rows @ slab.T` in the accumulation dtype, and where its exponentials go (the same place if that fits)."""
        shape = rows.shape[0], slab.shape[0]
        tile = self.buffer[: shape[0] * shape[1]].view(shape)
        if self.multiply == self.accumulate:
            torch.mm(rows, slab.t(), out=tile)
            return tile, tile
        if rows.is_cuda:
            torch.mm(rows, slab.t(), out_dtype=self.accumulate, out=tile)
        else:
            tile.copy_(torch.mm(rows, slab.t()))  # the CPU's bfloat16 GEMM can only return bfloat16
        assert self.packed is not None
        return tile, self.packed[: shape[0] * shape[1]].view(shape)

    def multiply_into(self, accumulator: Tensor, left: Tensor, right: Tensor) -> None:
        """`accumulator += left @ right` in the accumulation dtype."""
        if self.multiply == self.accumulate:
            accumulator.addmm_(left, right)
        elif left.is_cuda:
            accumulator += torch.mm(left, right, out_dtype=self.accumulate)
        else:
            accumulator += torch.mm(left, right)


def _plan(hidden: Tensor, head: Head, dtype: torch.dtype) -> _Plan:
    device = hidden.device.type
    accumulate = torch.promote_types(dtype, torch.float32)
    multiply = dtype
    if device == "cpu" and not (dtype == torch.bfloat16 and cpu_multiplies_bfloat16()):
        multiply = accumulate
    vocabulary, d = head.weight.shape
    columns = _TILE_COLUMNS.get(device, _TILE_COLUMNS["cuda"])
    if multiply != head.weight.dtype:  # slabs are copies
        columns = min(columns, max(256, _SLAB_BYTES // (d * multiply.itemsize) // 256 * 256))
    columns = min(columns, vocabulary)
    rows = _TILE_ROWS.get(device, _TILE_ROWS["cuda"])
    rows = max(ROW_MULTIPLE, min(rows, -(-hidden.shape[0] // ROW_MULTIPLE) * ROW_MULTIPLE))
    buffer = torch.empty(rows * columns, dtype=accumulate, device=hidden.device)
    packed = None if multiply == accumulate else torch.empty(rows * columns, dtype=multiply, device=hidden.device)
    return _Plan(
        rows=rows,
        columns=columns,
        rounded=dtype,
        multiply=multiply,
        accumulate=accumulate,
        margin=8.0 if multiply == torch.float16 else 60.0,  # float16 overflows at exp(11), the others at exp(88)
        buffer=buffer,
        packed=packed,
    )


def _fold_vocabulary(
    rows: Tensor, head: Head, labels: Tensor, plan: _Plan, passes: TilePasses, weighted: Tensor | None
) -> RowStatistics:
    """One row tile against the whole vocabulary; sums `E W` into `weighted` (R, D) if that is given."""
    z_label, slope = label_logits(
        rows.to(plan.accumulate), head, plan.label_rows(head, labels), plan.label_bias(head, labels)
    )
    constants = torch.where(z_label.isfinite(), z_label, float("-inf"))
    sums = torch.zeros_like(z_label)
    for first, _, slab, bias in plan.slabs(head):
        tile, out = plan.tile(rows, slab)
        rescale = passes.forward(
            tile, labels, constants, sums, first,
            bias=bias, logit_scale=head.logit_scale, softcap=head.softcap, margin=plan.margin,
            out=None if weighted is None else out,
        )  # fmt: skip
        if weighted is not None:
            if not _is_one_everywhere(rescale):
                weighted *= rescale[:, None]
            plan.multiply_into(weighted, out, slab)
        del slab  # a copy of it must not live on while the next is made
    return RowStatistics(constants=constants, sums=sums, label_logits=z_label, label_slopes=slope)


def _is_one_everywhere(rescale: Tensor) -> bool:
    """Nearly always true. Only a CPU is asked: on a GPU the answer would cost more than the multiplication it saves."""
    return rescale.device.type == "cpu" and bool((rescale == 1.0).all())


def _join(parts: list[RowStatistics], n: int, plan: _Plan) -> RowStatistics:
    """The statistics of all row tiles, padding rows cut off."""

    def joined(name: str) -> Tensor:
        columns = [getattr(part, name) for part in parts]
        return torch.cat(columns)[:n] if columns else plan.buffer.new_empty(0)

    return RowStatistics(
        constants=joined("constants"),
        sums=joined("sums"),
        label_logits=joined("label_logits"),
        label_slopes=joined("label_slopes"),
    )


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions that torch uses; without them float32 is 8 to 80 times faster."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # oneDNN also says yes where it emulates them on AVX-512.
    instructions = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return instructions.get("architecture") != "x86_64" or any(instructions.get(n) for n in ("avx512_bf16", "amx_bf16"))
