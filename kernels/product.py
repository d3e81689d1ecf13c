"""How does a block of logits come out of a matrix product, on any card?

    z = softcap(logit_scale * (left @ right.T + bias))

The kernels differ in what they do with a block of `z`; how it is computed they share. Operands are loaded by tensor
descriptor (TMA, from compute capability 9.0) or through pointers: the numbers are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_engine.kernels.softcap import softcap_and_slope

if TYPE_CHECKING:
    from dpo_engine.kernels.tiles import Tiles

# Rows of the left operand that programs running side by side share: a third of the L2 cache of an H200, and weights
# stream through it.
_SHARED_ROWS_BYTES = 16 << 20


def takes_descriptor(matrix: torch.Tensor) -> bool:
    """Whether a (rows, depth) matrix can be read by tensor descriptor: rows 16-byte aligned, apart, and contiguous."""
    rows, depth = matrix.shape
    return (
        rows > 0
        and depth > 0
        and matrix.stride(1) == 1
        and _row_stride(matrix) >= depth
        and _row_stride(matrix) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _row_stride(matrix: torch.Tensor) -> int:
    """A single row may carry any stride: it must get the kernel, and so the bits, that it gets among others."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def operand(matrix: torch.Tensor, block_rows: int, tiles: Tiles) -> torch.Tensor | TensorDescriptor:
    """What a kernel is given for a (rows, depth) operand: the matrix for its pointer, or a descriptor of its blocks."""
    if not tiles.descriptors:
        return matrix
    if not takes_descriptor(matrix):
        given = (
            f"{tuple(matrix.shape)}, strides {matrix.stride()}, at {matrix.data_ptr() % 16} bytes past a multiple of 16"
        )
        raise ValueError(f"operand: {given} cannot be read by tensor descriptor; expected tiles with descriptors=False")
    return TensorDescriptor(matrix, list(matrix.shape), [_row_stride(matrix), 1], [block_rows, tiles.depth])


def group_rows(depth: int, element_size: int, tiles: Tiles) -> int:
    """Row blocks for `raster`, so that what they share stays in the L2 cache. Independent of the number of rows."""
    return max(1, _SHARED_ROWS_BYTES // (tiles.rows * max(depth, 1) * element_size))


@triton.jit
def raster(program, n_row_blocks, n_columns, GROUP_ROWS: tl.constexpr):
    """`(row block, column)` of a program on a grid of `n_row_blocks * n_columns`, column a block or a split.

    Programs that start together share few rows and walk the columns side by side, so that both stay in the L2 cache.
    """
    group_programs = GROUP_ROWS * n_columns
    first_block = program // group_programs * GROUP_ROWS
    rows_here = tl.minimum(n_row_blocks - first_block, GROUP_ROWS)
    return first_block + program % group_programs % rows_here, program % group_programs // rows_here


@triton.jit
def logits_block(
    left, right, bias_ptr,
    first_row, first_column, n_rows, n_columns, depth,
    stride_left_r, stride_left_d, stride_right_c, stride_right_d, stride_bias,
    logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`(z, dz/dx)` of rows from `first_row` against columns from `first_column`, float32 (BLOCK_N, BLOCK_V).

    `EVEN_D` says that BLOCK_D divides the depth; loading by descriptor does not ask.
    Products accumulate in float32; float32 operands are multiplied as IEEE float32, not TF32. Past the last row or
    column the entries are finite but mean nothing. Without a softcap dz/dx is 1.
    """
    # Addresses are int64: a row number times a stride can pass 2**31.
    offs_v = first_column + tl.arange(0, BLOCK_V)
    column_mask = offs_v < n_columns
    rows_v = offs_v.to(tl.int64)
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if DESCRIPTORS:
        for k in range(0, depth, BLOCK_D):
            a = left.load([first_row, k])
            b = right.load([first_column, k])
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b.T, z, input_precision="ieee")
    else:
        offs_n = first_row + tl.arange(0, BLOCK_N)
        row_mask = offs_n < n_rows
        offs_d = tl.arange(0, BLOCK_D)
        columns_d = offs_d.to(tl.int64)
        step = tl.full((), BLOCK_D, tl.int64)
        a_ptrs = left + offs_n.to(tl.int64)[:, None] * stride_left_r + columns_d[None, :] * stride_left_d
        b_ptrs = right + rows_v[None, :] * stride_right_c + columns_d[:, None] * stride_right_d
        for k in range(0, depth, BLOCK_D):
            if EVEN_D:
                a = tl.load(a_ptrs, mask=row_mask[:, None], other=0.0)
                b = tl.load(b_ptrs, mask=column_mask[None, :], other=0.0)
            else:
                depth_mask = offs_d < depth - k
                a = tl.load(a_ptrs, mask=row_mask[:, None] & depth_mask[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=column_mask[None, :] & depth_mask[:, None], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision="ieee")
            a_ptrs += step * stride_left_d
            b_ptrs += step * stride_right_d
    if HAS_BIAS:
        z += tl.load(bias_ptr + rows_v * stride_bias, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    z *= logit_scale
    slope = tl.full((BLOCK_N, BLOCK_V), 1.0, tl.float32)
    if HAS_SOFTCAP:
        z, slope = softcap_and_slope(z, softcap)
    return z, slope
