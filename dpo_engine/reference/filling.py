"""How does a data set come to know its reference? What the cache has is read; what it lacks is computed in bulk and kept.

Rows are committed every few forests, so that an interruption loses little. Several processes that fill one folder share the
work without speaking to each other: each begins at another place, and looks again before it computes. The ranks of a
distributed run divide it instead.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_engine.batch import TokenTree
from dpo_engine.errors import CacheError
from dpo_engine.reference.addresses import entry_addresses
from dpo_engine.reference.store import ReferenceStore
from dpo_engine.reference.values import ReferenceValues

_LOOKED_UP_AT_ONCE = 2000  # trees
_COMMITTED_EVERY_S = 0.5
# Addresses are random, so once there are many, a commit writes about a page of the index for each of its entries: few large
# commits cost a third of what many small ones do.
_COMMITTED_AT_LEAST = 1024  # entries, where half a second brings more

Score = Callable[[Sequence[TokenTree]], list[list[Tensor]]]
"""`score(trees)`: the trees of one forest -> for each tree, one (scored tokens,) float32 on the CPU a completion."""
Pack = Callable[[Sequence[TokenTree]], list[list[TokenTree]]]
"""`pack(trees)`: the trees of each forest."""


class Bar(Protocol):
    """What is moved on as trees are done; tqdm's."""

    def update(self, n: int) -> Any: ...


class Ranks(Protocol):
    """The processes of a distributed run."""

    rank: int
    world: int

    def union(self, missing: list[int]) -> list[int]:
        """What any rank misses."""
        ...

    def wait(self) -> None:
        """Until every rank is here."""
        ...


@dataclass(kw_only=True)
class Filled:
    """Where the rows' values came from."""

    rows: int = 0
    reused: int = 0
    """Rows whose values were in the cache, or were put there meanwhile by others."""
    computed: int = 0
    """Rows that this run computed: on all of its ranks."""
    here: int = 0
    """Of these, rows that this process computed."""
    entries: int = 0
    """Completions of all rows."""
    bad: int = 0
    """Damaged entries that were met."""
    seconds: float = 0.0
    found: list[int] = field(default_factory=list, repr=False)
    """Indices of the rows that were in the cache from the start."""

    def __add__(self, other: Filled) -> Filled:
        """Of several data sets; indices are of one, so they are left out."""
        counts = [field.name for field in fields(self) if field.name != "found"]
        return Filled(**{name: getattr(self, name) + getattr(other, name) for name in counts})


def fill(
    values: ReferenceValues,
    store: ReferenceStore | None,
    score: Score,
    pack: Pack,
    *,
    bar: Callable[[int], AbstractContextManager[Bar]],
    ranks: Ranks | None = None,
    only: Sequence[int] | None = None,
) -> Filled:
    """Make every tree of `values` know its reference.

    Args:
        values: filled in place.
        store: what was computed before, and where to keep what is computed now; None: nothing is kept.
        score, pack: compute trees, forest by forest.
        bar: called with the number of trees to compute, if there are any.
        ranks: of a distributed run, all of which must call this with the same trees.
        only: indices of the trees that are wanted; all of them if None.

    Raises:
        CacheError: the store cannot be read or written, or a log-prob is not finite.
    """
    begin = time.perf_counter()
    bad = store.bad if store else 0
    wanted = list(range(len(values))) if only is None else list(only)
    asked = [index for index in wanted if not values.is_known(index)]
    filled = Filled(rows=len(wanted), entries=sum(len(values.trees[index].completions) for index in wanted))
    missing = look_up(values, store, asked)
    absent = set(missing)
    filled.found = [index for index in asked if index not in absent]
    if ranks is not None and store is not None:
        together = ranks.union(missing)
        filled.computed = len(missing)
        if together:
            mine = [
                forest
                for number, forest in enumerate(_forests(values, together, pack))
                if number % ranks.world == ranks.rank
            ]
            filled.here += _compute(values, store, score, mine, bar)
            ranks.wait()
        missing = look_up(values, store, missing)  # what others computed; all of it, where the folder is shared
    if missing:
        forests = _forests(values, missing, pack)
        if store is not None and ranks is None:
            start = random.SystemRandom().randrange(len(forests))  # another process may be at it too
            forests = forests[start:] + forests[:start]
        filled.here += _compute(values, store, score, forests, bar)
    filled.computed = max(filled.computed, filled.here)
    filled.reused = filled.rows - filled.computed
    filled.bad = store.bad - bad if store else 0
    filled.seconds = time.perf_counter() - begin
    return filled


def look_up(values: ReferenceValues, store: ReferenceStore | None, indices: Sequence[int]) -> list[int]:
    """Fill in what the store has; returns what it has not."""
    if store is None:
        return list(indices)
    missing = []
    for first in range(0, len(indices), _LOOKED_UP_AT_ONCE):
        some = indices[first : first + _LOOKED_UP_AT_ONCE]
        addresses = [entry_addresses(values.trees[index]) for index in some]
        found = store.get([address for of_tree in addresses for address in of_tree])
        for index, of_tree in zip(some, addresses, strict=True):
            if not values.set_bytes(index, [found.get(address) for address in of_tree]):
                missing.append(index)
    return missing


@dataclass(frozen=True)
class _Forest:
    """Trees to compute together, and the rows that are waiting for each of them: equal rows are computed once."""

    trees: list[TokenTree]
    waiting: list[list[int]]


def _forests(values: ReferenceValues, indices: Sequence[int], pack: Pack) -> list[_Forest]:
    rows: dict[tuple[bytes, ...], list[int]] = {}
    for index in indices:
        rows.setdefault(tuple(entry_addresses(values.trees[index])), []).append(index)
    firsts = [values.trees[waiting[0]] for waiting in rows.values()]
    by_tree = {id(tree): waiting for tree, waiting in zip(firsts, rows.values(), strict=True)}
    return [_Forest(trees, [by_tree[id(tree)] for tree in trees]) for trees in pack(firsts)]


def _compute(
    values: ReferenceValues,
    store: ReferenceStore | None,
    score: Score,
    forests: Sequence[_Forest],
    bar: Callable[[int], AbstractContextManager[Bar]],
) -> int:
    """Score the forests, keep the results, and return the number of rows that were computed here."""
    computed = 0
    kept = _Keeping(store)
    with bar(sum(len(waiting) for forest in forests for waiting in forest.waiting)) as shown, kept:
        for forest in forests:
            rows = [index for waiting in forest.waiting for index in waiting]
            missing = set(look_up(values, store, rows))
            pairs = [
                (tree, rows) for tree, rows in zip(forest.trees, forest.waiting, strict=True) if missing & set(rows)
            ]
            if pairs:
                scored = score([tree for tree, _ in pairs])
                for (tree, waiting), logps in zip(pairs, scored, strict=True):
                    _check_finite(tree, logps)
                    for index in waiting:
                        values.set_logps(index, logps)
                    computed += len(waiting)
                    kept.add(tree, logps)
            shown.update(len(rows))
    return computed


class _Keeping:
    """Commits now and then, and at the end: a kill loses at most what was computed since, Ctrl-C nothing."""

    def __init__(self, store: ReferenceStore | None) -> None:
        self.store = store
        self._entries: list[tuple[bytes, bytes]] = []
        self._last = time.perf_counter()

    def add(self, tree: TokenTree, logps: Sequence[Tensor]) -> None:
        if self.store is None:
            return
        self._entries += zip(entry_addresses(tree), map(as_bytes, logps), strict=True)
        if len(self._entries) >= _COMMITTED_AT_LEAST or time.perf_counter() - self._last > _COMMITTED_EVERY_S:
            self.commit()

    def __enter__(self) -> _Keeping:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.commit()

    def commit(self) -> None:
        if self.store is not None and self._entries:
            self.store.put(self._entries)
            self._entries = []
        self._last = time.perf_counter()


def as_bytes(logps: Tensor) -> bytes:
    """(n,) -> 4n bytes, little-endian float32."""
    return logps.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()


def _check_finite(tree: TokenTree, logps: Sequence[Tensor]) -> None:
    for number, values in enumerate(logps):
        if not bool(torch.isfinite(values).all()):
            origin = getattr(tree, "origin", None) or "a row"
            raise CacheError(
                f"{origin}: the reference gives completion {number + 1} a log-prob that is not finite ({_worst(values)}); no "
                "loss can be computed from it: check the reference model and its dtype"
            )


def _worst(values: Tensor) -> float:
    return values[~torch.isfinite(values)][0].item()
