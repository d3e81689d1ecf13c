"""Which weights is a reference made of? A digest of the tensors themselves, as they lie in memory.

Not of the files they came from: a model can be changed after it was loaded, and a file can be replaced without its size or
time of change showing it. SHA-256 runs at the speed of a disk or more on every core, so that asking the tensors costs less
than loading them did.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.errors import CacheError


def weights_digest(model: nn.Module, *, with_adapters: bool = False) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and persistent buffers, as hex.

    Args:
        model: the causal language model; PEFT may have put adapters into it.
        with_adapters: False leaves adapters out and names every tensor as in the model without them, so that the digest is that
            of the model before PEFT wrapped it.

    Raises:
        CacheError: a tensor is not here (offloaded, or sharded over ranks).
    """
    tensors = list(reference_tensors(model, with_adapters))
    seen: dict[tuple[int, tuple[int, ...], torch.dtype], int] = {}
    firsts: list[Tensor] = []
    for _, tensor in tensors:  # tied weights are read once
        if seen.setdefault(_identity(tensor), len(firsts)) == len(firsts):
            firsts.append(tensor)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter's lock
        digests = list(pool.map(_tensor_digest, firsts))
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        whole.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        whole.update(digests[seen[_identity(tensor)]])
    return whole.hexdigest()


def _identity(tensor: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr() if tensor.numel() else id(tensor), tuple(tensor.shape), tensor.dtype


def reference_tensors(module: nn.Module, with_adapters: bool, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` would save, by name, what quantisation keeps beside its weights included."""
    if not with_adapters:
        module = _under_adapters(module)
    own: dict[str, Any] = {}
    module._save_to_state_dict(own, prefix, keep_vars=True)
    for name, value in own.items():
        if isinstance(value, Tensor):
            yield name, _here(name, value)
    for name, child in module._modules.items():
        if child is not None:
            yield from reference_tensors(child, with_adapters, f"{prefix}{name}.")


def _under_adapters(module: nn.Module) -> nn.Module:
    """The layer that PEFT wrapped, or the module itself."""
    if "peft" not in sys.modules:
        return module
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.base_layer
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _here(name: str, tensor: Tensor) -> Tensor:
    is_partition = type(tensor).__name__ == "DTensor" or hasattr(tensor, "ds_id")  # FSDP2's, DeepSpeed's
    if tensor.is_meta or is_partition:
        where = "offloaded" if tensor.is_meta else "sharded over ranks"
        raise CacheError(
            f"the reference's weights cannot be read to address its log-probs: {name} is {where}; set reference_cache: off"
        )
    return tensor.detach()


def _tensor_digest(tensor: Tensor) -> bytes:
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).digest()
