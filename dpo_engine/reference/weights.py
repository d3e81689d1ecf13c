"""Which weights is a reference made of? A digest of the tensors themselves, as they lie in memory.

Not of the files they came from: a model can be changed after it was loaded, and a file can be replaced without its size or
time of change showing it. SHA-256 runs at the speed of a disk or more on every core, so that asking the tensors costs less
than loading them did.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.errors import CacheError


def weights_digest(model: nn.Module, *, with_adapters: bool = False, adapter: str | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all that a state dict holds, as hex.

    Args:
        model: the causal language model; PEFT may have put adapters into it.
        with_adapters: False leaves adapters out and names every tensor as in the model without them, so that the digest is that
            of the model before PEFT wrapped it.
        adapter: of several adapters, the one that counts; None for all.

    Raises:
        CacheError: a tensor is not here (offloaded, or sharded over ranks), or adapters are merged into the weights under them.
    """
    return _digest(dict(saved_tensors(model, with_adapters, adapter)))


def buffers_digest(model: nn.Module, *, with_adapters: bool = False) -> str:
    """The same over buffers that are not saved, such as rope frequencies and position tables.

    A rope that changes its own with the rows it sees (dynamic NTK) is left out: its config alone says what it is.
    """
    saved = dict(saved_tensors(model, with_adapters))
    return _digest({name: buffer for name, buffer in _buffers(model, with_adapters) if name not in saved})


def _digest(tensors: dict[str, Tensor]) -> str:
    seen: dict[tuple[int, tuple[int, ...], torch.dtype], int] = {}
    firsts: list[Tensor] = []
    for tensor in tensors.values():  # tied weights are read once
        if seen.setdefault(_identity(tensor), len(firsts)) == len(firsts):
            firsts.append(tensor)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter's lock
        digests = list(pool.map(_tensor_digest, firsts))
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        whole.update(digests[seen[_identity(tensor)]])
    return whole.hexdigest()


def _identity(tensor: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr() if tensor.numel() else id(tensor), tuple(tensor.shape), tensor.dtype


def saved_tensors(model: nn.Module, with_adapters: bool, adapter: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` would save, by name, what quantisation keeps beside its weights included."""
    others = set(getattr(model, "peft_config", {})) - {adapter} if adapter is not None else set()
    for prefix, module in _modules(model, "", with_adapters):
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, prefix, keep_vars=True)
        for name, value in own.items():
            if isinstance(value, Tensor) and not _is_of(others, name):
                yield name, _here(name, value)


def _is_of(adapters: set[str], name: str) -> bool:
    """Whether a tensor belongs to one of these adapters, which are keys under PEFT's dictionaries of layers."""
    parts = name.split(".")
    return any(
        part in adapters and (holder.startswith("lora_") or holder == "modules_to_save")
        for holder, part in itertools.pairwise(parts)
    )


def _buffers(model: nn.Module, with_adapters: bool) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in _modules(model, "", with_adapters):
        if "dynamic" not in str(getattr(module, "rope_type", "")):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield prefix + name, _here(prefix + name, buffer)


def _modules(module: nn.Module, prefix: str, with_adapters: bool) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name and a dot; without adapters, those under them, named as if there were none."""
    if not with_adapters:
        module = _under_adapters(module, prefix)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.", with_adapters)


def _under_adapters(module: nn.Module, prefix: str) -> nn.Module:
    """The layer that PEFT wrapped, or the module itself."""
    if "peft" not in sys.modules:
        return module
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise CacheError(
                    f"adapters are merged into the weights under them ({prefix.removesuffix('.')}), which are therefore not the "
                    "reference's; call unmerge_adapter() first, or set reference_cache: off"
                )
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
