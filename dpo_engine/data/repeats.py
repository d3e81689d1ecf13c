"""Which completions of a row say the same as one before them, and what is the row without them?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from dpo_engine.data.records import PreferenceRow, TokenizedTree

Row = TypeVar("Row", PreferenceRow, TokenizedTree)


def distinct(values: Iterable[Any]) -> list[int]:
    """Where each value stands first."""
    found: list[Any] = []
    places = []
    for place, value in enumerate(values):
        if value not in found:
            found.append(value)
            places.append(place)
    return places


def repeated(tree: TokenizedTree) -> list[int]:
    """Which completions are the same tokens, scored alike, as one before them."""
    kept = set(distinct(zip(tree.completions, tree.scored_masks, strict=True)))
    return [index for index in range(len(tree.completions)) if index not in kept]


def without(row: Row, left_out: Collection[int]) -> Row:
    """The row without some of its completions; its ranks close up."""
    kept = [index for index in range(len(row.completions)) if index not in left_out]

    def of_kept(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
        return None if values is None else tuple(values[index] for index in kept)

    changes: dict[str, Any] = {
        name: of_kept(getattr(row, name)) for name in ("completions", "desirable", "ranks", "reference_logps")
    }
    if changes["ranks"]:
        changes["ranks"] = close_ranks(changes["ranks"])
    if isinstance(row, TokenizedTree):
        changes["scored"] = of_kept(row.scored)
    return replace(row, **changes)


def close_ranks(ascending: Sequence[float]) -> tuple[int, ...]:
    """Ranks from 0 without gaps of values that ascend: (0.5, 2, 2, 7) -> (0, 1, 1, 2)."""
    places = {value: rank for rank, value in enumerate(dict.fromkeys(ascending))}
    return tuple(places[value] for value in ascending)
