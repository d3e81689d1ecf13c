"""How far is one head's distribution from another's, token by token? `linear_kl`, for methods such as TDPO.

    KL_i = sum_v r_iv (log r_iv - log p_iv)          r: reference, p: policy

Both heads are multiplied slab by slab and met in one pass over two tiles; no (N, V) matrix is held. With the row
constants c of `tile_pass` (one a head), `a = z^r - c^r`, `b = z^p - c^p`, `e = exp(a)` and Z the sums of exponentials,

    KL = sum_v e_v (a_v - b_v) / Z^r + log Z^p - log Z^r

and where g1 is upstream of the policy's log-prob and g2 of the divergence, the gradient by the policy's logits is

    d z_v = (g2 - g1) p_v - g2 r_v        at the label: g1 (1 - p_y) + g2 (p_y - r_y)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_engine.ops.head import Head, Rows
from dpo_engine.ops.linear_logps import check_call, common_dtype, gathered
from dpo_engine.ops.plan import Plan, Slab, make_plan
from dpo_engine.ops.registered import check_labels
from dpo_engine.ops.statistics import RowStatistics
from dpo_engine.ops.tile_pass import logits_in_place, put_at_labels
from dpo_engine.ops.tiled import GradientSums, HeadGrads, label_logits
from dpo_engine.ops.weights import DenseWeight, is_quantised, quantised_weight


class TokenKL(NamedTuple):
    """All in the shape of `labels`, float32."""

    kl: Tensor
    """`KL(reference || policy)` over the vocabulary, nats; differentiable in the policy's inputs."""
    logps: Tensor
    """log-prob of the label under the policy; differentiable likewise."""
    reference_logps: Tensor
    """The same under the reference, without gradient."""


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
) -> TokenKL:
    """`(softmax(z_ref) * (log_softmax(z_ref) - log_softmax(z))).sum(-1)` and both heads' log-probs, without logits.

    GEMMs of size 2·N·V·D: 2 in forward, one a head; 3 in backward (both tiles again, dH), and 1 more for a weight that
    trains. Two tiles and one of scratch are held. Plain torch, on any device; a graph break under `torch.compile`.

    Args:
        hidden: (..., D) of the policy; `weight` (V, D) and `bias` (V,) its head, as for `linear_logps`.
        labels: (...) integer ids in `[0, V)`, or `ignore_index`.
        reference_hidden: (..., D') of the reference at the same tokens; `reference_weight` (V, D') and
            `reference_bias` (V,) its head: the very same tensor for a policy with adapters below a frozen head.
        logit_scale, softcap, temperature: of both heads.

    Returns:
        `TokenKL(kl, logps, reference_logps)`, each (...), 0 at ignored rows; inf where the policy excludes an id that
        the reference does not.

    Raises:
        ValueError: as `linear_logps`; vocabularies of two sizes.
    """
    weight, reference_weight = gathered(weight), gathered(reference_weight)
    for h, w, b in ((hidden, weight, bias), (reference_hidden, reference_weight, reference_bias)):
        check_call(h, w, labels, b, None, logit_scale, softcap, temperature, "tiled", ())
    scale, cap = logit_scale / temperature, None if softcap is None else softcap / temperature
    head, reference = (
        Head(weight=quantised_weight(w) if is_quantised(w) else DenseWeight(w), bias=b, logit_scale=scale, softcap=cap)
        for w, b in ((weight, bias), (reference_weight, reference_bias))
    )
    if head.weight.shape[0] != reference.weight.shape[0]:
        raise ValueError(
            f"linear_kl: weight {head.weight.shape}, reference_weight {reference.weight.shape}; expected one vocabulary"
        )
    dtype = common_dtype(hidden, None if is_quantised(weight) else weight, bias, None)
    flat_labels = labels.reshape(-1).long()
    flat, reference_flat = (h.reshape(-1, h.shape[-1]) for h in (hidden, reference_hidden))
    index = None if ignore_index is None else (flat_labels != ignore_index).nonzero().squeeze(-1)
    if index is not None:
        flat, reference_flat, scored = (x.index_select(0, index) for x in (flat, reference_flat, flat_labels))
    else:
        scored = flat_labels
    check_labels(scored, head.weight.shape[0], ignore_index)
    other = _Other(reference_flat.detach(), reference, dtype)
    values = _KL.apply(flat, weight, bias, head, scored, other)
    if index is not None:
        values = tuple(value.new_zeros(flat_labels.numel()).index_copy(0, index, value) for value in values)
    return TokenKL(*(value.view(labels.shape) for value in values))


class _Other(NamedTuple):
    """The reference's side of a call, and the dtype of both."""

    hidden: Tensor
    head: Head
    dtype: torch.dtype


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, labels: Tensor, other: _Other
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, reference_rows = Rows(hidden=hidden, labels=labels), Rows(hidden=other.hidden, labels=labels)
        with torch.autocast(hidden.device.type, enabled=False):
            ours, theirs, crossed = _fold(rows, head, reference_rows, other)
        logps, reference_logps = ours.logps(), theirs.logps()
        own = theirs.label_weights * ((theirs.label_logits - theirs.constants) - (ours.label_logits - ours.constants))
        # An id that the reference excludes adds nothing, whatever -inf - -inf made of it.
        kl = (crossed + torch.where(theirs.label_weights == 0, 0.0, own)) / theirs.totals
        kl = kl + _log_total(ours) - _log_total(theirs)
        ctx.save_for_backward(hidden, labels, ours.stacked(), theirs.stacked())
        ctx.rest = head, other
        ctx.mark_non_differentiable(reference_logps)
        ctx.set_materialize_grads(False)
        return kl, logps, reference_logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_kl: Tensor | None, d_logps: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        hidden, labels, ours, theirs = ctx.saved_tensors
        head, other = ctx.rest
        zero = torch.zeros_like(ours[0])
        upstream = (zero if d_logps is None else d_logps), (zero if d_kl is None else d_kl)
        want = [
            name for name, needed in zip(("hidden", "weight", "bias"), ctx.needs_input_grad, strict=False) if needed
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            found = _backward(Rows(hidden=hidden, labels=labels), head, other, (ours, theirs), upstream, want)
        return found.hidden, found.weight, found.bias, None, None, None


def _log_total(stats: RowStatistics) -> Tensor:
    """`log(S + t)`, by log1p where the label's logit is the constant, so that a row that is sure of it keeps its digits."""
    return torch.where(stats.label_logits == stats.constants, stats.sums.log1p(), stats.totals.log())


class _Pair(NamedTuple):
    """Both heads' plans; their slabs and row tiles are cut alike."""

    ours: Plan
    theirs: Plan


def _plans(rows: Rows, head: Head, reference_rows: Rows, other: _Other) -> _Pair:
    plans = [make_plan(r, h, other.dtype) for r, h in ((rows, head), (reference_rows, other.head))]
    columns = min(plan.columns for plan in plans)
    return _Pair(*(plan.with_columns(columns) for plan in plans))


def _fold(rows: Rows, head: Head, reference_rows: Rows, other: _Other) -> tuple[RowStatistics, RowStatistics, Tensor]:
    """Statistics of both softmaxes, and `sum_{v != y} e_v (a_v - b_v)`, all (N,)."""
    plans = _plans(rows, head, reference_rows, other)
    parts = []
    for (span, mine), (_, its) in zip(plans.ours.row_tiles(rows), plans.theirs.row_tiles(reference_rows), strict=True):
        sides = [_Side(mine, head, plans.ours), _Side(its, other.head, plans.theirs)]
        crossed = torch.zeros_like(sides[0].sums)
        for my_slab, its_slab in zip(plans.ours.slabs(head), plans.theirs.slabs(other.head), strict=True):
            (b, moved_b, _), (a, moved_a, rescale) = (
                side.shifted(slab) for side, slab in zip(sides, (my_slab, its_slab), strict=True)
            )
            # Where nothing of what was summed is left, it may have been inf.
            crossed = torch.where(rescale == 0, 0.0, rescale * (crossed + sides[1].sums * (moved_a - moved_b)))
            weights = a.exp()
            crossed += a.sub_(b).mul_(weights).masked_fill_(weights == 0, 0.0).sum(-1)
            sides[0].add(b.exp_())
            sides[1].add(weights)
            del my_slab, its_slab, a, b, weights
        kept = span.stop - span.start
        parts.append([*(side.statistics().stacked()[:, :kept] for side in sides), crossed[:kept]])
    if not parts:
        empty = torch.empty(4, 0, dtype=plans.ours.accumulate, device=plans.ours.device)
        return RowStatistics.unstacked(empty), RowStatistics.unstacked(empty), empty[0]
    ours, theirs, crossed = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return RowStatistics.unstacked(ours), RowStatistics.unstacked(theirs), crossed


class _Side:
    """One head over one row tile: the running constant and sum of each row's softmax, the label left out."""

    def __init__(self, rows: Rows, head: Head, plan: Plan) -> None:
        self.rows, self.head, self.plan = rows, head, plan
        self.z_label, self.slope = label_logits(rows, head, plan)
        self.constants = torch.where(self.z_label.isfinite(), self.z_label, float("-inf"))
        self.sums = torch.zeros_like(self.z_label)
        self._rescale = torch.ones_like(self.sums)

    def shifted(self, slab: Slab) -> tuple[Tensor, Tensor, Tensor]:
        """`(z - c (R, C), c_old - c, exp(c_old - c))`: -inf in the label's column; 0 and 1 where c stayed."""
        z, _ = logits_in_place(self.plan.tile(self.rows, slab)[0], slab.bias, self.head.logit_scale, self.head.softcap)
        put_at_labels(z, self.rows.labels, slab.first, float("-inf"))
        maxima = z.amax(-1)
        moved = torch.where(maxima - self.constants > self.plan.margin, maxima, self.constants)
        known = self.constants != float("-inf")
        by = torch.where(known & (moved != self.constants), self.constants - moved, 0.0)
        self._rescale = torch.where(moved == self.constants, 1.0, torch.exp(self.constants - moved))
        self.constants = moved
        return z.sub_(torch.where(moved == float("-inf"), 0.0, moved)[:, None]), by, self._rescale

    def add(self, weights: Tensor) -> None:
        """Take in the slab's `exp(z - c)`."""
        self.sums = self.sums * self._rescale + weights.sum(-1)

    def statistics(self) -> RowStatistics:
        return RowStatistics(
            constants=self.constants, sums=self.sums, label_logits=self.z_label, label_slopes=self.slope
        )


def _backward(
    rows: Rows,
    head: Head,
    other: _Other,
    stacked: tuple[Tensor, Tensor],
    upstream: tuple[Tensor, Tensor],
    want: list[str],
) -> HeadGrads:
    """Gradients of `sum_i g1_i logp_i + g2_i KL_i` by the policy's inputs, by recomputing both tiles."""
    reference_rows = Rows(hidden=other.hidden, labels=rows.labels)
    plans = _plans(rows, head, reference_rows, other)
    ours, theirs = (RowStatistics.unstacked(x) for x in stacked)
    g1, g2 = (g.to(plans.ours.accumulate) * head.logit_scale for g in upstream)
    # 1 - p_y and p_y - r_y from the sums of the others, without cancellation where both are sure of the label.
    mine, its = ours.sums / ours.totals, theirs.sums / theirs.totals
    at_label = (g1 * mine + g2 * (its - mine)) * ours.label_slopes
    sums = GradientSums(rows, head, plans.ours, want)
    for slab, its_slab in zip(plans.ours.slabs(head), plans.theirs.slabs(other.head), strict=True):
        sums.open(slab)
        for (span, tile), (_, its_tile) in zip(
            plans.ours.row_tiles(rows), plans.theirs.row_tiles(reference_rows), strict=True
        ):
            kept = slice(0, span.stop - span.start)
            raw, out = plans.ours.tile(tile, slab)
            p, slope = logits_in_place(raw[kept], slab.bias, head.logit_scale, head.softcap, want_slope=True)
            p.sub_(ours.constants[span, None]).exp_().mul_(((g2 - g1) / ours.totals)[span, None])
            its_raw = plans.theirs.tile(its_tile, its_slab)[0][kept]
            r, _ = logits_in_place(its_raw, its_slab.bias, other.head.logit_scale, other.head.softcap)
            p.sub_(r.sub_(theirs.constants[span, None]).exp_().mul_((g2 / theirs.totals)[span, None]))
            if slope is not None:
                p.mul_(slope)
            put_at_labels(p, tile.labels[kept], slab.first, at_label[span])
            if out.data_ptr() != raw.data_ptr():
                out[kept].copy_(p)
            out[kept.stop :] = 0  # padding rows
            sums.add(span, tile, out, slab)
        sums.close(slab)
        del slab, its_slab
    return sums.result()
