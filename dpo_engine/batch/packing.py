"""Which trees go into which forest? As few forests as a token budget allows, trees of like length together.

The budget is a memory knob: a step's gradient is the mean over the step's trees whatever the packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dpo_engine.batch.forest import PreferenceForest, TokenTree, build_forest


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """The trees of one micro-batch, packed."""

    forests: tuple[PreferenceForest, ...]
    trees: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """The same batch on another device."""
        return replace(self, forests=tuple(forest.to(device, non_blocking) for forest in self.forests))

    def pin_memory(self) -> PreferenceBatch:
        """The same batch in page-locked host memory."""
        return replace(self, forests=tuple(forest.pin_memory() for forest in self.forests))


def tree_cost(tree: TokenTree) -> int:
    """Tokens that a tree takes in a forest of its own, padding included."""
    return _width(tree) * len(tree.completions)


def _width(tree: TokenTree) -> int:
    return len(tree.prompt_ids) + max(map(len, tree.completions)) - 1


def pack_trees(trees: Sequence[TokenTree], max_tokens: int) -> list[list[TokenTree]]:
    """First-fit-decreasing by width: each list's padded size, rows times the widest row, is at most `max_tokens`.

    Raises:
        ValueError: a single tree is larger than the budget.
    """
    forests: list[tuple[int, int, list[TokenTree]]] = []  # (width, rows, trees)
    for tree in sorted(trees, key=_width, reverse=True):
        if tree_cost(tree) > max_tokens:
            raise ValueError(
                f"a tree of {tree_cost(tree)} tokens does not fit max_tokens_per_forest={max_tokens}; "
                "raise it or lower max_length"
            )
        rows = len(tree.completions)
        for index, (width, used, members) in enumerate(forests):
            if width * (used + rows) <= max_tokens:
                members.append(tree)
                forests[index] = (width, used + rows, members)
                break
        else:
            forests.append((_width(tree), rows, [tree]))
    return [members for _, _, members in forests]


@dataclass(frozen=True)
class ForestCollator:
    """Collate function of a DataLoader: a list of trees becomes a `PreferenceBatch`."""

    max_tokens: int

    def __call__(self, trees: Sequence[TokenTree]) -> PreferenceBatch:
        forests = tuple(build_forest(members) for members in pack_trees(trees, self.max_tokens))
        return PreferenceBatch(forests=forests, trees=len(trees))
