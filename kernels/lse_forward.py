"""How are log-probs computed by one kernel, with nothing of size N*V stored?

    z = softcap(logit_scale * (hidden @ weight.T + bias))        logp_i = z[i, y_i] - logsumexp_v z[i, v]

A program multiplies one block of rows with one split of the vocabulary, block by block. Each block of logits lives in
registers only: the program picks the label's logit out of it and folds the rest into a running (maximum, sum of
exponentials) per row. A second, small kernel joins the splits of a row.

The label never enters the sum, so a row that is sure of its label (logp near -1e-12) loses nothing to cancellation.
A row's bits do not depend on the rows beside it: block sizes and the number of splits follow from the shape of the
head, its dtype, the device and whether the operands are laid out for tensor descriptors, never from N.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from dpo_engine.kernels.product import group_rows, logits_block, operand, raster, takes_descriptor
from dpo_engine.kernels.tiles import FUSED, Tiles, choose_tiles

# Enough programs to fill a large GPU when there is one block of rows.
_MAX_SPLITS = 128
# Bounds the partial results, at 8 bytes a row and split, to 8 MiB.
_ROWS_PER_LAUNCH = 8192
_JOIN_ROWS = 32


def logps_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    *,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """`log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)))[i, labels[i]]` by one fused GEMM.

    Products accumulate in float32; float32 inputs are multiplied as IEEE float32, not TF32. Nothing is copied: not the
    weight, whatever its strides, nor `hidden`. Memory beyond the result: 4 bytes a row, and at most
    8 MiB whatever N.

    Args:
        hidden: (N, D) float32, bfloat16 or float16; any strides.
        weight: (V, D), same dtype and device; any strides, so a transposed one too.
        labels: (N,) integer, each in `[0, V)`. A label outside gives NaN.
        bias: (V,) of any floating dtype, or None.
        logit_scale: multiplies the logits, before the softcap.
        softcap: positive number, or None for none.
        tiles: block sizes, for sweeps and tests; by default the entry of the table for this device, dtype and strides.

    Returns:
        (N,) float32; never positive, -inf where the label's logit is -inf, NaN where a logit is NaN or +inf.

    Raises:
        ValueError: a dtype without a kernel, two dtypes, or shapes that do not fit.

    Source: derivation in `docs/operator.md`; online sum after Milakov and Gimelshein, arXiv:1805.02867.
    """
    _check(hidden, weight, labels, bias)
    n_rows, depth = hidden.shape
    vocabulary = weight.shape[0]
    interpreted = triton.knobs.runtime.interpret
    if tiles is None:
        capability = None if interpreted else torch.cuda.get_device_capability(hidden.device)
        descriptors = takes_descriptor(hidden) and takes_descriptor(weight)
        tiles = choose_tiles(FUSED, capability, hidden.dtype, descriptors=descriptors, softcap=softcap is not None)
    split_columns = triton.cdiv(triton.cdiv(vocabulary, _MAX_SPLITS), tiles.columns) * tiles.columns
    n_splits = triton.cdiv(vocabulary, split_columns)
    labels = labels.contiguous()
    launch_rows = min(n_rows, _ROWS_PER_LAUNCH)
    partials = torch.empty(2, n_splits, launch_rows, dtype=torch.float32, device=hidden.device)
    # Exactly one split of a row holds its label and overwrites this.
    label_logits = torch.full((n_rows,), float("nan"), dtype=torch.float32, device=hidden.device)
    logps = torch.empty_like(label_logits)
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        for start in range(0, n_rows, _ROWS_PER_LAUNCH):
            rows = slice(start, min(start + _ROWS_PER_LAUNCH, n_rows))
            count = rows.stop - rows.start
            _fold_kernel[(triton.cdiv(count, tiles.rows) * n_splits,)](
                operand(hidden[rows], tiles.rows, tiles), operand(weight, tiles.columns, tiles),
                weight if bias is None else bias,
                labels[rows], partials[0], partials[1], label_logits[rows],
                count, vocabulary, depth, split_columns, n_splits, launch_rows,
                hidden.stride(0), hidden.stride(1), weight.stride(0), weight.stride(1),
                1 if bias is None else bias.stride(0),
                logit_scale, 1.0 if softcap is None else softcap,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
                EVEN_D=tiles.descriptors or depth % tiles.depth == 0,
                # The interpreter multiplies bfloat16 as if it were integers.
                DESCRIPTORS=tiles.descriptors, UPCAST=interpreted,
                BLOCK_N=tiles.rows, BLOCK_V=tiles.columns, BLOCK_D=tiles.depth,
                GROUP_ROWS=group_rows(depth, hidden.element_size(), tiles),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            _join_kernel[(triton.cdiv(count, _JOIN_ROWS),)](
                partials[0], partials[1], label_logits[rows], logps[rows], count, n_splits, launch_rows,
                BLOCK_N=_JOIN_ROWS, BLOCK_SPLITS=triton.next_power_of_2(n_splits), num_warps=4,
            )  # fmt: skip
    return logps


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None) -> None:
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"logps_forward: hidden {hidden.dtype}, weight {weight.dtype}; "
            "expected one of float32, bfloat16, float16 for both"
        )
    fits = (
        hidden.ndim == 2
        and weight.ndim == 2
        and hidden.shape[1] == weight.shape[1]
        and labels.shape == hidden.shape[:1]
    )
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
        shapes += "" if bias is None else f", bias {tuple(bias.shape)}"
        raise ValueError(f"logps_forward: {shapes} do not fit; expected (N, D), (V, D), (N,) and (V,)")


@triton.jit(do_not_specialize=["n_rows", "partials_stride"])
def _fold_kernel(
    hidden, weight, bias_ptr, labels_ptr,
    maxima_ptr, sums_ptr, label_logits_ptr,
    n_rows, vocabulary, depth, split_columns, n_splits, partials_stride,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, stride_bias,
    logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the vocabulary.

    Writes `maxima[split, i] = max_v z` and `sums[split, i] = sum_v exp(z - maxima)` over the split's columns without
    the label, and `label_logits[i]` if the split holds the label. Both arrays are (n_splits, partials_stride) float32.
    """
    row_block, split = raster(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), n_splits, GROUP_ROWS)
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < n_rows
    labels = tl.load(labels_ptr + offs_n, mask=row_mask, other=-1).to(tl.int32)

    maxima = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    label_logits = tl.zeros((BLOCK_N,), tl.float32)
    first = split * split_columns
    last = tl.minimum(first + split_columns, vocabulary)
    for start in range(first, last, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        column_mask = offs_v < vocabulary
        z, _ = logits_block(
            hidden, weight, bias_ptr, row_block * BLOCK_N, start, n_rows, vocabulary, depth,
            stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, stride_bias, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, EVEN_D, DESCRIPTORS, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        is_label = offs_v[None, :] == labels[:, None]
        label_logits += tl.sum(tl.where(is_label, z, 0.0), 1)
        z = tl.where(is_label | (column_mask[None, :] == 0), float("-inf"), z)
        new_maxima = tl.maximum(maxima, tl.max(z, 1))
        # Where every logit so far is -inf, -inf - -inf would be NaN; relative to 0 their exponentials are the 0 that is
        # wanted.
        shift = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)
        sums = sums * tl.exp(maxima - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        maxima = new_maxima

    offs_partial = split * partials_stride + offs_n  # at most _MAX_SPLITS * _ROWS_PER_LAUNCH: no int64 needed
    tl.store(maxima_ptr + offs_partial, maxima, mask=row_mask)
    tl.store(sums_ptr + offs_partial, sums, mask=row_mask)
    tl.store(label_logits_ptr + offs_n, label_logits, mask=row_mask & (labels >= first) & (labels < last))


@triton.jit(do_not_specialize=["n_rows", "partials_stride"])
def _join_kernel(
    maxima_ptr, sums_ptr, label_logits_ptr, logps_ptr,
    n_rows, n_splits, partials_stride,
    BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """`logps[i] = -log(1 + exp(others - z_y))` with `others = log sum_{v != y} exp(z_v)` over all splits."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < n_rows
    offs_s = tl.arange(0, BLOCK_SPLITS)
    mask = (offs_s[:, None] < n_splits) & row_mask[None, :]
    offs = offs_s[:, None] * partials_stride + offs_n[None, :]
    split_maxima = tl.load(maxima_ptr + offs, mask=mask, other=float("-inf"))
    split_sums = tl.load(sums_ptr + offs, mask=mask, other=0.0)
    z_label = tl.load(label_logits_ptr + offs_n, mask=row_mask, other=0.0)

    maxima = tl.max(split_maxima, 0)
    shift = tl.where(maxima == float("-inf"), 0.0, maxima)
    sums = tl.sum(split_sums * tl.exp(split_maxima - shift[None, :]), 0)
    # The large logits are subtracted before anything small is added to them: at |z| = 1e4 a float32 moves in steps of
    # 1e-3.
    others = tl.where(sums == 0.0, float("-inf"), (shift - z_label) + tl.log(tl.where(sums == 0.0, 1.0, sums)))
    logps = -(tl.maximum(others, 0.0) + _log1p(tl.exp(-tl.abs(others))))
    logps += z_label - z_label  # NaN where z_label is NaN or infinite
    tl.store(logps_ptr + offs_n, tl.where(z_label == float("-inf"), float("-inf"), logps), mask=row_mask)


@triton.jit
def _log1p(x):
    """`log(1 + x)` for x >= 0 to a few ulp, where `1 + x` alone would lose a small x.

    Source: W. Kahan's correction, in D. Goldberg, "What every computer scientist should know about floating-point
    arithmetic", theorem 4.
    """
    u = 1.0 + x
    rounded = u - 1.0
    return tl.where(rounded == 0.0, x, tl.log(u) * (x / tl.where(rounded == 0.0, 1.0, rounded)))
