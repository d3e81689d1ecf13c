"""What does a data set know of its reference? Float32 log-probs of all its scored tokens, end to end in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import overload

import torch
from torch import Tensor

from dpo_engine.batch import TokenTree, Tree
from dpo_engine.errors import DataError


class ReferenceValues(Sequence[Tree]):
    """The trees of a data set, with the reference log-probs that are known of them.

    As a sequence it gives `Tree`s that carry their log-probs; those that are not known carry None.

    Args:
        trees: as tokenised; they are not copied.
    """

    def __init__(self, trees: Sequence[TokenTree]) -> None:
        self.trees = trees
        counts = [count for tree in trees for count in scored_tokens(tree)]
        self._starts = [0, *accumulate(counts)]  # of each completion, in tokens
        self._firsts = [0, *accumulate(len(tree.completions) for tree in trees)]  # of each tree, in completions
        self._raw = bytearray(4 * self._starts[-1])
        self._tensor = torch.frombuffer(self._raw, dtype=torch.float32) if self._raw else torch.empty(0)
        self._known = bytearray(len(trees))

    def __len__(self) -> int:
        return len(self.trees)

    @overload
    def __getitem__(self, index: int) -> Tree: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...

    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return with_reference(self.trees[index], self.logps(index) if self._known[index] else None)

    def logps(self, index: int) -> list[Tensor]:
        """One (scored tokens,) float32 for each completion of tree `index`, views of the whole."""
        first, last = self._firsts[index], self._firsts[index + 1]
        starts = self._starts[first : last + 1]
        return [self._tensor[begin:end] for begin, end in pairwise(starts)]

    def is_known(self, index: int) -> bool:
        return bool(self._known[index])

    @property
    def missing(self) -> list[int]:
        """Trees whose reference is not known."""
        return [index for index, known in enumerate(self._known) if not known]

    def set_bytes(self, index: int, entries: Sequence[bytes | None]) -> bool:
        """Fill in tree `index` from stored values, one `bytes` a completion.

        Returns:
            Whether they fit: all there, and as many numbers as there are scored tokens.
        """
        first, last = self._firsts[index], self._firsts[index + 1]
        starts = self._starts[first : last + 1]
        for (begin, end), entry in zip(pairwise(starts), entries, strict=True):
            if entry is None or len(entry) != 4 * (end - begin):
                return False
        for begin, entry in zip(starts, entries, strict=False):
            assert entry is not None
            self._raw[4 * begin : 4 * begin + len(entry)] = entry
        self._known[index] = True
        return True

    def set_logps(self, index: int, logps: Sequence[Tensor]) -> None:
        """Fill in tree `index`: one (scored tokens,) for each completion.

        Raises:
            DataError: not as many numbers as there are scored tokens.
        """
        parts = self.logps(index)
        if [known.shape for known in parts] != [given.shape for given in logps]:
            raise DataError(
                f"{getattr(self.trees[index], 'origin', None) or f'row {index + 1}'}: reference log-probs of shapes "
                f"{[tuple(given.shape) for given in logps]}; expected {[tuple(known.shape) for known in parts]}, one a scored token"
            )
        for known, given in zip(parts, logps, strict=True):
            known.copy_(given)
        self._known[index] = True


def with_reference(tree: TokenTree, logps: Sequence[Tensor] | None, sums: Sequence[float] | None = None) -> Tree:
    """`tree`, carrying these reference log-probs, by token or as sums."""
    return Tree(
        prompt_ids=tree.prompt_ids,
        completions=tree.completions,
        reference_token_logps=logps,
        reference_logps=sums,
        **{name: getattr(tree, name) for name in _CARRIED if hasattr(tree, name)},
    )


_CARRIED = ("scored", "token_weights", "completion_weights", "desirable", "ranks", "mismatched", "origin")


def scored_tokens(tree: TokenTree) -> list[int]:
    """How many tokens of each completion are scored."""
    masks = getattr(tree, "scored", None)
    if masks is None:
        return [len(completion) for completion in tree.completions]
    return [sum(map(bool, mask)) for mask in masks]
