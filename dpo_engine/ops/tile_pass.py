"""What happens to one tile of logits between two matrix products, in plain torch?

These are the twins of the Triton kernels in `kernels/tile_pass.py`: same arguments, same results, any device.

The exponentials of row i are taken relative to a row constant `c_i`. It starts as the logit of the row's own label,
which is known before any tile, so in nearly every row no tile ever changes it: no running maximum, no rescaling of what
was summed before. Only where some logit exceeds it by more than `margin` nats does it move, and then `rescale` says by
what factor everything summed so far must be multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_engine.ops.head import softcap_slope


def tile_pass(
    tile: Tensor,
    labels: Tensor,
    constants: Tensor,
    sums: Tensor,
    first_column: int,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    margin: float,
    out: Tensor | None,
    moments: Tensor | None = None,
) -> Tensor:
    """`E = exp(z - c) * dz/dx` and `S += sum(exp(z - c))`, the label's own column left out of both.

    Args:
        tile: (R, C) raw products `hidden @ weight[first_column : first_column + C].T` in the accumulation dtype;
            overwritten.
        labels: (R,) int64, vocabulary ids.
        constants: (R,) running `c`, updated in place; -inf where none is known yet.
        sums: (R,) running `S = sum_{v != label} exp(z_v - c)`, updated in place, summed before any rounding.
        first_column: vocabulary id of the tile's first column.
        bias: (C,) or None.
        margin: nats by which a logit may exceed `c` before `c` moves.
        out: (R, C) E in the dtype of the next matrix product, may be `tile` itself; None where only `sums` is wanted.
        moments: (4, R) updated in place, or None where they are not wanted: the largest logit but the label's,
            `A = sum e (z - c)` and `Q = sum e**2` with `e = exp(z - c)` (the label left out), and the label's own logit
            by this tile's product. They start as -inf, 0, 0, -inf; `exp(2 margin)` must be finite.

    Returns:
        (R,) the factor by which a caller must multiply what it summed over earlier tiles; 1 where `c` did not move.
    """
    x, slope = logits_in_place(tile, bias, logit_scale, softcap, want_slope=out is not None)
    if moments is not None:
        inside = _inside(labels, first_column, x.shape[1])
        moments[3] = torch.where(inside, _at_labels(x, labels, first_column), moments[3])
    put_at_labels(x, labels, first_column, float("-inf"))
    maxima = x.amax(-1)
    moved = torch.where(maxima - constants > margin, maxima, constants)
    # -inf means that no logit was seen yet: nothing was summed, and exp(-inf - 0) is the zero that is wanted.
    rescale = torch.where(moved == constants, 1.0, torch.exp(constants - moved))
    shifted = x.sub_(torch.where(moved == float("-inf"), 0.0, moved)[:, None])
    if moments is not None:
        _move_moments(moments, maxima, sums, constants, moved, rescale)
        moments[1] += _sum_of_products(shifted.exp(), shifted)
    constants.copy_(moved)
    weights = shifted.exp_()
    if moments is not None:
        moments[2] += torch.linalg.vecdot(weights, weights)
    sums.mul_(rescale).add_(weights.sum(-1))
    if out is not None:
        if slope is not None:
            weights.mul_(slope)
        if out is not weights:
            out.copy_(weights)
    return rescale


def tile_backward(
    tile: Tensor,
    labels: Tensor,
    constants: Tensor,
    row_weights: Tensor,
    label_weights: Tensor,
    first_column: int,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    out: Tensor,
) -> None:
    """`out = d(sum_i g_i * logp_i) / d(raw products)` for one tile.

    `out[i, v] = -row_weights[i] * exp(z_iv - c_i) * dz/dx` in every column but the label's, which holds
    `label_weights[i]`.

    Args:
        tile, labels, constants, first_column, bias: as for `tile_pass`; `constants` is read only.
        row_weights: (R,) `g * logit_scale / (S + t)`.
        label_weights: (R,) `g * logit_scale * dz/dx at the label * S / (S + t)`: one minus the probability without
            cancellation.
        out: (R, C) in the dtype of the next matrix product, may be `tile` itself.
    """
    x, slope = logits_in_place(tile, bias, logit_scale, softcap, want_slope=True)
    weights = x.sub_(constants[:, None]).exp_()
    if slope is not None:
        weights.mul_(slope)
    weights.mul_(-row_weights[:, None])
    put_at_labels(weights, labels, first_column, label_weights)
    if out is not weights:
        out.copy_(weights)


def logits_in_place(
    tile: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, *, want_slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Turn raw products into logits; also the slope of the softcap, where there is one and it is wanted."""
    if bias is not None:
        tile += bias
    if logit_scale != 1.0:
        tile *= logit_scale
    if softcap is None:
        return tile, None
    slope = softcap_slope(tile, softcap) if want_slope else None
    tile.div_(softcap).tanh_().mul_(softcap)
    return tile, slope


def _move_moments(
    moments: Tensor, maxima: Tensor, sums: Tensor, constants: Tensor, moved: Tensor, rescale: Tensor
) -> None:
    """Make what was summed relative to `constants` relative to `moved`, and take the tile's maxima in."""
    moments[0] = torch.maximum(moments[0], maxima)
    # Where nothing was summed yet there is nothing to move, and `constants` may be -inf.
    by = torch.where(sums == 0, 0.0, constants - moved)
    moments[1] = rescale * (moments[1] + sums * by)
    moments[2] *= rescale * rescale


def _sum_of_products(weights: Tensor, shifted: Tensor) -> Tensor:
    """(R,) `sum e (z - c)` where `e` is not 0: an impossible id would be 0 * -inf. `weights` is overwritten."""
    impossible = weights == 0
    return weights.mul_(shifted).masked_fill_(impossible, 0.0).sum(-1)


def put_at_labels(tile: Tensor, labels: Tensor, first_column: int, value: float | Tensor) -> None:
    """`tile[i, labels[i] - first_column] = value[i]` in rows whose label lies in the tile, without a device sync."""
    inside = _inside(labels, first_column, tile.shape[1])
    columns = (labels - first_column).clamp(0, tile.shape[1] - 1)[:, None]
    # where() keeps the old entry of rows whose label is elsewhere, and takes a number without a copy to the device.
    wanted = torch.where(inside, value, _at_labels(tile, labels, first_column))
    tile.scatter_(1, columns, wanted[:, None])


def _inside(labels: Tensor, first_column: int, columns: int) -> Tensor:
    """(R,) whether the row's label lies in the tile."""
    return (labels >= first_column) & (labels < first_column + columns)


def _at_labels(tile: Tensor, labels: Tensor, first_column: int) -> Tensor:
    """(R,) the entry at the row's label, or at the tile's nearest edge where the label lies elsewhere."""
    columns = (labels - first_column).clamp(0, tile.shape[1] - 1)
    return tile.gather(1, columns[:, None]).squeeze(1)
