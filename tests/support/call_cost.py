"""What does a call of torch code cost: which matrix products, and how many bytes at its peak?

Both watch every operation that torch dispatches, backward too, so they count the same on any machine; the engine's own
registered operators are opened, and what is inside them is counted. What a library allocates inside one operation is
not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_engine.ops import registered

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}


def call_opened(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """`func(*args)`, the inside of the engine's own operators under `mode` too."""
    if func.namespace != "dpo_engine":
        return func(*args, **kwargs)
    inside = {"linear_logps": registered._forward, "linear_logps_backward": registered._backward}
    with mode:
        return inside[func.overloadpacket.__name__](*args, **kwargs)


class Products(TorchDispatchMode):
    """Multiply-add FLOPs of every matrix product within it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _PRODUCTS:
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return call_opened(self, func, args, kwargs or {})


class PeakBytes(TorchDispatchMode):
    """`peak`: the most bytes alive at once in storages that were made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            self._see(leaf, made_here=False)
        result = call_opened(self, func, args, kwargs)
        for leaf in tree_leaves(result):
            self._see(leaf, made_here=True)
        return result

    def _see(self, leaf: Any, *, made_here: bool) -> None:
        if not isinstance(leaf, torch.Tensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if made_here else 0
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size
