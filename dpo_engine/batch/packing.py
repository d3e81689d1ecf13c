"""Which trees go into which forest? As few forests as a token budget allows.

The budget is a memory knob: a step's gradient is the mean over the step's trees whatever the packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dpo_engine.batch.forest import PreferenceForest, TokenTree, TreeLike, as_tree, build_forest, tree_cost


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """The trees of one optimiser step on one rank, packed."""

    forests: tuple[PreferenceForest, ...]
    trees: int
    idle: int = 0
    """Forests without weight that are run beside them, because another rank has so many more."""
    mismatched: PreferenceBatch | None = None
    """Completions behind prompts of other rows, for a method that compares with them."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """The same batch on another device."""
        return self._map(lambda forest: forest.to(device, non_blocking))

    def pin_memory(self) -> PreferenceBatch:
        """The same batch in page-locked host memory."""
        return self._map(lambda forest: forest.pin_memory())

    def _map(self, change: Callable[[PreferenceForest], PreferenceForest]) -> PreferenceBatch:
        beside = None if self.mismatched is None else self.mismatched._map(change)
        return replace(self, forests=tuple(map(change, self.forests)), mismatched=beside)


def pack_trees(
    trees: Sequence[TreeLike], max_tokens: int, layout: str = "shared", longest: int | None = None
) -> list[list[TokenTree]]:
    """First-fit-decreasing: the costs of the trees of each list add up to at most `max_tokens`.

    Args:
        longest: trees with a sequence of more tokens than this get a list of their own.

    Raises:
        ValueError: a single tree is larger than the budget.
    """

    def cost_of(tree: TokenTree) -> int:
        return packed_cost(tree, layout, longest)

    forests: list[list[TokenTree]] = []
    room: list[int] = []
    first, before = 0, None
    for tree in sorted(map(as_tree, trees), key=cost_of, reverse=True):
        cost = cost_of(tree)
        if cost != before:
            first, before = 0, cost
        if cost > max_tokens:
            raise ValueError(
                f"a tree of {cost} tokens does not fit max_tokens_per_forest={max_tokens}; raise it or lower max_length"
            )
        if is_long(tree, longest):
            forests.append([tree])
            room.append(0)
            continue
        # What had no room for a tree has none for another of the same cost. To look at every forest anew for every tree took
        # 5 s for 100 000 short rows, and four times that for twice as many.
        while first < len(room) and room[first] < cost:
            first += 1
        if first == len(room):
            forests.append([])
            room.append(max_tokens)
        forests[first].append(tree)
        room[first] -= cost
    return forests


def packed_cost(tree: TreeLike, layout: str = "shared", longest: int | None = None) -> int:
    """Tokens that `pack_trees` counts for a tree."""
    tree = as_tree(tree)
    return tree_cost(tree, "alone" if is_long(tree, longest) else layout)


def is_long(tree: TokenTree, longest: int | None) -> bool:
    """Whether one of the tree's sequences has more than `longest` tokens."""
    if longest is None:
        return False
    return len(tree.prompt_ids) + max(len(completion) for completion in tree.completions) > longest


@dataclass(frozen=True)
class ForestCollator:
    """A list of trees becomes a `PreferenceBatch`; a collate function for a DataLoader of one's own."""

    max_tokens: int
    layout: str = "shared"
    longest: int | None = None
    """Trees with longer sequences are laid out alone, each sequence on a sheet of its own."""

    def __call__(self, trees: Sequence[TreeLike]) -> PreferenceBatch:
        forests = []
        for members in pack_trees(trees, self.max_tokens, self.layout, self.longest):
            alone = is_long(members[0], self.longest)
            forests.append(build_forest(members, "alone" if alone else self.layout))
        return PreferenceBatch(forests=tuple(forests), trees=len(trees))
