"""Where does a slab of the head's weight come from? From a tensor, or out of a quantised one, a slab at a time.

Both kinds answer the same three questions: `shape`, `slab(first, last)` and `rows(index)`. A quantised weight is never
dequantised whole: at V=128256, D=4096 that would be the gigabyte that quantising it saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Slabs of a quantised weight start at multiples of this many rows, so that they start at a block of its scales.
SLAB_MULTIPLE = 256


@dataclass(frozen=True)
class DenseWeight:
    tensor: Tensor  # (V, D)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the slabs that are given out without a copy; None where every slab is a copy."""
        return self.tensor.dtype

    def slab(self, first: int, last: int) -> Tensor:
        return self.tensor[first:last]

    def rows(self, index: Tensor) -> Tensor:
        """`weight[index]`, (N, D)."""
        return self.tensor.index_select(0, index)


@dataclass(frozen=True, kw_only=True)
class QuantisedWeight:
    """A weight as bitsandbytes stores it: blocks of 4 bits with a scale each, or rows of 8 bits with a scale each."""

    kind: str  # "nf4", "fp4" or "int8"
    shape: tuple[int, int]  # (V, D)
    packed: Tensor  # uint8, two numbers a byte; int8 (V, D)
    scales: Tensor  # 4 bits: a number a block, float32, or uint8 if nested; 8 bits: (V,) float32
    block: int = 0  # numbers to a scale
    nested: tuple[Tensor, ...] = field(
        default=()
    )  # (code (256,), scales, offset ()) of the scales, where they are quantised too
    nested_block: int = 0
    stored: torch.dtype = torch.float32  # what bitsandbytes rounds to

    dtype = None

    def slab(self, first: int, last: int) -> Tensor:
        depth = self.shape[1]
        if self.kind == "int8":
            return self._scaled(self.packed[first:last], self.scales[first:last])
        packed = self.packed.view(-1)[first * depth // 2 : -(-last * depth // 2)]
        blocks = torch.arange(first * depth // self.block, -(-last * depth // self.block), device=packed.device)
        return self._unpacked(packed, self._block_scales(blocks), last - first)

    def rows(self, index: Tensor) -> Tensor:
        if self.kind == "int8":
            return self._scaled(self.packed.index_select(0, index), self.scales.index_select(0, index))
        per_row = self.shape[1] // self.block
        packed = self.packed.view(self.shape[0], -1).index_select(0, index).view(-1)
        blocks = index[:, None] * per_row + torch.arange(per_row, device=index.device)
        return self._unpacked(packed, self._block_scales(blocks.view(-1)), index.numel())

    def _block_scales(self, blocks: Tensor) -> Tensor:
        """float32 scales of those blocks: `code[q] * nested_scale + offset` where they are quantised themselves."""
        scales = self.scales.index_select(0, blocks)
        if not self.nested:
            return scales
        code, nested_scales, offset = self.nested
        return code[scales.long()] * nested_scales.index_select(0, blocks // self.nested_block) + offset

    def _unpacked(self, packed: Tensor, scales: Tensor, rows: int) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            absmax=scales.float(),
            shape=torch.Size((rows, self.shape[1])),
            dtype=self.stored,
            blocksize=self.block,
            quant_type=self.kind,
        )
        # A column of bytes: bitsandbytes takes a row of them for a transposed weight.
        return dequantize_4bit(packed.reshape(-1, 1), state)

    @staticmethod
    def _scaled(packed: Tensor, scales: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(packed, scales)

    # ---- as plain tensors, texts and numbers, for a registered operator ----

    def parts(self) -> list[Tensor]:
        return [self.scales, *self.nested]

    def layout(self) -> str:
        stored = str(self.stored).removeprefix("torch.")
        return f"{self.kind} {self.shape[0]} {self.shape[1]} {self.block} {self.nested_block} {stored}"


HeadWeight = DenseWeight | QuantisedWeight


def is_quantised(weight: Any) -> bool:
    """Whether bitsandbytes stored this weight in 4 or 8 bits."""
    return getattr(weight, "quant_state", None) is not None or getattr(weight, "SCB", None) is not None


def quantised_weight(weight: Any) -> QuantisedWeight:
    """The weight of a `bitsandbytes.nn.Linear4bit` or `Linear8bitLt`, without a copy.

    Args:
        weight: a `Params4bit` or `Int8Params` that was quantised (moved to its device).

    Raises:
        ValueError: a layout that cannot be read in slabs.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        if weight.ndim != 2 or weight.dtype != torch.int8:
            raise ValueError(
                f"quantised head: an 8-bit weight of {tuple(weight.shape)} {weight.dtype}; expected (V, D) int8"
            )
        return QuantisedWeight(kind="int8", shape=tuple(weight.shape), packed=weight.data, scales=weight.SCB.float())
    shape = tuple(state.shape)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "quantised head: the weight was repacked for inference on this CPU; expected bitsandbytes' ordinary layout: "
            "load the model anew and train before generating"
        )
    if len(shape) != 2 or shape[1] % state.blocksize or weight.numel() * 2 != math.prod(shape):
        raise ValueError(
            f"quantised head: shape {shape} in blocks of {state.blocksize}; "
            "expected (V, D) with D a multiple of the block, two numbers a byte"
        )
    nested: tuple[Tensor, ...] = ()
    if state.nested:
        nested = (state.state2.code, state.state2.absmax, torch.as_tensor(state.offset, device=weight.device))
    return QuantisedWeight(
        kind=state.quant_type,
        shape=(shape[0], shape[1]),
        packed=weight.data,
        scales=state.absmax,
        block=state.blocksize,
        nested=nested,
        nested_block=state.state2.blocksize if state.nested else 0,
        stored=state.dtype,
    )


def weight_from_parts(weight: Tensor, parts: list[Tensor], layout: str) -> HeadWeight:
    """What `QuantisedWeight.parts` and `.layout` came from; a plain weight where `layout` is empty."""
    if not layout:
        return DenseWeight(weight)
    kind, vocabulary, depth, block, nested_block, stored = layout.split()
    return QuantisedWeight(
        kind=kind,
        shape=(int(vocabulary), int(depth)),
        packed=weight,
        scales=parts[0],
        block=int(block),
        nested=tuple(parts[1:]),
        nested_block=int(nested_block),
        stored=getattr(torch, stored),
    )
