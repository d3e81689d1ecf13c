"""Random data of the kind that a method trains on."""

from __future__ import annotations

import random
from typing import Any

from dpo_engine.batch import Tree
from dpo_engine.losses import ListStats, UnpairedStats, get_method
from support.tiny_pairs import VOCABULARY, random_pairs


def trees_for(method: str, count: int, seed: int = 1, *, ranked: bool = False) -> list[Any]:
    """Pairs; labelled completions, alone or two of a prompt; lists of three or four, with ties.

    Args:
        ranked: lists also for a method of pairs.
    """
    pairs, needs = random_pairs(count, seed=seed).trees, get_method(method).needs
    draw = random.Random(seed)
    if needs is UnpairedStats:
        return [
            Tree(prompt_ids=tree.prompt_ids, completions=tree.completions, desirable=(True, False))
            if index % 3 == 0
            else Tree(prompt_ids=tree.prompt_ids, completions=tree.completions[:1], desirable=(index % 3 == 1,))
            for index, tree in enumerate(pairs)
        ]
    if needs is not ListStats and not ranked:
        return pairs
    lists = []
    for index, tree in enumerate(pairs):
        more = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 9))] for _ in range(1 + index % 2)]
        ranks = ((0, 1, 1) if index % 4 == 0 else (0, 1, 2)) if len(more) == 1 else (0, 1, 1, 2)
        lists.append(Tree(prompt_ids=tree.prompt_ids, completions=[*tree.completions, *more], ranks=ranks))
    return lists
