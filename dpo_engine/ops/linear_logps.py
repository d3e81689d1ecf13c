"""The operator: log-prob of each label under a linear head, without building the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from dpo_engine.ops.backends import NAMES
from dpo_engine.ops.head import Head, Rows
from dpo_engine.ops.reference import logits_by_definition
from dpo_engine.ops.registered import check_labels, forward_op
from dpo_engine.ops.statistics import EXTRAS, TokenExtras, extras_by_definition, named_extras
from dpo_engine.ops.weights import DenseWeight, is_quantised, quantised_weight

BACKENDS = ("auto", *NAMES)


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    backend: str = "auto",
    *,
    temperature: float = 1.0,
    lora: tuple[Tensor, Tensor] | None = None,
    extras: Sequence[Literal["entropy", "log_sum_squares", "is_top1"]],
) -> tuple[Tensor, TokenExtras]: ...


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    backend: str = "auto",
    *,
    temperature: float = 1.0,
    lora: tuple[Tensor, Tensor] | None = None,
    extras: tuple[()] = (),
) -> Tensor: ...


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    backend: str = "auto",
    *,
    temperature: float = 1.0,
    lora: tuple[Tensor, Tensor] | None = None,
    extras: Sequence[str] = (),
) -> Tensor | tuple[Tensor, TokenExtras]:
    """`log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature)[..., labels]` without the logits.

    `softcap(x) = softcap * tanh(x / softcap)`. No label is shifted: `hidden[i]` predicts `labels[i]`.

    GEMMs of size 2·N·V·D: 1 without gradients; 2, both in forward, where `weight` and `bias` are frozen; 1 + 3 where
    they train; 2 + 1 with LoRA on a frozen weight. Rows whose label is `ignore_index` enter none of them. Extra memory
    is a tile, not N·V (`docs/operator.md`). Exponentials and sums are float32 whatever the dtype, and so is the matrix
    product's result, except for bfloat16 on a CPU with bfloat16 instructions, whose GEMM can only return bfloat16:
    there a log-prob may be off by as much as plain torch's. Under autocast, `hidden`, `weight`, `bias` and `lora` are
    rounded to the autocast dtype as `torch.nn.functional.linear` would, the weight slab by slab. On one device and
    backend the same inputs give the same bits.

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64; any strides.
        weight: (V, D), same dtype (any of them under autocast); any strides. Also a `DTensor`, which is gathered, its
            gradient averaged over the mesh as FSDP2 does; and a weight that bitsandbytes quantised to 4 or 8 bits,
            frozen, which is dequantised slab by slab.
        labels: (...) integer ids in `[0, V)`, or `ignore_index`.
        bias: (V,), same dtype.
        logit_scale: finite number that multiplies the logits, before the softcap.
        softcap: positive number, or None for none.
        ignore_index: label of rows to leave out; None says that every row counts, and spares a GPU from being asked.
        backend: "auto" (what `dpo-engine doctor` measured to be fastest on this device; "tiled" until it has),
            "reference" (the definition, which builds the logits), "tiled" (plain torch, any device), "triton" or
            "triton_epilogue" (the same with matrix products that end in the exponential).
        temperature: positive number that divides the logits, after the softcap.
        lora: `(lora_hidden (..., r), lora_weight (V, r))`: adds `lora_hidden @ lora_weight.T` to `hidden @ weight.T`.
            `lora_hidden` is `scaling * hidden @ A.T`; autograd takes the gradient on to A.
        extras: names of `TokenExtras` to compute beside: "entropy", "log_sum_squares", "is_top1".

    Returns:
        (...) float32 (float64 for float64 inputs), exactly 0 where the label is `ignore_index`. Differentiable once, in
        `hidden`, `weight`, `bias` and `lora`; the gradient of ignored rows is exactly 0, whatever they hold. With
        `extras`, `(log-probs, TokenExtras)`: each (...), without gradient, 0 (False) at ignored rows.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a label outside `[0, V)` (checked on CPU; a
            device assertion or NaN elsewhere), `softcap <= 0`, `temperature <= 0`, an unknown backend or extra.
        BackendError: a backend was forced that cannot run here; vmap.

    Source: derivation in `docs/operator.md`.
    """
    weight = gathered(weight)
    quantised = quantised_weight(weight) if is_quantised(weight) else None
    head_shape = check_call(hidden, weight, labels, bias, lora, logit_scale, softcap, temperature, backend, extras)
    scale, cap = logit_scale / temperature, None if softcap is None else softcap / temperature
    dtype = common_dtype(hidden, None if quantised else weight, bias, lora)
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    lora_hidden, lora_weight = None, None
    if lora is not None:
        lora_hidden, lora_weight = lora[0].reshape(flat_labels.numel(), lora[0].shape[-1]), lora[1]
    shape = labels.shape
    if backend == "reference":
        rows = Rows(hidden=flat, labels=flat_labels, lora_hidden=lora_hidden)
        dense = DenseWeight(weight if quantised is None else quantised.slab(0, head_shape[0]))
        head = Head(weight=dense, bias=bias, lora_weight=lora_weight, logit_scale=scale, softcap=cap)
        logps, stacked = _by_definition(rows, head, dtype, ignore_index, with_extras=bool(extras))
    else:
        logps, _, _, _, stacked = forward_op(
            flat, weight if quantised is None else quantised.packed, flat_labels, bias, lora_hidden, lora_weight,
            [] if quantised is None else quantised.parts(), "" if quantised is None else quantised.layout(),
            float(scale), cap, ignore_index, dtype, backend,
            _kept_for_backward(flat, weight, bias, lora_hidden, lora_weight), bool(extras),
        )  # fmt: skip
    if not extras:
        return logps.view(shape)
    return logps.view(shape), named_extras(stacked.detach(), tuple(extras), shape)


def _kept_for_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_hidden: Tensor | None, lora_weight: Tensor | None
) -> str:
    """What the forward has to keep, by what takes a gradient: a word of `registered`."""

    def trains(x: Tensor | None) -> bool:
        return x is not None and x.requires_grad

    if not torch.is_grad_enabled():
        return "nothing"
    if trains(weight) or trains(bias):
        return "statistics"
    if trains(hidden) or trains(lora_hidden):
        return "unit"
    return "statistics" if trains(lora_weight) else "nothing"


def _by_definition(
    rows: Rows, head: Head, dtype: torch.dtype, ignore_index: int | None, *, with_extras: bool
) -> tuple[Tensor, Tensor]:
    """`(log-probs (N,), extras (3, N))` from the logits, by ordinary autograd."""
    index = None if ignore_index is None else (rows.labels != ignore_index).nonzero().squeeze(-1)
    scored = rows if index is None else rows.at(index)
    check_labels(scored.labels, head.weight.shape[0], ignore_index)

    def cast(x: Tensor | None) -> Any:
        return None if x is None else x.to(dtype)

    with torch.autocast(rows.hidden.device.type, enabled=False):
        logits = logits_by_definition(
            Rows(hidden=cast(scored.hidden), labels=scored.labels, lora_hidden=cast(scored.lora_hidden)),
            Head(
                weight=DenseWeight(cast(head.weight.slab(0, head.weight.shape[0]))),
                bias=cast(head.bias),
                lora_weight=cast(head.lora_weight),
                logit_scale=head.logit_scale,
                softcap=head.softcap,
            ),
        )
        logps = logits.log_softmax(-1).gather(-1, scored.labels[:, None]).squeeze(-1)
        extras = extras_by_definition(logits.detach(), scored.labels) if with_extras else logps.new_empty(3, 0)
    if index is None:
        return logps, extras
    if with_extras:
        extras = extras.new_zeros(3, rows.count).index_copy(1, index, extras)
    return logps.new_zeros(rows.count).index_copy(0, index, logps), extras


def gathered(weight: Any) -> Tensor:
    """A `DTensor` as one whole tensor on every rank; anything else as it is.

    Ranks see different rows, so each has a part of the gradient: parts are averaged over the mesh, as FSDP2 averages
    the gradients of the layers that it gathers itself.
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial() for _ in range(mesh.ndim)])
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


def common_dtype(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, lora: tuple[Tensor, Tensor] | None
) -> torch.dtype:
    """What everything is rounded to: autocast's dtype, else the one dtype of all (a quantised weight has none)."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    lora_hidden, lora_weight = (None, None) if lora is None else lora
    named = {"weight": weight, "bias": bias, "lora_hidden": lora_hidden, "lora_weight": lora_weight}
    others = {name: x.dtype for name, x in named.items() if x is not None}
    if any(dtype != hidden.dtype for dtype in others.values()):
        given = ", ".join(f"{name} {dtype}" for name, dtype in {"hidden": hidden.dtype, **others}.items())
        raise ValueError(f"linear_logps: {given}; outside autocast they must have one dtype: cast one of them")
    return hidden.dtype


def check_call(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    extras: Sequence[str],
) -> tuple[int, ...]:
    """Refuse what does not fit together, by `ValueError`; gives (V, D)."""
    head_shape = quantised_weight(weight).shape if is_quantised(weight) else tuple(weight.shape)
    _check_tensors(hidden, weight, head_shape, labels, bias, lora)
    _check_options(logit_scale, softcap, temperature, backend, extras)
    return head_shape


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    head_shape: tuple[int, ...],
    labels: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(head_shape)}, labels {tuple(labels.shape)}"
    fits = len(head_shape) == 2 and hidden.ndim >= 1 and hidden.shape[-1] == head_shape[1]
    if not fits or hidden.shape[:-1] != labels.shape:
        raise ValueError(f"linear_logps: {shapes} do not fit; expected (..., D), (V, D), (...)")
    if bias is not None and tuple(bias.shape) != (head_shape[0],):
        raise ValueError(
            f"linear_logps: bias {tuple(bias.shape)} does not fit weight {tuple(head_shape)}; expected (V,)"
        )
    others = [("weight", weight), ("labels", labels), ("bias", bias)]
    if lora is not None:
        _check_lora(hidden, head_shape, lora)
        others += [("lora_hidden", lora[0]), ("lora_weight", lora[1])]
    for name, tensor in others:
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"linear_logps: hidden is on {hidden.device}, {name} on {tensor.device}; "
                "expected one device: move them together"
            )
    dense = not is_quantised(weight)
    if not hidden.is_floating_point() or (dense and not weight.is_floating_point()):
        raise ValueError(f"linear_logps: hidden {hidden.dtype}, weight {weight.dtype}; expected floating-point tensors")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"linear_logps: labels are {labels.dtype}; expected integer vocabulary ids")


def _check_lora(hidden: Tensor, head_shape: tuple[int, ...], lora: tuple[Tensor, Tensor]) -> None:
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        raise ValueError(f"linear_logps: lora is a {type(lora).__name__}; expected (lora_hidden, lora_weight)")
    lora_hidden, lora_weight = lora
    fits = lora_weight.ndim == 2 and lora_weight.shape[0] == head_shape[0] and lora_hidden.ndim == hidden.ndim
    if not fits or lora_hidden.shape != (*hidden.shape[:-1], lora_weight.shape[1]):
        raise ValueError(
            f"linear_logps: lora {tuple(lora_hidden.shape)} and {tuple(lora_weight.shape)} do not fit hidden "
            f"{tuple(hidden.shape)} and weight {tuple(head_shape)}; expected (..., r) and (V, r)"
        )


def _check_options(
    logit_scale: float, softcap: float | None, temperature: float, backend: str, extras: Sequence[str]
) -> None:
    if not math.isfinite(logit_scale):
        raise ValueError(f"linear_logps: logit_scale={logit_scale}; expected a finite number")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"linear_logps: softcap={softcap}; expected a positive number, or None for no softcap")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"linear_logps: temperature={temperature}; expected a positive number")
    if backend not in BACKENDS:
        raise ValueError(f"linear_logps: backend={backend!r}; expected one of {', '.join(BACKENDS)}")
    if isinstance(extras, str) or any(name not in EXTRAS for name in extras):
        raise ValueError(f"linear_logps: extras={extras!r}; expected a tuple of names among {', '.join(EXTRAS)}")
