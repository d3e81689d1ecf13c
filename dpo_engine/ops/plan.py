"""How is one call cut into tiles, and what is multiplied in which dtype?

Sizes follow from the head and the device, never from the number of rows, so that a row's result does not depend on the
rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from dpo_engine.ops.head import Head, Rows
from dpo_engine.ops.weights import SLAB_MULTIPLE

ROW_MULTIPLE = 16  # row tiles are padded to this, so that a row's bits do not depend on how many rows came with it
# A tile must stay in a CPU's caches between the product that writes it and the pass that reads it: one of 16 MiB cost 1.3
# times as much as one of 8. Beside wide rows even that is much: (R, D) vectors and (C, D) slabs take of the same caches, so
# wide heads get half of either, a tile of 2 MiB.
TILE_ROWS = {"cpu": 1024, "cuda": 1024}
TILE_COLUMNS = {"cpu": 2048, "cuda": 8192}
WIDE = 1024
SLAB_BYTES = 16 << 20  # where a slab is a copy in another dtype, it is this large at most


@dataclass(frozen=True, kw_only=True)
class Slab:
    """A stretch of the vocabulary: rows `first` to `last` of the weight, in the GEMM's dtype."""

    first: int
    last: int
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,) in the accumulation dtype
    lora_weight: Tensor | None  # (C, r)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tile sizes and dtypes of one call, and the tile itself, made when first used."""

    rows: int
    columns: int
    rounded: torch.dtype  # what inputs are rounded to
    multiply: torch.dtype  # what the GEMM is given
    accumulate: torch.dtype
    margin: float
    device: torch.device

    @cached_property
    def _raw(self) -> Tensor:
        """One tile in the accumulation dtype."""
        return torch.empty(self.rows * self.columns, dtype=self.accumulate, device=self.device)

    @cached_property
    def _packed(self) -> Tensor:
        """One tile in the GEMM's dtype: the same memory where that is the same dtype."""
        return self._raw if self.multiply == self.accumulate else torch.empty_like(self._raw, dtype=self.multiply)

    def with_columns(self, columns: int) -> Plan:
        """The same plan with narrower slabs."""
        return replace(self, columns=columns)

    def row_tiles(self, rows: Rows) -> Iterator[tuple[slice, Rows]]:
        """`(which rows, those rows in the GEMM's dtype)`, the last tile padded with zero rows of label 0.

        A tile is contiguous whatever the strides of `hidden`, so that strides do not change a result either.
        """
        for start in range(0, rows.count, self.rows):
            span = slice(start, min(start + self.rows, rows.count))
            tile = rows.at(span)
            missing = -tile.count % ROW_MULTIPLE
            yield (
                span,
                Rows(
                    hidden=self._padded(tile.hidden, missing),
                    labels=torch.cat([tile.labels, tile.labels.new_zeros(missing)]) if missing else tile.labels,
                    lora_hidden=None if tile.lora_hidden is None else self._padded(tile.lora_hidden, missing),
                ),
            )

    def _padded(self, rows: Tensor, missing: int) -> Tensor:
        rows = self.cast(rows).contiguous()
        return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows

    def cast(self, x: Tensor) -> Tensor:
        """Rounded as plain torch would round it, in the GEMM's dtype."""
        return x.to(self.rounded).to(self.multiply)

    def slabs(self, head: Head) -> Iterator[Slab]:
        """The vocabulary, slab by slab. Drop each before asking for the next: it may be a copy."""
        vocabulary = head.weight.shape[0]
        for first in range(0, vocabulary, self.columns):
            last = min(first + self.columns, vocabulary)
            yield Slab(
                first=first,
                last=last,
                weight=self.cast(head.weight.slab(first, last)),
                bias=None if head.bias is None else head.bias[first:last].to(self.rounded).to(self.accumulate),
                lora_weight=None if head.lora_weight is None else self.cast(head.lora_weight[first:last]),
            )

    def at_labels(self, head: Head, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`(weight[labels] (N, D), lora_weight[labels] (N, r), bias[labels] (N,))`, rounded, in the accumulation dtype."""

        def exact(x: Tensor) -> Tensor:
            return x.to(self.rounded).to(self.accumulate)

        return (
            exact(head.weight.rows(labels)),
            None if head.lora_weight is None else exact(head.lora_weight.index_select(0, labels)),
            None if head.bias is None else exact(head.bias.index_select(0, labels)),
        )

    def tile(self, rows: Rows, slab: Slab, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw logits in the accumulation dtype, and where their exponentials go: the same memory if the dtype is the same.

        Args:
            out: (R, C) in the GEMM's dtype, to keep the exponentials in; by default the next tile overwrites them.
        """
        shape = rows.count, slab.last - slab.first
        out = self.out(shape) if out is None else out
        if self.multiply == self.accumulate:
            tile = torch.mm(rows.hidden, slab.weight.t(), out=out)
        else:
            tile = self._raw[: shape[0] * shape[1]].view(shape)
            if tile.is_cuda:
                torch.mm(rows.hidden, slab.weight.t(), out_dtype=self.accumulate, out=tile)
            else:
                tile.copy_(torch.mm(rows.hidden, slab.weight.t()))  # the CPU's bfloat16 GEMM can only return bfloat16
        if rows.lora_hidden is not None and slab.lora_weight is not None:
            self.add_product(tile, rows.lora_hidden, slab.lora_weight.t())
        return tile, out

    def out(self, shape: tuple[int, int]) -> Tensor:
        """Where a tile's exponentials go, in the GEMM's dtype."""
        return self._packed[: shape[0] * shape[1]].view(shape)

    def add_product(self, accumulator: Tensor, left: Tensor, right: Tensor) -> None:
        """`accumulator += left @ right` in the accumulation dtype."""
        if self.multiply == self.accumulate:
            accumulator.addmm_(left, right)
        else:
            accumulator += self.product(left, right)

    def set_product(self, result: Tensor, left: Tensor, right: Tensor) -> None:
        """`result = left @ right`: for the first of several sums, cheaper than to add to zeros."""
        if self.multiply == self.accumulate == result.dtype:
            torch.mm(left, right, out=result)
        else:
            result.copy_(self.product(left, right))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """`left @ right` in the accumulation dtype, where the library can return that."""
        if left.is_cuda and self.multiply != self.accumulate:
            return torch.mm(left, right, out_dtype=self.accumulate)
        return torch.mm(left, right)


def make_plan(rows: Rows, head: Head, dtype: torch.dtype) -> Plan:
    """The plan of one call: `dtype` is what inputs are rounded to."""
    device = rows.hidden.device.type
    accumulate = torch.promote_types(dtype, torch.float32)
    multiply = dtype
    if device == "cpu" and not (dtype == torch.bfloat16 and cpu_multiplies_bfloat16()):
        multiply = accumulate
    vocabulary, depth = head.weight.shape
    height, columns = (sizes.get(device, sizes["cuda"]) for sizes in (TILE_ROWS, TILE_COLUMNS))
    if device == "cpu" and depth > WIDE:
        height, columns = height // 2, columns // 2
    if multiply != head.weight.dtype:  # slabs are copies
        most = SLAB_BYTES // (max(depth, 1) * multiply.itemsize) // SLAB_MULTIPLE * SLAB_MULTIPLE
        columns = min(columns, max(SLAB_MULTIPLE, most))
    columns = max(1, min(columns, vocabulary))
    height = max(ROW_MULTIPLE, min(height, -(-rows.count // ROW_MULTIPLE) * ROW_MULTIPLE))
    return Plan(
        rows=height,
        columns=columns,
        rounded=dtype,
        multiply=multiply,
        accumulate=accumulate,
        margin=8.0 if multiply == torch.float16 else 60.0,  # float16 overflows at exp(11), the others at exp(88)
        device=rows.hidden.device,
    )


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions that torch uses; without them float32 is 8 to 80 times faster."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # oneDNN also says yes where it emulates them on AVX-512.
    instructions = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return instructions.get("architecture") != "x86_64" or any(instructions.get(n) for n in ("avx512_bf16", "amx_bf16"))
