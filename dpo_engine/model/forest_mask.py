"""How does a forest look as one mask, for models whose attention does not go through transformers' interface?

Such a model (Falcon, GPT-J) cannot be made to attend tree by tree, but it takes a ready mask for its row. The mask is of
the whole row, (1, 1, L, L): memory and time grow with the square of a forest, so the trees' form comes first. It is one for
all layers, so only a model that attends to everything in every layer may be given it: a window or a chunk, which a layer
would have applied by itself or by the row's indices, would be lost.

It is added to the scores, never boolean: attention in the "eager" form adds what it is given, and True adds one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_engine.batch.forest import ForestShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LIMITS = re.compile(r"window|chunk|local|index_topk")  # names of what limits how far a layer sees
_FULL = {"full_attention", "attention"}


def forest_mask(shape: ForestShape, dtype: torch.dtype) -> Tensor:
    """(1, 1, L, L) `dtype`: 0 where a token sees another (`ForestShape`), else the least number."""
    positions, branches = shape.position_ids[0], shape.branches
    least = torch.finfo(dtype).min
    mask = torch.full((len(positions), len(positions)), least, dtype=dtype, device=positions.device)
    for first, last in shape.spans:
        position, branch = positions[first:last], branches[first:last]
        seen = (branch[None, :] < 0) | (branch[None, :] == branch[:, None])
        seen = seen & (position[None, :] <= position[:, None])
        mask[first:last, first:last].masked_fill_(seen, 0.0)
    return mask[None, None]


def why_not_one_mask(model: PreTrainedModel) -> str | None:
    """None where every layer attends to all that came before; else what the mask would override."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _FULL
    if others:
        return f"its layers of type {', '.join(sorted(others))} need masks of their own"
    for name, value in config.to_dict().items():
        if _LIMITS.search(name) and value and isinstance(value, int):
            return f"one mask for all layers would override its {name}={value}"
    # A causal mask kept as a table is cut by the row's indices, and ends where the table does.
    for name, buffer in model.named_buffers():
        if buffer.ndim > 1 and buffer.shape[-1] == buffer.shape[-2] > 1:
            return f"it masks by a table of its own, {name}"
    return None
