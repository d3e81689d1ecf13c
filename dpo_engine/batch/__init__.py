"""Trees and the forests they are trained in."""

from dpo_engine.batch.forest import (
    LAYOUTS,
    ForestShape,
    PreferenceForest,
    TokenTree,
    Tree,
    build_forest,
    sum_by_completion,
    tree_cost,
    with_completions,
)
from dpo_engine.batch.packing import ForestCollator, PreferenceBatch, pack_trees, packed_cost

__all__ = [
    "LAYOUTS",
    "ForestCollator",
    "ForestShape",
    "PreferenceBatch",
    "PreferenceForest",
    "TokenTree",
    "Tree",
    "build_forest",
    "pack_trees",
    "packed_cost",
    "sum_by_completion",
    "tree_cost",
    "with_completions",
]
