"""What do the Triton kernels do to one tile of logits between two matrix products?

These are the GPU twins of `dpo_engine/ops/tile_pass.py`: same arguments, same results, one program per row of the tile.

    tile_pass       E = exp(z - c_i) * dz/dx and S_i += sum_{v != y} exp(z_v - c_i): between the GEMMs of a frozen head
    tile_backward   d(sum_i g_i * logp_i) / d(raw products): for a head that trains

The exponentials of row i are taken relative to a row constant `c_i` that is known before the first tile and nearly
never moves.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from dpo_engine.kernels.softcap import softcap_and_slope

# Columns a program holds in registers at once; a row of a tile is at most a few times this.
_BLOCK_COLUMNS = 2048
_WARPS = 8


def tile_pass(
    tile: torch.Tensor,
    labels: torch.Tensor,
    constants: torch.Tensor,
    sums: torch.Tensor,
    first_column: int,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    margin: float,
    out: torch.Tensor | None,
    moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """`E = exp(z - c) * dz/dx` and `S += sum(exp(z - c))`, the label's own column left out of both.

    With `m` the row's largest logit in this tile, the label's left out: `c` becomes `m` where `m > c + margin`, and
    stays otherwise. A row of which nothing but -inf was seen keeps `c = -inf` and `S = 0`.

    Args:
        tile: (R, C) float32 raw products `hidden @ weight[first_column : first_column + C].T`; any strides. Read only.
        labels: (R,) int64, vocabulary ids.
        constants: (R,) float32 contiguous, running `c`, updated in place; -inf where none is known yet.
        sums: (R,) float32 contiguous, running `S = sum_{v != label} exp(z_v - c)`, updated in place. Summed in float32
            before any rounding, and without the slope of the softcap.
        first_column: vocabulary id of the tile's first column.
        bias: (C,), added first, or None.
        logit_scale: multiplies next.
        softcap: caps last, or None.
        margin: nats by which a logit may exceed `c` before `c` moves; `exp(margin)` must be finite in the dtype of
            `out`.
        out: (R, C) E in the dtype of the next matrix product, may be `tile` itself but overlap it in no other way; None
            where only `sums` is wanted.
        moments: (4, R) float32 contiguous, updated in place, or None where they are not wanted. Over the columns `v !=
            label` seen so far, and with a `margin` of at most 20, so that no square overflows:
            `moments[0] = max z_v` (-inf at first), `moments[1] = sum exp(z_v - c) * (z_v - c)` (0 at first, a term
            whose exponential is 0 is 0), `moments[2] = sum exp(2 * (z_v - c))` (0 at first); and `moments[3]` the
            label's own logit (-inf at first, written by the one tile that holds it).

    Returns:
        (R,) float32, the factor by which a caller must multiply what it summed over earlier tiles: exactly 1 where `c`
        did not move, 0 where `c` was -inf and moved.

    Raises:
        ValueError: a tile that is not float32, or shapes, dtypes or strides other than the above.
    """
    _check("tile_pass", tile, labels, bias, out, constants=constants, sums=sums)
    if moments is not None and (
        moments.shape != (4, tile.shape[0]) or moments.dtype != torch.float32 or not moments.is_contiguous()
    ):
        given = f"{tuple(moments.shape)} {moments.dtype}, strides {moments.stride()}"
        raise ValueError(f"tile_pass: moments is {given}; expected (4, {tile.shape[0]}) float32, contiguous")
    rescale = torch.empty_like(constants)
    target = tile if out is None else out
    with _on_device_of(tile):
        if tile.shape[0]:
            _tile_pass_kernel[(tile.shape[0],)](
                tile, tile if bias is None else bias, labels.contiguous(), constants, sums, rescale, target,
                constants if moments is None else moments,
                tile.shape[1], first_column,
                tile.stride(0), tile.stride(1), 1 if bias is None else bias.stride(0),
                target.stride(0), target.stride(1),
                logit_scale, 1.0 if softcap is None else softcap, margin,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_OUT=out is not None,
                HAS_MOMENTS=moments is not None,
                BLOCK_C=_BLOCK_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
    return rescale


def tile_backward(
    tile: torch.Tensor,
    labels: torch.Tensor,
    constants: torch.Tensor,
    row_weights: torch.Tensor,
    label_weights: torch.Tensor,
    first_column: int,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    out: torch.Tensor,
) -> None:
    """`out = d(sum_i g_i * logp_i) / d(raw products)` for one tile.

    `out[i, v] = -row_weights[i] * exp(z_iv - c_i) * dz/dx` in every column but the label's, which holds
    `label_weights[i]`.

    Args:
        tile, labels, first_column, bias, logit_scale, softcap, out: as for `tile_pass`.
        constants: (R,) float32 contiguous, the final `c`; read only.
        row_weights: (R,) float32 contiguous, `g * logit_scale / (S + t)` with `t = exp(z_y - c)`.
        label_weights: (R,) float32 contiguous, `g * logit_scale * dz/dx at the label * S / (S + t)`: one minus the
            probability without cancellation.

    Raises:
        ValueError: as for `tile_pass`.
    """
    _check(
        "tile_backward",
        tile,
        labels,
        bias,
        out,
        constants=constants,
        row_weights=row_weights,
        label_weights=label_weights,
    )
    with _on_device_of(tile):
        if tile.shape[0]:
            _tile_backward_kernel[(tile.shape[0],)](
                tile, tile if bias is None else bias, labels.contiguous(), constants, row_weights, label_weights, out,
                tile.shape[1], first_column,
                tile.stride(0), tile.stride(1), 1 if bias is None else bias.stride(0), out.stride(0), out.stride(1),
                logit_scale, 1.0 if softcap is None else softcap,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
                BLOCK_C=_BLOCK_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip


def _check(
    name: str,
    tile: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    **per_row: torch.Tensor,
) -> None:
    if tile.dtype != torch.float32 or tile.ndim != 2:
        raise ValueError(f"{name}: tile is {tuple(tile.shape)} {tile.dtype}; expected (R, C) float32")
    rows, columns = tile.shape
    if labels.shape != (rows,) or (bias is not None and bias.shape != (columns,)):
        given = f"labels {tuple(labels.shape)}" + ("" if bias is None else f", bias {tuple(bias.shape)}")
        raise ValueError(f"{name}: {given} do not fit a tile of {tuple(tile.shape)}; expected (R,) and (C,)")
    if out is not None and out.shape != tile.shape:
        raise ValueError(f"{name}: out is {tuple(out.shape)}; expected the tile's {tuple(tile.shape)}")
    for argument, tensor in per_row.items():
        # Written in place, or read by row number alone: a copy would lose the update.
        if tensor.shape != (rows,) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            given = f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}"
            raise ValueError(f"{name}: {argument} is {given}; expected ({rows},) float32, contiguous")


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit(do_not_specialize=["first_column"])
def _tile_pass_kernel(
    tile_ptr, bias_ptr, labels_ptr, constants_ptr, sums_ptr, rescale_ptr, out_ptr, moments_ptr,
    n_columns, first_column,
    stride_tile_r, stride_tile_c, stride_bias, stride_out_r, stride_out_c,
    logit_scale, softcap, margin,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_OUT: tl.constexpr, HAS_MOMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row: a sweep for its largest logit, then one for the exponentials, which finds the row in the cache."""
    row = tl.program_id(0).to(tl.int64)
    tile_ptr += row * stride_tile_r
    out_ptr += row * stride_out_r
    label_column = tl.load(labels_ptr + row) - first_column
    constant = tl.load(constants_ptr + row)
    if HAS_MOMENTS:
        moments_ptr += row
        moment_stride = tl.num_programs(0).to(tl.int64)
        # Before the first sweep: the second may write over the tile, and the reduction between them is a barrier.
        label_inside = (label_column >= 0) & (label_column < n_columns)
        z_label = _label_logit(
            tile_ptr, bias_ptr, label_column, label_inside, stride_tile_c, stride_bias, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        tl.store(moments_ptr + 3 * moment_stride, z_label, mask=label_inside)

    running = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    for start in range(0, n_columns, BLOCK_C):
        z, _ = _logits(
            tile_ptr, bias_ptr, start, n_columns, label_column, stride_tile_c, stride_bias, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, BLOCK_C,
        )  # fmt: skip
        running = tl.maximum(running, z)
    maximum = tl.max(running, 0)
    moved = tl.where(maximum - constant > margin, maximum, constant)
    # -inf means that no logit was seen yet: nothing was summed, and exp(-inf - 0) is the zero that is wanted.
    shift = tl.where(moved == float("-inf"), 0.0, moved)
    rescale = tl.where(moved == constant, 1.0, tl.exp(constant - shift))

    weights = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_MOMENTS:
        leaning = tl.zeros((BLOCK_C,), tl.float32)
        squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, n_columns, BLOCK_C):
        z, slope = _logits(
            tile_ptr, bias_ptr, start, n_columns, label_column, stride_tile_c, stride_bias, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, BLOCK_C,
        )  # fmt: skip
        e = tl.exp(z - shift)
        weights += e
        if HAS_MOMENTS:
            leaning += tl.where(e == 0.0, 0.0, e * (z - shift))  # not 0 * -inf
            squares += e * e
        if HAS_OUT:
            if HAS_SOFTCAP:
                e *= slope
            offs_c = start + tl.arange(0, BLOCK_C)
            out_ptrs = out_ptr + offs_c.to(tl.int64) * stride_out_c
            tl.store(out_ptrs, e.to(out_ptr.dtype.element_ty), mask=offs_c < n_columns)
    sums = tl.load(sums_ptr + row)
    if HAS_MOMENTS:
        # Relative to a new c, z - c is off by c's move in every term; a row of which nothing was seen has no terms.
        drift = tl.where(constant == float("-inf"), 0.0, constant - shift)
        old_leaning = tl.load(moments_ptr + moment_stride) + sums * drift
        tl.store(moments_ptr + moment_stride, old_leaning * rescale + tl.sum(leaning, 0))
        old_squares = tl.load(moments_ptr + 2 * moment_stride)
        tl.store(moments_ptr + 2 * moment_stride, old_squares * (rescale * rescale) + tl.sum(squares, 0))
        tl.store(moments_ptr, tl.maximum(tl.load(moments_ptr), maximum))
    tl.store(sums_ptr + row, sums * rescale + tl.sum(weights, 0))
    tl.store(constants_ptr + row, moved)
    tl.store(rescale_ptr + row, rescale)


@triton.jit(do_not_specialize=["first_column"])
def _tile_backward_kernel(
    tile_ptr, bias_ptr, labels_ptr, constants_ptr, row_weights_ptr, label_weights_ptr, out_ptr,
    n_columns, first_column,
    stride_tile_r, stride_tile_c, stride_bias, stride_out_r, stride_out_c,
    logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row, one sweep."""
    row = tl.program_id(0).to(tl.int64)
    tile_ptr += row * stride_tile_r
    out_ptr += row * stride_out_r
    label_column = tl.load(labels_ptr + row) - first_column
    constant = tl.load(constants_ptr + row)
    row_weight = tl.load(row_weights_ptr + row)
    label_weight = tl.load(label_weights_ptr + row)
    for start in range(0, n_columns, BLOCK_C):
        z, slope = _logits(
            tile_ptr, bias_ptr, start, n_columns, label_column, stride_tile_c, stride_bias, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, BLOCK_C,
        )  # fmt: skip
        e = tl.exp(z - constant)
        if HAS_SOFTCAP:
            e *= slope
        offs_c = start + tl.arange(0, BLOCK_C)
        gradient = tl.where(offs_c == label_column, label_weight, -row_weight * e)
        out_ptrs = out_ptr + offs_c.to(tl.int64) * stride_out_c
        tl.store(out_ptrs, gradient.to(out_ptr.dtype.element_ty), mask=offs_c < n_columns)


@triton.jit
def _logits(
    tile_ptr, bias_ptr, start, n_columns, label_column, stride_tile_c, stride_bias, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`(z, dz/dx)` of one block of a row; z is -inf in the label's column and past the end; no softcap, slope 1."""
    offs_c = start + tl.arange(0, BLOCK_C)
    mask = offs_c < n_columns
    columns = offs_c.to(tl.int64)
    z = tl.load(tile_ptr + columns * stride_tile_c, mask=mask, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns * stride_bias, mask=mask, other=0.0).to(tl.float32)
    z *= logit_scale
    slope = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_SOFTCAP:
        z, slope = softcap_and_slope(z, softcap)
    return tl.where(mask & (offs_c != label_column), z, float("-inf")), slope


@triton.jit
def _label_logit(
    tile_ptr, bias_ptr, column, inside, stride_tile_c, stride_bias, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The logit of one int64 column of a row; means nothing where `inside` is false."""
    z = tl.load(tile_ptr + column * stride_tile_c, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + column * stride_bias, mask=inside, other=0.0).to(tl.float32)
    z *= logit_scale
    if HAS_SOFTCAP:
        z, _ = softcap_and_slope(z, softcap)
    return z
