"""A whole preference loss over a head that trains, in 3 GEMMs instead of 4: `linear_preference_loss`.

A per-token operator must multiply the logits again in backward, because it does not know the upstream gradient before.
A preference loss is a function of one sum per completion, so its upstream gradient is one number per completion, and
that number is known as soon as the pair's log-probs are. So the tiles of a group of pairs are kept, the loss is asked
for its gradient, and both products of the backward are done from the tiles that are there:

    E_iv = exp(z_iv - c_i) dz/dx        E_iy = -S_i dz/dx at the label        w_i = logit_scale * g_i / (S_i + t_i)

    dH_i = -w_i (E W)_i        dW = E^T (-w * H)

with c, S, t as in `statistics`. The loss itself is the caller's: nothing of it is written here a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_engine.ops.head import Head, Rows
from dpo_engine.ops.linear_logps import check_call, common_dtype, gathered, linear_logps
from dpo_engine.ops.passes import TilePasses, passes_for
from dpo_engine.ops.plan import ROW_MULTIPLE, Plan, make_plan
from dpo_engine.ops.statistics import RowStatistics
from dpo_engine.ops.tile_pass import put_at_labels
from dpo_engine.ops.tiled import label_logits
from dpo_engine.ops.weights import DenseWeight

PairLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lengths: Sequence[int],
    loss: PairLoss,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    tile_budget: int = 512 << 20,
    backend: str = "auto",
    with_logps: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`loss(sums[0::2], sums[1::2], reference_chosen_logps, reference_rejected_logps).mean()`, sums of `linear_logps`.

    `sums[c]` is the sum of the log-probs of completion c's rows. Where the weight or the bias trains, value and
    gradients come by 3 GEMMs of size 2·N·V·D if the tiles of the largest pair fit `tile_budget`, else by the 4 of
    `linear_logps`; where both are frozen by 2, without gradients by 1, as there.

    Pairs are taken in groups that fit the budget, so the loss must be separable: the loss of a pair may depend on that
    pair alone. Beyond results and the kept tiles it needs what `linear_logps` does, and 4·V·D bytes more where a 16-bit
    weight trains over several groups (its gradient is then summed in float32).

    Args:
        hidden: (N, D) the rows that predict, completion after completion.
        weight: (V, D), as for `linear_logps`; likewise `bias`, `logit_scale`, `softcap`, `temperature`, `backend`.
        labels: (N,) integer ids in `[0, V)`; every row counts.
        lengths: rows of each completion; chosen and rejected of a pair follow each other; they sum to N.
        loss: `(chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps) -> (B,)`, for example
            `functools.partial(dpo_loss, beta=0.1)`.
        reference_chosen_logps, reference_rejected_logps: (B,) sums under the reference, or None for a loss without one.
        tile_budget: bytes of tiles that may be kept, V · rows · (4, or 2 where a GEMM takes 16 bits).
        with_logps: also return the sums.

    Returns:
        () the mean loss, differentiable once in `hidden`, `weight` and `bias`; its backward may run once, and hands out
        what the forward computed. With `with_logps`, `(loss, sums (2B,))`, the sums without gradient.

    Raises:
        ValueError: as `linear_logps`; lengths that do not sum to N or are odd in number; a loss that is not (B,).
        BackendError: as `linear_logps`.

    Source: derivation in `docs/operator.md`.
    """
    weight = gathered(weight)
    check_call(hidden, weight, labels, bias, None, logit_scale, softcap, temperature, backend, ())
    pairs = _check_pairs(hidden, labels, lengths, reference_chosen_logps, reference_rejected_logps)
    options: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    references = reference_chosen_logps, reference_rejected_logps
    trains = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    job = None
    if trains and backend != "reference":
        cap = None if softcap is None else softcap / temperature
        how = Head(weight=DenseWeight(weight.detach()), bias=bias, logit_scale=logit_scale / temperature, softcap=cap)
        job = _job(
            hidden, how, labels, pairs, loss, references, common_dtype(hidden, weight, bias, None), backend, tile_budget
        )
    if job is not None:
        value, sums = _ThreeProducts.apply(hidden, weight, bias, job)
    else:
        token_logps = linear_logps(
            hidden, weight, labels, ignore_index=None, backend=backend, temperature=temperature, **options
        )
        sums = torch.stack([part.sum() for part in token_logps.split(list(lengths))])
        value = _losses(loss, sums, references).mean()
    return (value, sums.detach()) if with_logps else value


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call, checked and cut into groups of pairs."""

    hidden: Tensor
    head: Head
    labels: Tensor
    lengths: list[int]
    groups: list[slice]  # of pairs
    loss: PairLoss
    references: tuple[Tensor | None, Tensor | None]
    plan: Plan
    passes: TilePasses

    def rows_of(self, group: slice) -> tuple[slice, list[int]]:
        """`(the group's rows, its completions' lengths)`."""
        before = sum(self.lengths[: 2 * group.start])
        lengths = self.lengths[2 * group.start : 2 * group.stop]
        return slice(before, before + sum(lengths)), lengths


def _job(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    pairs: list[int],
    loss: PairLoss,
    references: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
    backend: str,
    tile_budget: int,
) -> _Job | None:
    """None where the tiles of some pair do not fit, would overflow (float16 cannot hold S), or there are no rows."""
    labels = labels.long()
    plan = make_plan(Rows(hidden=hidden, labels=labels), head, dtype)
    rows = tile_budget // (max(head.weight.shape[0], 1) * plan.multiply.itemsize) // ROW_MULTIPLE * ROW_MULTIPLE
    lengths = [sum(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
    if plan.multiply == torch.float16 or max(lengths) > rows or not sum(lengths):
        return None
    passes = passes_for(backend, hidden.device, dtype, head.weight.shape, "trainable")
    return _Job(
        hidden=hidden.detach(), head=replace(head, bias=None if head.bias is None else head.bias.detach()),
        labels=labels, lengths=pairs, groups=list(_grouped(lengths, rows)), loss=loss, references=references,
        plan=plan, passes=passes,
    )  # fmt: skip


def _grouped(lengths: list[int], most: int) -> Iterator[slice]:
    """Runs of pairs of at most `most` rows together."""
    start, rows = 0, 0
    for index, length in enumerate(lengths):
        if rows + length > most:
            yield slice(start, index)
            start, rows = index, 0
        rows += length
    yield slice(start, len(lengths))


class _ThreeProducts(torch.autograd.Function):
    """Value and gradients together in forward; backward scales them by the upstream number and hands them out."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            value, sums, ctx.gradients = _value_and_gradients(job, wanted[0], wanted[1], wanted[2])
        ctx.mark_non_differentiable(sums)
        return value, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_preference_loss: backward was called a second time; its gradients were computed in forward and "
                "handed out by the first call: call the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad) for g in gradients), None


def _value_and_gradients(
    job: _Job, want_hidden: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    plan, weight, bias = job.plan, job.head.weight, job.head.bias
    assert isinstance(weight, DenseWeight)
    one_group = len(job.groups) == 1
    # Several groups add to dW in float32; a single one writes each slab once.
    sum_dtype = plan.accumulate if not one_group else weight.tensor.dtype
    device = job.hidden.device
    d_hidden = torch.empty(job.hidden.shape, dtype=job.hidden.dtype, device=device) if want_hidden else None
    d_weight = torch.empty(weight.shape, dtype=sum_dtype, device=device) if want_weight else None
    d_bias = torch.zeros(weight.shape[0], dtype=plan.accumulate, device=device) if want_bias else None
    values, sums = [], []
    for group in job.groups:
        span, lengths = job.rows_of(group)
        rows = _padded(job.hidden[span], job.labels[span], plan)
        kept = _Kept(rows.count, job.head, plan)
        stats = _fold(rows, job.head, plan, job.passes, kept)
        token_logps = stats.logps()[: span.stop - span.start]
        group_sums = torch.stack([part.sum() for part in token_logps.split(lengths)])
        references = tuple(None if r is None else r.detach()[group] for r in job.references)
        value, slopes = _loss_and_slopes(job.loss, group_sums, references, len(job.lengths) // 2)
        values.append(value)
        sums.append(group_sums)
        per_row = torch.repeat_interleave(slopes, torch.tensor(lengths, device=device), output_size=sum(lengths))
        row_weights = torch.zeros_like(stats.sums)  # 0 in padding rows
        row_weights[: len(per_row)] = per_row.to(plan.accumulate) * job.head.logit_scale
        row_weights.div_(stats.totals).neg_()
        _add_gradients(
            rows, row_weights, job.head, plan, kept, d_hidden, span, d_weight, d_bias, is_first=len(sums) == 1
        )
        del kept  # two groups' tiles must not live at once
    if d_weight is not None:
        d_weight = d_weight.to(weight.tensor.dtype)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return torch.stack(values).sum(), torch.cat(sums), (d_hidden, d_weight, d_bias)


class _Kept:
    """E of a group: (R, C) in the GEMM's dtype for every slab, contiguous each."""

    def __init__(self, rows: int, head: Head, plan: Plan) -> None:
        self.rows = rows
        self.memory = torch.empty(rows * head.weight.shape[0], dtype=plan.multiply, device=plan.device)

    def slab(self, first: int, last: int) -> Tensor:
        return self.memory[first * self.rows : last * self.rows].view(self.rows, last - first)


def _fold(rows: Rows, head: Head, plan: Plan, passes: TilePasses, kept: _Kept) -> RowStatistics:
    """Multiply a group by the whole vocabulary, keep E, and put `-S dz/dx` into the label's column."""
    tiles = [(slice(i, min(i + plan.rows, rows.count))) for i in range(0, rows.count, plan.rows)]
    labelled = [label_logits(rows.at(span), head, plan) for span in tiles]
    z_label, slopes = (torch.cat(parts) for parts in zip(*labelled, strict=True))
    constants = torch.where(z_label.isfinite(), z_label, float("-inf"))
    sums = torch.zeros_like(z_label)
    factors = []
    for slab in plan.slabs(head):
        factor = torch.empty_like(sums)
        for span in tiles:
            raw, out = plan.tile(rows.at(span), slab, out=kept.slab(slab.first, slab.last)[span])
            factor[span] = passes.forward(
                raw, rows.labels[span], constants[span], sums[span], slab.first,
                bias=slab.bias, logit_scale=head.logit_scale, softcap=head.softcap, margin=plan.margin, out=out,
            )  # fmt: skip
        factors.append(factor)
        del slab  # it may be a copy
    _settle(rows, plan, head, kept, factors, -sums * slopes)
    return RowStatistics(constants=constants, sums=sums, label_logits=z_label, label_slopes=slopes)


def _settle(rows: Rows, plan: Plan, head: Head, kept: _Kept, factors: list[Tensor], at_label: Tensor) -> None:
    """Bring every kept slab to the final constants, and set the label's column."""
    vocabulary = head.weight.shape[0]
    spans = [(first, min(first + plan.columns, vocabulary)) for first in range(0, vocabulary, plan.columns)]
    moved = bool((torch.stack(factors) != 1).any())  # nearly never
    later = torch.ones_like(at_label)
    for (first, last), factor in zip(reversed(spans), reversed(factors), strict=True):
        tile = kept.slab(first, last)
        if moved:
            tile.mul_(later[:, None])
            later = later * factor
        put_at_labels(tile, rows.labels, first, at_label.to(tile.dtype))


def _add_gradients(
    rows: Rows,
    row_weights: Tensor,
    head: Head,
    plan: Plan,
    kept: _Kept,
    d_hidden: Tensor | None,
    span: slice,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    *,
    is_first: bool,
) -> None:
    """`dH = -w (E W)`, `dW += E^T (-w H)`, `db += E^T (-w)`; `row_weights` is `-w`."""
    total = None
    if d_hidden is not None:
        total = torch.zeros(rows.hidden.shape, dtype=plan.accumulate, device=plan.device)
    weighted = (rows.hidden.to(plan.accumulate) * row_weights[:, None]).to(plan.multiply)
    column = row_weights[:, None].to(plan.multiply)
    for slab in plan.slabs(head):
        tile = kept.slab(slab.first, slab.last)
        if total is not None:
            plan.add_product(total, tile, slab.weight)
        if d_weight is not None:
            part = d_weight[slab.first : slab.last]
            (plan.set_product if is_first else plan.add_product)(part, tile.t(), weighted)
        if d_bias is not None:
            plan.add_product(d_bias[slab.first : slab.last, None], tile.t(), column)
        del slab
    if d_hidden is not None and total is not None:
        d_hidden[span] = total.mul_(row_weights[:, None])[: span.stop - span.start]


def _padded(hidden: Tensor, labels: Tensor, plan: Plan) -> Rows:
    """A group's rows in the GEMM's dtype, with zero rows of label 0 up to a multiple of `ROW_MULTIPLE`."""
    missing = -hidden.shape[0] % ROW_MULTIPLE
    rows = plan.cast(hidden).contiguous()
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
        labels = torch.cat([labels, labels.new_zeros(missing)])
    return Rows(hidden=rows, labels=labels)


def _loss_and_slopes(
    loss: PairLoss, sums: Tensor, references: tuple[Tensor | None, ...], pairs: int
) -> tuple[Tensor, Tensor]:
    """The group's part of the mean over `pairs`, and its derivative by each completion's sum."""
    with torch.enable_grad():
        leaf = sums.detach().requires_grad_()
        value = _losses(loss, leaf, references).sum() / pairs
        (slopes,) = torch.autograd.grad(value, leaf)
    return value.detach(), slopes


def _losses(loss: PairLoss, sums: Tensor, references: tuple[Tensor | None, ...]) -> Tensor:
    losses = loss(sums[0::2], sums[1::2], references[0], references[1])
    if losses.shape != sums[0::2].shape:
        raise ValueError(
            f"linear_preference_loss: loss gave {tuple(losses.shape)}; expected one number a pair, ({len(sums) // 2},)"
        )
    return losses


def _check_pairs(
    hidden: Tensor, labels: Tensor, lengths: Sequence[int], chosen: Tensor | None, rejected: Tensor | None
) -> list[int]:
    counts = [int(length) for length in lengths]
    if hidden.ndim != 2 or not counts or len(counts) % 2 or min(counts) < 0 or sum(counts) != hidden.shape[0]:
        raise ValueError(
            f"linear_preference_loss: hidden {tuple(hidden.shape)} and {len(counts)} lengths that sum to {sum(counts)}; "
            "expected (N, D) and two lengths a pair that sum to N"
        )
    for name, given in (("reference_chosen_logps", chosen), ("reference_rejected_logps", rejected)):
        if given is not None and given.shape != (len(counts) // 2,):
            raise ValueError(
                f"linear_preference_loss: {name} is {tuple(given.shape)}; expected a sum a pair, ({len(counts) // 2},)"
            )
    if (chosen is None) != (rejected is None):
        raise ValueError(
            "linear_preference_loss: one of the two reference log-probs is missing; expected both, or none"
        )
    return counts
