"""Which trees go into which forest? As few forests as a token budget allows.

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
    """Tokens that a tree takes in a forest: its prompt once per completion, and each completion but its last token."""
    return sum(len(tree.prompt_ids) + len(completion) - 1 for completion in tree.completions)


def pack_trees(trees: Sequence[TokenTree], max_tokens: int) -> list[list[TokenTree]]:
    """First-fit-decreasing: the costs of the trees of each list add up to at most `max_tokens`.

    Raises:
        ValueError: a single tree is larger than the budget.
    """
    forests: list[list[TokenTree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=tree_cost, reverse=True):
        cost = tree_cost(tree)
        if cost > max_tokens:
            raise ValueError(
                f"a tree of {cost} tokens does not fit max_tokens_per_forest={max_tokens}; raise it or lower max_length"
            )
        index = next((index for index, left in enumerate(room) if cost <= left), None)
        if index is None:
            forests.append([tree])
            room.append(max_tokens - cost)
        else:
            forests[index].append(tree)
            room[index] -= cost
    return forests


@dataclass(frozen=True)
class ForestCollator:
    """Collate function of a DataLoader: a list of trees becomes a `PreferenceBatch`."""

    max_tokens: int

    def __call__(self, trees: Sequence[TokenTree]) -> PreferenceBatch:
        forests = tuple(build_forest(members) for members in pack_trees(trees, self.max_tokens))
        return PreferenceBatch(forests=forests, trees=len(trees))
