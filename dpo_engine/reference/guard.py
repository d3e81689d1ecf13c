"""Is what is known of the reference what the reference says? Some rows are computed again and compared.

    |cached - now| <= 8 * max(spread, unit * max(1, |now|))        per scored token, in nats

`spread` is the largest difference between two packings of the same rows here: what rounding does in this model and dtype, seen
and not assumed. `unit`, 1e-5 in float32 and 4e-3 in 16 bits, stands for what another device or version may do when two
packings happen to agree.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_engine.batch import TokenTree
from dpo_engine.errors import CacheError
from dpo_engine.reference.filling import Pack, Score
from dpo_engine.reference.values import ReferenceValues

GUARDED_ROWS = 4
_FACTOR = 8.0
_SHOWN = 5


@dataclass(frozen=True)
class Mismatch:
    """A completion whose known log-probs are not what the reference says."""

    origin: str
    completion: int
    known: float
    """Sum over scored tokens, in nats."""
    now: float
    worst: float
    """The largest difference of a token, in nats; of the sums, where only those are known."""
    allowed: float
    """What the tolerance is there."""
    by_token: bool = True
    """Whether tokens were compared, or sums only."""

    def __str__(self) -> str:
        what = ("chosen", "rejected")[self.completion] if self.completion < 2 else f"completion {self.completion + 1}"
        of = "worst token" if self.by_token else "they are"
        off = f"{of} off by {self.worst:.2g}, allowed {self.allowed:.2g}"
        return f"{self.origin} {what}: sum {self.known:.4f} known, {self.now:.4f} now ({off})"


def check_rows(
    values: ReferenceValues,
    indices: Sequence[int],
    score: Score,
    pack: Pack,
    *,
    dtype: torch.dtype,
    progress: Callable[[int], object] | None = None,
) -> list[Mismatch]:
    """Which of these rows are not what the reference says?

    Args:
        indices: rows that are known.
        score, pack: compute trees with the reference, forest by forest.
        dtype: what the reference computes in.
        progress: called with the number of rows done.

    Returns:
        The completions beyond the tolerance, in order.
    """
    if not indices:
        return []
    trees = [values.trees[index] for index in indices]
    rows = {id(tree): index for tree, index in zip(trees, indices, strict=True)}
    spread, scored = _scored(trees, score, pack)
    found: list[Mismatch] = []
    for pairs in scored:
        for tree, logps in pairs:
            found += _compared(tree, values.logps(rows[id(tree)]), logps, spread, unit_of(dtype))
        if progress is not None:
            progress(len(pairs))
    return sorted(found, key=lambda mismatch: mismatch.origin)


def check_sums(
    trees: Sequence[TokenTree], sums: Sequence[Sequence[float]], score: Score, pack: Pack, *, dtype: torch.dtype
) -> list[Mismatch]:
    """The same for sums that a user brings: their tolerance is that of all tokens together."""
    spread, scored = _scored(trees, score, pack)
    unit = unit_of(dtype)
    known = {id(tree): given for tree, given in zip(trees, sums, strict=True)}
    found = []
    for pairs in scored:
        for tree, logps in pairs:
            for number, (now, given) in enumerate(zip(logps, known[id(tree)], strict=True)):
                total = now.double().sum().item()
                allowed = _FACTOR * torch.clamp(unit * now.abs().clamp(min=1), min=spread).double().sum().item()
                if not abs(given - total) <= allowed:
                    off = abs(given - total)
                    found.append(Mismatch(_origin(tree), number, given, total, off, allowed, by_token=False))
    return found


def unit_of(dtype: torch.dtype) -> float:
    """What a log-prob of size 1 may differ by between devices and versions, in nats, where the reference computes in `dtype`."""
    is_exact = dtype == torch.float64 or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest")
    return 1e-5 if is_exact else 4e-3


def some_rows(indices: Sequence[int], count: int) -> list[int]:
    """`count` of them by chance, other ones in every run, and without touching any seed."""
    return sorted(random.SystemRandom().sample(list(indices), min(count, len(indices))))


def refuse(mismatches: Sequence[Mismatch], where: str, causes: Sequence[str]) -> None:
    """Stop if anything was found.

    Raises:
        CacheError: with the rows, both values of each and what may be the cause.
    """
    if not mismatches:
        return
    shown = "; ".join(map(str, mismatches[:_SHOWN]))
    more = f"; and {len(mismatches) - _SHOWN} more" if len(mismatches) > _SHOWN else ""
    raise CacheError(f"{where} is not what the reference says now: {shown}{more}. {' '.join(causes)}")


_Scored = list[tuple[TokenTree, list[Tensor]]]


def _scored(trees: Sequence[TokenTree], score: Score, pack: Pack) -> tuple[float, Iterator[_Scored]]:
    """`(spread, forests)`: how far two packings of the first few trees are apart, in nats; and all trees, scored, by forest."""

    def forests(some: Sequence[TokenTree]) -> Iterator[_Scored]:
        for forest in pack(some):
            yield list(zip(forest, score(forest), strict=True))

    first = [pair for pairs in forests(trees[: 2 * GUARDED_ROWS]) for pair in pairs]
    spread = 0.0
    for tree, together in first:
        (alone,) = score([tree])
        spread = max(spread, *((a - b).abs().max().item() for a, b in zip(together, alone, strict=True)))
    return spread, itertools.chain([first], forests(trees[2 * GUARDED_ROWS :]))


def _compared(
    tree: TokenTree, known: Sequence[Tensor], now: Sequence[Tensor], spread: float, unit: float
) -> list[Mismatch]:
    found = []
    for number, (one, other) in enumerate(zip(known, now, strict=True)):
        allowed = _FACTOR * torch.clamp(unit * other.abs().clamp(min=1), min=spread)
        beyond = (one - other).abs() - allowed
        if not bool((beyond <= 0).all()):
            worst = int(beyond.nan_to_num(nan=torch.inf).argmax())
            off = (one - other).abs()[worst].item()
            sums = one.double().sum().item(), other.double().sum().item()
            found.append(Mismatch(_origin(tree), number, *sums, off, allowed[worst].item()))
    return found


def _origin(tree: TokenTree) -> str:
    return getattr(tree, "origin", None) or "a row"
