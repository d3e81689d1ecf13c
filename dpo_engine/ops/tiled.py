"""How are log-probs and their gradients computed tile by tile?

The (N, V) logits are never held: a loop over row tiles and vocabulary slabs multiplies with the vendor's GEMM, folds
the tile away with a tile pass, and goes on. Three loops, by what a caller needs:

    row_statistics   no gradient, or the forward of a trainable head       1 GEMM
    rows_and_unit    frozen head: the gradient of logp_i before upstream   2 GEMMs, and none in backward
    head_backward    trainable head, any upstream gradient                 3 GEMMs (the recomputed tile, dH, dW)

With `c`, `S` and `t` as in `statistics`, `E_iv = exp(z_iv - c_i) dz/dx` in every column but the label's, which is 0:

    d logp / d hidden = logit_scale * (S * slope_y * W_y - E W) / (S + t)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_engine.ops.head import Head, Rows, capped
from dpo_engine.ops.passes import TilePasses
from dpo_engine.ops.plan import Plan, Slab, make_plan
from dpo_engine.ops.statistics import RowStatistics, extras_from_moments, new_moments

# A sum of squares overflows at half the exponent.
_MARGIN_OF_SQUARES = 20.0


class Scored(NamedTuple):
    """What the forward of N rows gives."""

    stats: RowStatistics
    extras: Tensor | None  # (3, N)


class Unit(NamedTuple):
    """`d logp_i / d hidden_i` and `d logp_i / d lora_hidden_i`, before any upstream gradient."""

    hidden: Tensor  # (N, D)
    lora_hidden: Tensor | None  # (N, r)


class HeadGrads(NamedTuple):
    """A gradient per input of the head, None where it was not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_hidden: Tensor | None
    lora_weight: Tensor | None


def row_statistics(
    rows: Rows, head: Head, dtype: torch.dtype, passes: TilePasses, *, with_extras: bool = False
) -> Scored:
    """Row statistics by one GEMM; nothing is kept but four numbers a row.

    Args:
        dtype: what `hidden` and the weights are rounded to before they are multiplied.
    """
    plan = make_plan(rows, head, dtype)
    folded = [
        (span, _fold_vocabulary(tile, head, plan, passes, None, None, with_extras=with_extras))
        for span, tile in plan.row_tiles(rows)
    ]
    return _joined(folded, plan, with_extras)


def rows_and_unit(
    rows: Rows, head: Head, dtype: torch.dtype, passes: TilePasses, *, with_extras: bool = False
) -> tuple[Scored, Unit]:
    """Row statistics and the gradient of each row's log-prob, by two GEMMs.

    Returns:
        `(scored, unit)`, the unit in the dtypes of `rows.hidden` and `rows.lora_hidden`.
    """
    plan = make_plan(rows, head, dtype)
    unit = torch.empty_like(rows.hidden, memory_format=torch.contiguous_format)
    lora_unit = None
    if rows.lora_hidden is not None:
        lora_unit = torch.empty_like(rows.lora_hidden, memory_format=torch.contiguous_format)
    accumulator = torch.empty(plan.rows, rows.hidden.shape[1], dtype=plan.accumulate, device=rows.hidden.device)
    folded = []
    for span, tile in plan.row_tiles(rows):
        weighted = accumulator[: tile.count].zero_()  # E W
        lora_weighted = None if tile.lora_hidden is None else torch.zeros_like(tile.lora_hidden, dtype=plan.accumulate)
        scored = _fold_vocabulary(tile, head, plan, passes, weighted, lora_weighted, with_extras=with_extras)
        folded.append((span, scored))
        stats, kept = scored.stats, span.stop - span.start
        at_label, lora_at_label, _ = plan.at_labels(head, tile.labels)
        # The factor is at most 1 in size before it multiplies anything: S / (S + t) is 1 - p.
        own, others = (stats.sums * stats.label_slopes / stats.totals)[:, None], stats.totals[:, None]
        unit[span].copy_(at_label.mul_(own).sub_(weighted.div_(others)).mul_(head.logit_scale)[:kept])
        if lora_unit is not None and lora_at_label is not None and lora_weighted is not None:
            lora_at_label.mul_(own).sub_(lora_weighted.div_(others)).mul_(head.logit_scale)
            lora_unit[span].copy_(lora_at_label[:kept])
    return _joined(folded, plan, with_extras), Unit(hidden=unit, lora_hidden=lora_unit)


def head_backward(
    rows: Rows,
    head: Head,
    stats: RowStatistics,
    grad: Tensor,
    dtype: torch.dtype,
    passes: TilePasses,
    *,
    want: Collection[str],
) -> HeadGrads:
    """Gradients of `sum_i grad_i * logp_i` by recomputing each tile: up to 3 GEMMs.

    The vocabulary is the outer loop, so that every slab of dW is summed in float32 and written once; dH is summed in
    (N, D) float32 on the way.

    Args:
        stats: what the forward gave for the same inputs.
        grad: (N,).
        want: which gradients to compute: names of `HeadGrads`.

    Returns:
        Gradients in the dtypes of what they belong to, None where not wanted.
    """
    plan = make_plan(rows, head, dtype)
    sums = GradientSums(rows, head, plan, want)
    scaled = grad.to(plan.accumulate) * head.logit_scale / stats.totals
    at_label = scaled * stats.sums * stats.label_slopes
    for slab in plan.slabs(head):
        sums.open(slab)
        for span, tile in plan.row_tiles(rows):
            raw, out = plan.tile(tile, slab)
            kept = slice(0, span.stop - span.start)
            passes.backward(
                raw[kept], tile.labels[kept], stats.constants[span], scaled[span], at_label[span], slab.first,
                bias=slab.bias, logit_scale=head.logit_scale, softcap=head.softcap, out=out[kept],
            )  # fmt: skip
            out[kept.stop :] = 0  # padding rows
            sums.add(span, tile, out, slab)
        sums.close(slab)
        del slab  # a copy of it must not live on while the next is made
    return sums.result()


class GradientSums:
    """Sums of `G W`, `G^T H` and their kin over tiles G of `d(objective) / d(raw logits)`, slab after slab."""

    def __init__(self, rows: Rows, head: Head, plan: Plan, want: Collection[str]) -> None:
        self.rows, self.plan = rows, plan

        def made(name: str, of: Tensor | None, like: Callable[[Tensor], Tensor]) -> Tensor | None:
            return like(of) if name in want and of is not None else None

        # A row's sum is open until the last slab, a word's only while its slab is.
        self.d_hidden = made("hidden", rows.hidden, self._zeros_like)
        self.d_lora_hidden = made("lora_hidden", rows.lora_hidden, self._zeros_like)
        tensor = getattr(head.weight, "tensor", None)  # a quantised weight takes no gradient
        self.d_weight = made("weight", tensor, self._empty_like)
        self.d_bias = made("bias", head.bias, self._empty_like)
        self.d_lora_weight = made("lora_weight", head.lora_weight, self._empty_like)

    def open(self, slab: Slab) -> None:
        """Begin a slab; its sums are written by `close`."""
        self._slab_sums = {
            name: self._slab_sum(whole, slab)
            for name, whole in (("weight", self.d_weight), ("bias", self.d_bias), ("lora_weight", self.d_lora_weight))
            if whole is not None
        }
        self._is_first_tile = True

    def add(self, span: slice, tile: Rows, gradient: Tensor, slab: Slab) -> None:
        """Add one tile of `d(objective) / d(raw logits)`, in the GEMM's dtype; padding rows of it are 0."""
        plan, kept = self.plan, span.stop - span.start
        if self.d_hidden is not None:
            self._add_rows(self.d_hidden[span], gradient, slab.weight, kept)
        if self.d_lora_hidden is not None and slab.lora_weight is not None:
            self._add_rows(self.d_lora_hidden[span], gradient, slab.lora_weight, kept)
        for name, right in (("weight", tile.hidden), ("lora_weight", tile.lora_hidden)):
            if name in self._slab_sums and right is not None:
                put = plan.set_product if self._is_first_tile else plan.add_product
                put(self._slab_sums[name], gradient.t(), right)
        if "bias" in self._slab_sums:
            total, by_word = self._slab_sums["bias"], gradient.sum(0, dtype=plan.accumulate)
            total.copy_(by_word if self._is_first_tile else total + by_word)
        self._is_first_tile = False

    def close(self, slab: Slab) -> None:
        """Write the slab's sums, rounded once."""
        for name, total in self._slab_sums.items():
            if self._is_first_tile:  # there were no rows
                total.zero_()
            whole = getattr(self, f"d_{name}")
            if whole.dtype != total.dtype:
                whole[slab.first : slab.last].copy_(total)
        self._slab_sums = {}

    def result(self) -> HeadGrads:
        """Gradients in the dtypes of what they belong to; None where not wanted."""
        lora_hidden = self.rows.lora_hidden
        return HeadGrads(
            hidden=None if self.d_hidden is None else self.d_hidden.to(self.rows.hidden.dtype),
            weight=self.d_weight,
            bias=self.d_bias,
            lora_hidden=(
                None if self.d_lora_hidden is None or lora_hidden is None else self.d_lora_hidden.to(lora_hidden.dtype)
            ),
            lora_weight=self.d_lora_weight,
        )

    def _add_rows(self, accumulator: Tensor, gradient: Tensor, weight: Tensor, kept: int) -> None:
        if kept == gradient.shape[0]:
            self.plan.add_product(accumulator, gradient, weight)
        else:  # the height of a product decides its bits: multiply the padding rows too, then drop them
            padded = accumulator.new_zeros(gradient.shape[0], accumulator.shape[1])
            padded[:kept] = accumulator
            self.plan.add_product(padded, gradient, weight)
            accumulator.copy_(padded[:kept])

    def _slab_sum(self, whole: Tensor, slab: Slab) -> Tensor:
        """Room for the slab: in place where the gradient is kept in the accumulation dtype anyway."""
        part = whole[slab.first : slab.last]
        return part if part.dtype == self.plan.accumulate else torch.empty_like(part, dtype=self.plan.accumulate)

    def _zeros_like(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=self.plan.accumulate, device=tensor.device)

    @staticmethod
    def _empty_like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fold_vocabulary(
    rows: Rows,
    head: Head,
    plan: Plan,
    passes: TilePasses,
    weighted: Tensor | None,
    lora_weighted: Tensor | None,
    *,
    with_extras: bool,
) -> Scored:
    """One row tile against the whole vocabulary; sums `E W` into `weighted` (R, D) and `E B` into `lora_weighted`."""
    z_label, slope = label_logits(rows, head, plan)
    constants = torch.where(z_label.isfinite(), z_label, float("-inf"))
    sums = torch.zeros_like(z_label)
    moments = new_moments(constants) if with_extras else None
    margin = min(plan.margin, _MARGIN_OF_SQUARES) if with_extras else plan.margin
    how = {"logit_scale": head.logit_scale, "softcap": head.softcap, "margin": margin}
    fused = passes.product if weighted is not None and lora_weighted is None and not with_extras else None
    for slab in plan.slabs(head):
        if fused is not None:
            out = plan.out((rows.count, slab.last - slab.first))
            rescale = fused(
                rows.hidden, slab.weight, rows.labels, constants, sums, slab.first, bias=slab.bias, out=out, **how
            )
        else:
            tile, out = plan.tile(rows, slab)
            extra = {} if moments is None else {"moments": moments}
            rescale = passes.forward(
                tile, rows.labels, constants, sums, slab.first,
                bias=slab.bias, out=None if weighted is None else out, **how, **extra,
            )  # fmt: skip
        for accumulator, right in ((weighted, slab.weight), (lora_weighted, slab.lora_weight)):
            if accumulator is not None and right is not None:
                if not is_one_everywhere(rescale):
                    accumulator *= rescale[:, None]
                plan.add_product(accumulator, out, right)
        del slab  # a copy of it must not live on while the next is made
    stats = RowStatistics(constants=constants, sums=sums, label_logits=z_label, label_slopes=slope)
    return Scored(stats=stats, extras=None if moments is None else extras_from_moments(stats, moments))


def label_logits(rows: Rows, head: Head, plan: Plan) -> tuple[Tensor, Tensor]:
    """`z[i, labels[i]]` by one dot product a row, and the slope of the softcap there, both (R,)."""
    at_label, lora_at_label, bias = plan.at_labels(head, rows.labels)
    x = torch.linalg.vecdot(rows.hidden.to(plan.accumulate), at_label)
    if rows.lora_hidden is not None and lora_at_label is not None:
        x += torch.linalg.vecdot(rows.lora_hidden.to(plan.accumulate), lora_at_label)
    if bias is not None:
        x += bias
    return capped(x * head.logit_scale, head.softcap)


def is_one_everywhere(rescale: Tensor) -> bool:
    """Nearly always true. Only a CPU is asked: on a GPU the answer would cost more than the multiplication it saves."""
    return rescale.device.type == "cpu" and bool((rescale == 1.0).all())


def _joined(folded: list[tuple[slice, Scored]], plan: Plan, with_extras: bool) -> Scored:
    """All row tiles end to end, padding rows cut off."""
    if not folded:
        empty = torch.empty(4, 0, dtype=plan.accumulate, device=plan.device)
        return Scored(stats=RowStatistics.unstacked(empty), extras=empty[:3] if with_extras else None)
    stacked = [part.stats.stacked()[:, : span.stop - span.start] for span, part in folded]
    extras = [part.extras[:, : span.stop - span.start] for span, part in folded if part.extras is not None]
    return Scored(stats=RowStatistics.unstacked(torch.cat(stacked, 1)), extras=torch.cat(extras, 1) if extras else None)
