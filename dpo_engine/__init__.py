"""Preference optimisation on one GPU: no logits, no padding, every prompt once.

The public names are loaded when they are first used, so that `import dpo_engine` and `dpo-engine --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DPOConfig": "dpo_engine.train.config",
    "DPOTrainer": "dpo_engine.train.trainer",
    "FusedLinearDPOLoss": "dpo_engine.integrations.liger",
    "PreferenceForest": "dpo_engine.batch",
    "ReferenceCache": "dpo_engine.reference.cache",
    "Tree": "dpo_engine.batch",
    "build_forest": "dpo_engine.batch",
    "dpo_loss": "dpo_engine.losses",
    "forest_token_logps": "dpo_engine.model.scoring",
    "linear_kl": "dpo_engine.ops",
    "linear_logps": "dpo_engine.ops",
    "linear_logps_head": "dpo_engine.integrations.token_logps",
    "linear_preference_loss": "dpo_engine.ops",
    "prepare_model": "dpo_engine.model.layout",
    "remove_linear_logps_head": "dpo_engine.integrations.token_logps",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "FusedLinearDPOLoss",
    "PreferenceForest",
    "ReferenceCache",
    "Tree",
    "build_forest",
    "dpo_loss",
    "forest_token_logps",
    "linear_kl",
    "linear_logps",
    "linear_logps_head",
    "linear_preference_loss",
    "prepare_model",
    "remove_linear_logps_head",
]

if TYPE_CHECKING:
    from dpo_engine.batch import PreferenceForest, Tree, build_forest
    from dpo_engine.integrations.liger import FusedLinearDPOLoss
    from dpo_engine.integrations.token_logps import linear_logps_head, remove_linear_logps_head
    from dpo_engine.losses import dpo_loss
    from dpo_engine.model.layout import prepare_model
    from dpo_engine.model.scoring import forest_token_logps
    from dpo_engine.ops import linear_kl, linear_logps, linear_preference_loss
    from dpo_engine.reference.cache import ReferenceCache
    from dpo_engine.train.config import DPOConfig
    from dpo_engine.train.trainer import DPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpo_engine' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
