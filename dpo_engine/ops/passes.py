"""Which functions does a backend's name stand for?

A backend is what happens to a tile between two of the vendor's matrix products, and, where it has them, kernels that do
the products too. Plain torch and Triton take the same arguments and give the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_engine.errors import BackendError
from dpo_engine.ops.backends import possible_backends
from dpo_engine.ops.choice import choose_backend
from dpo_engine.ops.tile_pass import tile_backward, tile_pass


@dataclass(frozen=True)
class TilePasses:
    """What a backend does to a tile of raw logits."""

    forward: Callable[..., Tensor] = tile_pass
    backward: Callable[..., None] = tile_backward
    product: Callable[..., Tensor] | None = None
    """GEMM and forward pass in one kernel; it knows neither LoRA nor extras."""
    logps: Callable[..., Tensor] | None = None
    """The whole forward without gradients in one kernel, likewise."""


TORCH_PASSES = TilePasses()


def passes_for(
    backend: str, device: torch.device, dtype: torch.dtype, head_shape: tuple[int, int], task: str
) -> TilePasses:
    """The functions of a backend, "auto" being what was measured for the task.

    Args:
        backend: "auto", "tiled", "triton" or "triton_epilogue".
        head_shape: (V, D).
        task: "no_gradient", "frozen" or "trainable".

    Raises:
        BackendError: a backend was named that cannot run here.
    """
    if backend == "auto":
        vocabulary, depth = head_shape
        backend = choose_backend(device, dtype, depth, vocabulary, task)
    if backend == "tiled":
        return TORCH_PASSES
    reason = possible_backends(device, dtype)[backend]
    if reason is not None:
        raise BackendError(f'linear_logps: backend="{backend}" was asked for, but {reason}; use backend="tiled"')
    from dpo_engine.kernels.lse_forward import logps_forward
    from dpo_engine.kernels.tile_pass import tile_backward as triton_backward
    from dpo_engine.kernels.tile_pass import tile_pass as triton_pass

    passes = TilePasses(forward=triton_pass, backward=triton_backward, logps=logps_forward)
    if backend == "triton_epilogue":
        from dpo_engine.kernels.exp_epilogue import product_and_pass

        passes = replace(passes, product=product_and_pass)
    return passes
