"""Trees and the forests they are trained in."""

from dpo_engine.batch.forest import PreferenceForest, ScoredTree, TokenTree, build_forest, sum_by_completion
from dpo_engine.batch.packing import ForestCollator, PreferenceBatch, pack_trees, tree_cost

__all__ = [
    "ForestCollator",
    "PreferenceBatch",
    "PreferenceForest",
    "ScoredTree",
    "TokenTree",
    "build_forest",
    "pack_trees",
    "sum_by_completion",
    "tree_cost",
]
