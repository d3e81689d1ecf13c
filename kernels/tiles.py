"""Which block sizes does a kernel with a matrix product get on a card?

    FUSED         kernels/lse_forward.py
    EXPONENTIAL   kernels/exp_epilogue.py

Every entry is compiled ahead of time for its cards by `tests/unit/test_triton_aot.py`: none spills a register inside
the loop of its matrix product or asks for more shared memory than the card has. Speed was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes of the matrix product, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False
    """Load operands by tensor descriptor (TMA). Only what `product.takes_descriptor` can be loaded so."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Tiles of one kernel on one card, for bfloat16 and float16."""

    plain: Tiles
    softcap: Tiles
    """With a softcap, whose slope needs registers."""
    pointers: Tiles
    """Where `plain` and `softcap` want descriptors and the operands' strides forbid them."""


Table = Mapping[tuple[int, ...], Entry]


def _tiles(rows: int, columns: int, depth: int, stages: int, *, descriptors: bool = False) -> Tiles:
    return Tiles(rows=rows, columns=columns, depth=depth, warps=8, stages=stages, descriptors=descriptors)


def _through_pointers(plain: Tiles, softcap: Tiles) -> Entry:
    return Entry(plain=plain, softcap=softcap, pointers=plain)


# By compute capability, or by its major number where the minor makes no difference.
FUSED: Table = {
    (8,): _through_pointers(_tiles(128, 128, 32, 4), _tiles(128, 128, 32, 4)),
    (9,): Entry(
        plain=_tiles(128, 256, 64, 3, descriptors=True),
        softcap=_tiles(128, 256, 64, 3, descriptors=True),
        pointers=_tiles(128, 256, 64, 3),
    ),
    (10,): Entry(
        plain=_tiles(128, 128, 64, 3, descriptors=True),
        softcap=_tiles(128, 128, 64, 3, descriptors=True),
        pointers=_tiles(128, 64, 64, 3),
    ),
    (12,): Entry(
        plain=_tiles(128, 128, 64, 3, descriptors=True),
        softcap=_tiles(128, 128, 64, 3, descriptors=True),
        pointers=_tiles(128, 128, 32, 4),
    ),
}
EXPONENTIAL: Table = {
    (8, 0): _through_pointers(_tiles(128, 256, 32, 4), _tiles(128, 128, 64, 3)),
    (8,): _through_pointers(_tiles(128, 128, 64, 3), _tiles(128, 128, 64, 3)),
    (9,): Entry(
        plain=_tiles(128, 256, 64, 4, descriptors=True),
        softcap=_tiles(128, 128, 64, 4, descriptors=True),
        pointers=_tiles(128, 128, 64, 3),
    ),
    (10,): Entry(
        plain=_tiles(128, 256, 64, 4, descriptors=True),
        softcap=_tiles(128, 128, 64, 4, descriptors=True),
        pointers=_tiles(128, 128, 64, 3),
    ),
    (12,): Entry(
        plain=_tiles(128, 128, 64, 3, descriptors=True),
        softcap=_tiles(128, 128, 64, 3, descriptors=True),
        pointers=_tiles(128, 128, 64, 3),
    ),
}
_FLOAT32 = Tiles(rows=64, columns=64, depth=32, warps=4, stages=3)
_HALF_ELSEWHERE = Tiles(rows=64, columns=64, depth=32, warps=4, stages=2)
_INTERPRETED = Tiles(rows=16, columns=32, depth=32, warps=4, stages=1)


def choose_tiles(
    table: Table, capability: tuple[int, int] | None, dtype: torch.dtype, *, descriptors: bool, softcap: bool
) -> Tiles:
    """The entry for a device and for what a kernel is given there.

    Args:
        capability: the device's compute capability; None under the interpreter.
        dtype: of the operands.
        descriptors: whether both operands can be read by tensor descriptor.
        softcap: whether there is one.
    """
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return _FLOAT32
    entry = table.get(capability, table.get(capability[:1]))
    if entry is None:
        return _HALF_ELSEWHERE
    chosen = entry.softcap if softcap else entry.plain
    return entry.pointers if chosen.descriptors and not descriptors else chosen
