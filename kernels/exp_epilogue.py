"""How does a matrix product write exponentials instead of logits?

    E[i, v] = exp(z_iv - c_i) * dz/dx        z = softcap(logit_scale * (rows @ slab.T + bias))

One GEMM whose epilogue does what `tile_pass` does after a vendor GEMM, so that the float32 tile of logits is neither
written nor read again, and no logit is ever rounded to the dtype of the GEMM. It works because the row constant `c_i`,
the logit of the row's own label, is known beforehand: a block needs nothing from the blocks beside it.

Three kernels, one after another, no atomics and no word to the host:

    _exponentials_kernel   every block with the constants as they are; per block of columns a row's maximum and sum
    _redo_kernel           only rows whose largest logit exceeds their constant by more than the margin, with it as the
                           new constant; nearly always there is none, and a program reads the maxima and exits
    _settle_kernel         folds the partial sums in a fixed order, and moves the constants
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from dpo_engine.kernels.product import group_rows, logits_block, operand, raster, takes_descriptor
from dpo_engine.kernels.tiles import EXPONENTIAL, Tiles, choose_tiles

_SETTLE_ROWS = 32
# Column blocks whose partial results are held in registers at once.
_CHUNK = 16
# Programs that share the redoing of one block of rows.
_REDO_PROGRAMS = 8


def product_and_pass(
    rows: torch.Tensor,
    slab: torch.Tensor,
    labels: torch.Tensor,
    constants: torch.Tensor,
    sums: torch.Tensor,
    first_column: int,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    margin: float,
    out: torch.Tensor,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """`tile_pass(rows @ slab.T, ...)`: `out = E` and `S += sum(exp(z - c))`, the label's own column left out of both.

    Products accumulate in float32; float32 operands are multiplied as IEEE float32, not TF32. A row's bits do not
    depend on the rows beside it, but on a GPU may on whether the operands are laid out for tensor descriptors. Memory
    beyond the result: 8 bytes a row and block of columns.

    Args:
        rows: (R, D) float32, bfloat16 or float16; any strides.
        slab: (C, D) `weight[first_column : first_column + C]`, same dtype and device; any strides.
        labels: (R,) int64, vocabulary ids.
        constants: (R,) float32 contiguous, running `c`, updated in place; -inf where none is known yet.
        sums: (R,) float32 contiguous, running `S = sum_{v != label} exp(z_v - c)`, updated in place. Summed in float32
            before any rounding, and without the slope of the softcap.
        first_column: vocabulary id of the slab's first row.
        bias: (C,) of any floating dtype, added first, or None.
        logit_scale: multiplies next.
        softcap: caps last, or None.
        margin: nats by which a logit may exceed `c` before `c` moves; `exp(margin)` must be finite in the dtype of
            `out`.
        out: (R, C) E in the dtype of the next matrix product; overlaps neither operand.
        tiles: block sizes, for sweeps and tests; by default the entry of the table for this device, dtype and strides.

    Returns:
        (R,) float32, the factor by which a caller must multiply what it summed over earlier slabs: exactly 1 where `c`
        did not move, 0 where `c` was -inf and moved.

    Raises:
        ValueError: a dtype without a kernel, two dtypes, or shapes or strides other than the above.
    """
    _check(rows, slab, labels, constants, sums, bias, out)
    (n_rows, depth), n_columns = rows.shape, slab.shape[0]
    interpreted = triton.knobs.runtime.interpret
    if tiles is None:
        capability = None if interpreted else torch.cuda.get_device_capability(rows.device)
        descriptors = takes_descriptor(rows) and takes_descriptor(slab)
        tiles = choose_tiles(EXPONENTIAL, capability, rows.dtype, descriptors=descriptors, softcap=softcap is not None)
    rescale = torch.empty_like(constants)
    if not n_rows:
        return rescale
    n_column_blocks = triton.cdiv(n_columns, tiles.columns)
    maxima, partial_sums = torch.empty(2, n_column_blocks, n_rows, dtype=torch.float32, device=rows.device)
    right = operand(slab, tiles.columns, tiles)
    arguments = (
        slab if bias is None else bias, labels.contiguous(), constants, maxima, partial_sums, out,
        n_rows, n_columns, depth, first_column,
        rows.stride(0), rows.stride(1), slab.stride(0), slab.stride(1), 1 if bias is None else bias.stride(0),
        out.stride(0), out.stride(1),
        logit_scale, 1.0 if softcap is None else softcap,
    )  # fmt: skip
    options = {
        "HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap is not None,
        "EVEN_D": tiles.descriptors or depth % tiles.depth == 0,
        # The interpreter multiplies bfloat16 as if it were integers.
        "DESCRIPTORS": tiles.descriptors, "UPCAST": interpreted,
        "BLOCK_V": tiles.columns, "BLOCK_D": tiles.depth, "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        _exponentials_kernel[(triton.cdiv(n_rows, tiles.rows) * n_column_blocks,)](
            operand(rows, tiles.rows, tiles), right, *arguments,
            BLOCK_N=tiles.rows, GROUP_ROWS=group_rows(depth, rows.element_size(), tiles), **options,
        )  # fmt: skip
        redo_rows = rows_to_redo(tiles)
        _redo_kernel[(triton.cdiv(n_rows, redo_rows) * _REDO_PROGRAMS,)](
            operand(rows, redo_rows, tiles), right, *arguments, margin,
            BLOCK_N=redo_rows, PROGRAMS=_REDO_PROGRAMS, CHUNK=_CHUNK, **options,
        )  # fmt: skip
        _settle_kernel[(triton.cdiv(n_rows, _SETTLE_ROWS),)](
            maxima, partial_sums, constants, sums, rescale, n_rows, n_column_blocks, margin,
            BLOCK_N=_SETTLE_ROWS, CHUNK=_CHUNK, num_warps=4,
        )  # fmt: skip
    return rescale


def rows_to_redo(tiles: Tiles) -> int:
    """Rows of a block of `_redo_kernel`: half, so that the loop around its product needs no register more."""
    return max(16, tiles.rows // 2)


def _check(
    rows: torch.Tensor,
    slab: torch.Tensor,
    labels: torch.Tensor,
    constants: torch.Tensor,
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not slab.dtype == out.dtype == rows.dtype:
        raise ValueError(
            f"product_and_pass: rows {rows.dtype}, slab {slab.dtype}, out {out.dtype}; "
            "expected one of float32, bfloat16, float16 for all three"
        )
    fits = rows.ndim == 2 and slab.ndim == 2 and rows.shape[1] == slab.shape[1] and labels.shape == rows.shape[:1]
    shape = (rows.shape[0], slab.shape[0])
    if not fits or out.shape != shape or (bias is not None and bias.shape != shape[1:]):
        shapes = f"rows {tuple(rows.shape)}, slab {tuple(slab.shape)}, labels {tuple(labels.shape)}"
        shapes += f", out {tuple(out.shape)}" + ("" if bias is None else f", bias {tuple(bias.shape)}")
        raise ValueError(f"product_and_pass: {shapes} do not fit; expected (R, D), (C, D), (R,), (R, C) and (C,)")
    for name, tensor in (("constants", constants), ("sums", sums)):
        # Written in place by row number alone: a copy would lose the update.
        if tensor.shape != shape[:1] or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            given = f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}"
            raise ValueError(f"product_and_pass: {name} is {given}; expected ({shape[0]},) float32, contiguous")


@triton.jit(do_not_specialize=["n_rows", "first_column"])
def _exponentials_kernel(
    left, right, bias_ptr, labels_ptr, constants_ptr, maxima_ptr, partial_sums_ptr, out_ptr,
    n_rows, n_columns, depth, first_column,
    stride_left_r, stride_left_d, stride_right_c, stride_right_d, stride_bias, stride_out_r, stride_out_c,
    logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """One block of E; `maxima[block of columns, i] = max_v z` and `partial_sums[.., i] = sum_v exp(z - c)`."""
    row_block, column_block = raster(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), tl.cdiv(n_columns, BLOCK_V), GROUP_ROWS
    )
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < n_rows
    constants = tl.load(constants_ptr + offs_n, mask=row_mask, other=0.0)
    _exponentials(
        left, right, bias_ptr, labels_ptr, maxima_ptr, partial_sums_ptr, out_ptr,
        row_block, column_block, constants, row_mask,
        n_rows, n_columns, depth, first_column,
        stride_left_r, stride_left_d, stride_right_c, stride_right_d, stride_bias, stride_out_r, stride_out_c,
        logit_scale, softcap,
        HAS_BIAS, HAS_SOFTCAP, EVEN_D, DESCRIPTORS, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "first_column"])
def _redo_kernel(
    left, right, bias_ptr, labels_ptr, constants_ptr, maxima_ptr, partial_sums_ptr, out_ptr,
    n_rows, n_columns, depth, first_column,
    stride_left_r, stride_left_d, stride_right_c, stride_right_d, stride_bias, stride_out_r, stride_out_c,
    logit_scale, softcap, margin,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PROGRAMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """E and `partial_sums` again, of the rows whose constant must move and of no other."""
    row_block = tl.program_id(0) // PROGRAMS
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < n_rows
    n_column_blocks = tl.cdiv(n_columns, BLOCK_V)
    constants = tl.load(constants_ptr + offs_n, mask=row_mask, other=0.0)
    maxima = _row_maxima(maxima_ptr, offs_n, n_rows, n_column_blocks, BLOCK_N, CHUNK)
    moves = row_mask & (maxima - constants > margin)
    if tl.max(moves.to(tl.int32), 0) > 0:
        for column_block in range(tl.program_id(0) % PROGRAMS, n_column_blocks, PROGRAMS):
            _exponentials(
                left, right, bias_ptr, labels_ptr, maxima_ptr, partial_sums_ptr, out_ptr,
                row_block, column_block, maxima, moves,
                n_rows, n_columns, depth, first_column,
                stride_left_r, stride_left_d, stride_right_c, stride_right_d, stride_bias, stride_out_r, stride_out_c,
                logit_scale, softcap,
                HAS_BIAS, HAS_SOFTCAP, EVEN_D, DESCRIPTORS, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D, False,
            )  # fmt: skip


@triton.jit
def _exponentials(
    left, right, bias_ptr, labels_ptr, maxima_ptr, partial_sums_ptr, out_ptr,
    row_block, column_block, constants, wanted,
    n_rows, n_columns, depth, first_column,
    stride_left_r, stride_left_d, stride_right_c, stride_right_d, stride_bias, stride_out_r, stride_out_c,
    logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, WITH_MAXIMA: tl.constexpr,
):  # fmt: skip
    """One block of E relative to `constants`, its partial sums and, where wanted, its maxima: rows of `wanted` only."""
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    column_mask = offs_v < n_columns
    z, slope = logits_block(
        left, right, bias_ptr, row_block * BLOCK_N, column_block * BLOCK_V, n_rows, n_columns, depth,
        stride_left_r, stride_left_d, stride_right_c, stride_right_d, stride_bias, logit_scale, softcap,
        HAS_BIAS, HAS_SOFTCAP, EVEN_D, DESCRIPTORS, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    labels = tl.load(labels_ptr + offs_n, mask=offs_n < n_rows, other=-1)
    label_columns = (labels - first_column).to(tl.int32)
    left_out = (offs_v[None, :] == label_columns[:, None]) | (column_mask[None, :] == 0)
    z = tl.where(left_out, float("-inf"), z)
    rows_n = offs_n.to(tl.int64)
    offs_partial = column_block * n_rows.to(tl.int64) + rows_n
    if WITH_MAXIMA:
        tl.store(maxima_ptr + offs_partial, tl.max(z, 1), mask=wanted)
    # -inf means that no logit was seen yet; if this row has one, it will be done again with it as the constant.
    shift = tl.where(constants == float("-inf"), 0.0, constants)
    e = tl.exp(z - shift[:, None])
    tl.store(partial_sums_ptr + offs_partial, tl.sum(e, 1), mask=wanted)
    if HAS_SOFTCAP:
        e *= slope
    out_ptrs = out_ptr + rows_n[:, None] * stride_out_r + offs_v.to(tl.int64)[None, :] * stride_out_c
    tl.store(out_ptrs, e.to(out_ptr.dtype.element_ty), mask=wanted[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def _settle_kernel(
    maxima_ptr, partial_sums_ptr, constants_ptr, sums_ptr, rescale_ptr,
    n_rows, n_column_blocks, margin,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Moves `c`, and `S = S * rescale + sum of the partial sums`, column blocks in order."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < n_rows
    constants = tl.load(constants_ptr + offs_n, mask=row_mask, other=0.0)
    maxima = _row_maxima(maxima_ptr, offs_n, n_rows, n_column_blocks, BLOCK_N, CHUNK)
    moved = tl.where(maxima - constants > margin, maxima, constants)
    shift = tl.where(moved == float("-inf"), 0.0, moved)
    rescale = tl.where(moved == constants, 1.0, tl.exp(constants - shift))
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_column_blocks, CHUNK):
        offs_b = start + tl.arange(0, CHUNK)
        offs = offs_b[:, None] * n_rows.to(tl.int64) + offs_n[None, :]
        mask = (offs_b < n_column_blocks)[:, None] & row_mask[None, :]
        total += tl.sum(tl.load(partial_sums_ptr + offs, mask=mask, other=0.0), 0)
    sums = tl.load(sums_ptr + offs_n, mask=row_mask, other=0.0)
    tl.store(sums_ptr + offs_n, sums * rescale + total, mask=row_mask)
    tl.store(constants_ptr + offs_n, moved, mask=row_mask)
    tl.store(rescale_ptr + offs_n, rescale, mask=row_mask)


@triton.jit
def _row_maxima(maxima_ptr, offs_n, n_rows, n_column_blocks, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """(BLOCK_N,) largest logit over all column blocks; -inf past the last row."""
    maxima = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for start in range(0, n_column_blocks, CHUNK):
        offs_b = start + tl.arange(0, CHUNK)
        offs = offs_b[:, None] * n_rows.to(tl.int64) + offs_n[None, :]
        mask = (offs_b < n_column_blocks)[:, None] & (offs_n < n_rows)[None, :]
        maxima = tl.maximum(maxima, tl.max(tl.load(maxima_ptr + offs, mask=mask, other=float("-inf")), 0))
    return maxima
