"""Where do the inputs of checkpointed layers wait for the backward pass? In host memory, if the device has better use for its own.

offloader = Offloader(device)
with checkpoints_offloaded(model, offloader):
    loss = model(...)                     # each checkpoint's input is copied to the host while the next layers compute
loss.backward()                           # and back, one layer before it is needed

A checkpoint keeps the hidden states that went into its layer, tokens x hidden numbers a layer, and these alone are moved: torch
saves them where hooks on saved tensors see them, and hides from such hooks what the layer itself computes. Copies run on
streams of their own, to and from pinned memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 64 * 1024
"""Smaller tensors are not worth a copy."""


class Offloader:
    """Moves tensors to the host and back.

    Args:
        device: where tensors are computed; others are left alone.
        least_bytes: smaller tensors are left alone.
    """

    def __init__(self, device: torch.device, least_bytes: int = LEAST_BYTES) -> None:
        self.device = device
        self.least_bytes = least_bytes
        self.moved = self.moved_bytes = 0  # so far
        self._last: Callable[[], _Moved | None] = lambda: None
        is_cuda = device.type == "cuda"
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if is_cuda else None

    def takes(self, tensor: Tensor) -> bool:
        """Whether a checkpoint's input is one to move: hidden states, no parameter or view of one, no mask, no index."""
        own = tensor if tensor._base is None else tensor._base
        return (
            tensor.is_floating_point()
            and tensor.requires_grad
            and not isinstance(own, nn.Parameter)
            and tensor.device.type == self.device.type
            and tensor.numel() * tensor.element_size() >= self.least_bytes
        )

    def move(self, tensor: Tensor) -> _Moved:
        """Begin to copy a tensor to the host."""
        moved = _Moved(tensor, self._streams, self._last)
        self._last = weakref.ref(moved)  # of what was moved before, the backward pass will ask next
        self.moved += 1
        self.moved_bytes += tensor.numel() * tensor.element_size()
        return moved


class _Moved:
    """A tensor that waits on the host."""

    def __init__(self, tensor: Tensor, streams: Any, before: Callable[[], _Moved | None]) -> None:
        self.device, self.streams, self.before = tensor.device, streams, before
        self.fetched: tuple[Tensor, Any] | None = None
        if streams is None:
            self.host = tensor.detach().to("cpu", copy=True)
            return
        out = streams[0]
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        out.wait_stream(torch.cuda.current_stream(self.device))  # the tensor is computed on it
        with torch.cuda.stream(out):
            self.host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(out)  # its memory is not given away before it is copied
        self.written = out.record_event()

    def fetch(self) -> None:
        """Begin to copy it back."""
        if self.streams is None or self.fetched is not None:
            return
        back = self.streams[1]
        back.wait_event(self.written)
        with torch.cuda.stream(back):
            tensor = self.host.to(self.device, non_blocking=True)
        self.fetched = tensor, back.record_event()

    def take(self) -> Tensor:
        """The tensor, on its device; what was moved before it starts on its way."""
        if self.streams is None:
            return self.host.to(self.device, copy=True)
        self.fetch()
        assert self.fetched is not None
        (tensor, copied), self.fetched = self.fetched, None
        before = self.before()
        if before is not None:
            before.fetch()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        tensor.record_stream(current)  # it was made on another
        return tensor


@contextmanager
def checkpoints_offloaded(model: nn.Module, offloader: Offloader | None) -> Iterator[None]:
    """Within it, what goes into the model's checkpointed layers waits on the host; None for not.

    The forward pass must lie within; the backward pass may, and computes layers anew without asking this.
    """
    name = "_gradient_checkpointing_func"  # where transformers keeps it, in every module that checkpoints
    if offloader is None:
        yield
        return
    held = [module for module in model.modules() if name in vars(module)]
    functions = [getattr(module, name) for module in held]
    for module, function in zip(held, functions, strict=True):
        setattr(module, name, partial(_checkpoint, function, offloader))
    try:
        yield
    finally:
        for module, function in zip(held, functions, strict=True):
            setattr(module, name, function)


def _checkpoint(function: Callable[..., Any], offloader: Offloader, layer: Any, *inputs: Any, **options: Any) -> Any:
    """`function(layer, *inputs)`, a checkpoint, whose inputs are moved as it saves them."""
    moving = {_identity(tensor) for tensor in inputs if isinstance(tensor, Tensor) and offloader.takes(tensor)}

    def pack(tensor: Tensor) -> Tensor | _Moved:
        return offloader.move(tensor) if _identity(tensor) in moving else tensor

    def unpack(packed: Tensor | _Moved) -> Tensor:
        return packed.take() if isinstance(packed, _Moved) else packed

    with saved_tensors_hooks(pack, unpack):
        return function(layer, *inputs, **options)


def _identity(tensor: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


def offloader_for(wanted: bool, device: torch.device) -> Offloader | None:
    """None where activations are on the host anyway, or are to stay where they are."""
    return Offloader(device) if wanted and device.type == "cuda" else None


def offload_lines(wanted: bool, device: torch.device) -> list[str]:
    """What is said at the start."""
    if not wanted:
        return []
    if device.type == "cuda":
        return [
            "activation_offload: the inputs of checkpointed layers wait for the backward pass in pinned host memory"
        ]
    return [f"activation_offload: nothing to do on {device.type}, where activations are in host memory already"]
