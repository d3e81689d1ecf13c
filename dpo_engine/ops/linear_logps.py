"""The operator: log-prob of each label under a linear head, without building the logits."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from dpo_engine.errors import BackendError
from dpo_engine.ops.autograd import FrozenHeadLogps, TrainableHeadLogps
from dpo_engine.ops.head import Head
from dpo_engine.ops.reference import logps_by_definition
from dpo_engine.ops.tiled import TORCH_PASSES, TilePasses, logps_only

BACKENDS = ("auto", "reference", "tiled", "triton")


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    backend: str = "auto",
) -> Tensor:
    """`log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)))[..., labels]` without the (..., V) logits.

    `softcap(x) = softcap * tanh(x / softcap)`. No label is shifted: `hidden[i]` predicts `labels[i]`.

    GEMMs of size 2·N·V·D: 1 without gradients; 2, both in forward, where `weight` and `bias` are frozen; 1 + 3 where
    they train. Rows whose label is `ignore_index` enter none of them. Extra memory is a tile, not N·V
    (`docs/operator.md`). Exponentials and sums are float32 whatever the dtype, and so is the matrix product's result,
    except for bfloat16 on a CPU with bfloat16 instructions, whose GEMM can only return bfloat16: there a log-prob may
    be off by as much as plain torch's. Under autocast, `hidden`, `weight` and `bias` are rounded to the autocast dtype
    as `torch.nn.functional.linear` would, the weight slab by slab.

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64; any strides.
        weight: (V, D), same dtype (any of them under autocast); any strides.
        labels: (...) integer ids in `[0, V)`, or `ignore_index`.
        bias: (V,), same dtype.
        logit_scale: finite number that multiplies the logits, before the softcap.
        softcap: positive number, or None for none.
        ignore_index: label of rows to leave out; None says that every row counts, and spares a GPU from being asked.
        backend: "auto" (the measured choice of this device; "tiled" until there is one), "reference" (the definition,
            which builds the logits), "tiled" (plain torch, any device) or "triton".

    Returns:
        (...) float32 (float64 for float64 inputs), exactly 0 where the label is `ignore_index`. Differentiable once, in
        `hidden`, `weight` and `bias`; the gradient of ignored rows is exactly 0, whatever they hold.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a label outside `[0, V)` (checked on CPU; a
        device
            assertion elsewhere), `softcap <= 0`, an unknown backend.
        BackendError: a backend was forced that cannot run here.

    Source: derivation in `docs/operator.md`.
    """
    _check(hidden, weight, labels, bias, logit_scale, softcap, backend)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        given = f"hidden {hidden.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ValueError(f"linear_logps: {given}; outside autocast they must have one dtype: cast one of them")
    else:
        dtype = hidden.dtype
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    scored = None if ignore_index is None else _scored_rows(flat_labels, ignore_index)
    if scored is not None:
        flat, flat_labels = flat.index_select(0, scored), flat_labels.index_select(0, scored)
    if device == "cpu" and flat_labels.numel():
        _check_labels(flat_labels, weight.shape[0], ignore_index)
    with torch.autocast(device, enabled=False):
        logps = _logps(flat, weight, bias, float(logit_scale), softcap, flat_labels, dtype, backend)
    if scored is not None:
        logps = logps.new_zeros(labels.numel()).index_copy(0, scored, logps)
    return logps.view(labels.shape)


def _logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    labels: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The path for one flat set of scored rows: by backend, then by what trains."""
    if backend == "reference":
        cast = Head(
            weight=weight.to(dtype),
            bias=None if bias is None else bias.to(dtype),
            logit_scale=logit_scale,
            softcap=softcap,
        )
        return logps_by_definition(hidden.to(dtype), cast, labels)
    passes = _triton_passes(hidden) if backend == "triton" else TORCH_PASSES
    head = Head(weight=weight, bias=bias, logit_scale=logit_scale, softcap=softcap)
    trains = torch.is_grad_enabled()
    if trains and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return TrainableHeadLogps.apply(hidden, weight, bias, logit_scale, softcap, labels, dtype, passes)
    if trains and hidden.requires_grad:
        return FrozenHeadLogps.apply(hidden, head, labels, dtype, passes)
    if backend == "triton":
        from dpo_engine.kernels.lse_forward import logps_forward

        rounded_bias = None if bias is None else bias.to(dtype)
        return logps_forward(hidden.to(dtype), weight.to(dtype), labels, rounded_bias, logit_scale, softcap)
    return logps_only(hidden, head, labels, dtype, passes).logps()


def _triton_passes(hidden: Tensor) -> TilePasses:
    """The Triton tile passes, or the reason why they cannot run here."""
    if importlib.util.find_spec("triton") is None:
        raise BackendError(
            'linear_logps: backend="triton" was asked for, but triton is not installed; use backend="tiled"'
        )
    if hidden.dtype == torch.float64:
        raise BackendError('linear_logps: backend="triton" takes no float64; use backend="tiled"')
    from triton import knobs

    if not hidden.is_cuda and not knobs.runtime.interpret:
        raise BackendError(
            f'linear_logps: backend="triton" was asked for, but the tensors are on {hidden.device}; it needs a CUDA '
            'device (or TRITON_INTERPRET=1, for tests); use backend="tiled"'
        )
    from dpo_engine.kernels.tile_pass import tile_backward, tile_pass

    return TilePasses(forward=tile_pass, backward=tile_backward)


def _scored_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that count, None where all of them do."""
    scored = labels != ignore_index
    return None if bool(scored.all()) else scored.nonzero().squeeze(-1)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != labels.shape:
        raise ValueError(f"linear_logps: {shapes} do not fit; expected (..., D), (V, D), (...)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_logps: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}; expected (V,)"
        )
    devices = {str(t.device) for t in (hidden, weight, labels, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(
            f"linear_logps: tensors on {', '.join(sorted(devices))}; expected one device: move them together"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"linear_logps: hidden {hidden.dtype}, weight {weight.dtype}; expected floating-point tensors")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"linear_logps: labels are {labels.dtype}; expected integer vocabulary ids")
    if not math.isfinite(logit_scale):
        raise ValueError(f"linear_logps: logit_scale={logit_scale}; expected a finite number")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"linear_logps: softcap={softcap}; expected a positive number, or None for no softcap")
    if backend not in BACKENDS:
        raise ValueError(f"linear_logps: backend={backend!r}; expected one of {', '.join(BACKENDS)}")


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    lowest, highest = (int(x) for x in labels.aminmax())
    if lowest < 0 or highest >= vocabulary:
        outside = lowest if lowest < 0 else highest
        raise ValueError(
            f"linear_logps: label {outside} is outside [0, {vocabulary}); "
            f"expected a vocabulary id or ignore_index={ignore_index}"
        )
