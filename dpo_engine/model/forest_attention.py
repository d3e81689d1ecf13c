"""How does a model attend over a forest, where a token sees its own prompt and its own completion and nothing else?

Attention and mask functions are registered with transformers under names of ours. The mask function is handed the
model's *own* rule for a layer (causal, sliding window, chunks) and evaluates it on positions, which restart in every
tree, not on indices of the row; to it it adds "in the prompt, or in the same completion". The attention function cuts
queries, keys and values at the trees and calls the model's *own* attention on each with that tree's small mask, so that
softcaps, sinks, windows and scaling stay the model's. No (L, L) mask exists, and no work is done between trees.

What a forest looks like reaches the mask function by a context variable. What the layers get as their attention mask is
an empty tensor that carries the trees' masks: gradient checkpointing hands the same object to a layer again in backward.
Without a forest both functions are the model's own, so generation and plain scoring go on as before.

Models that keep their attention to themselves take the forest as one mask instead (`forest_mask`). Which of the two forms a
model uses is put there by `use_forest_attention` and said by `forest_form`, and nowhere else.

Sources: `transformers.AttentionInterface`, `transformers.AttentionMaskInterface`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_engine.batch.forest import ForestShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "dpo_engine_forest_"
OWN = ("sdpa", "eager")
"""Attention implementations that can be called tree by tree."""

_current: ContextVar[ForestShape | None] = ContextVar("dpo_engine_forest", default=None)


@contextmanager
def over_forest(shape: ForestShape) -> Iterator[None]:
    """Within it, a model that has forest attention sees this forest."""
    token = _current.set(shape)
    try:
        yield
    finally:
        _current.reset(token)


def use_forest_attention(model: PreTrainedModel, form: str = "trees") -> bool:
    """Put a form of forest attention in place, instead of any other; False where the model cannot be asked for it.

    Whether the model then gives the right numbers is for a probe to find out (`layout.choose_layout`).

    Args:
        form: "trees", the model's own attention called tree by tree; or "mask", one additive mask for the whole row.
    """
    if forest_form(model) == form:
        return True
    restore_attention(model)
    own = model.config._attn_implementation
    if own not in OWN:
        return False
    instance: Any = model
    if form == "mask":
        instance.takes_forest_mask = True
    elif model._can_set_attn_implementation():
        _register(own)
        model.set_attn_implementation(_PREFIX + own)
    return forest_form(model) == form


def forest_form(model: PreTrainedModel) -> str | None:
    """Which form of forest attention is in effect: "trees", "mask", or None."""
    if model.config._attn_implementation.startswith(_PREFIX):
        return "trees"
    return "mask" if getattr(model, "takes_forest_mask", False) else None


def restore_attention(model: PreTrainedModel) -> None:
    """Give the model its own attention back."""
    name = model.config._attn_implementation
    if name.startswith(_PREFIX):
        model.set_attn_implementation(name.removeprefix(_PREFIX))
    if hasattr(model, "takes_forest_mask"):
        delattr(model, "takes_forest_mask")


@dataclass(frozen=True)
class _TreeMasks:
    """For each tree its tokens and what each may see, (1, 1, n, n) to be added to attention scores."""

    spans: tuple[tuple[int, int], ...]
    masks: tuple[Tensor, ...]


def _register(own: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    own_mask = ALL_MASK_ATTENTION_FUNCTIONS[own]

    def mask(*args: Any, **kwargs: Any) -> Any:
        shape = _current.get()
        return own_mask(*args, **kwargs) if shape is None else _tree_masks(shape, **kwargs)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attend = _own_attention(module, own)
        trees = getattr(attention_mask, "trees", None)
        if trees is None:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        outputs = [
            attend(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], tree_mask, *args, **kwargs)[0]
            for (a, b), tree_mask in zip(trees.spans, trees.masks, strict=True)
        ]
        return torch.cat(outputs, 1), None  # (1, L, heads, head_dim)

    AttentionInterface.register(_PREFIX + own, attention)
    AttentionMaskInterface.register(_PREFIX + own, mask)


def _own_attention(module: nn.Module, own: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that this module would have called by itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if own != "eager":
        return ALL_ATTENTION_FUNCTIONS[own]
    return sys.modules[type(module).__module__].eager_attention_forward


def _tree_masks(
    shape: ForestShape, *, mask_function: Callable[..., Any], dtype: torch.dtype = torch.float32, **_: Any
) -> Tensor:
    """The layers' attention mask: an empty tensor whose `trees` are the masks of `mask_function` on positions."""
    positions, least = shape.position_ids[0], torch.finfo(dtype).min
    masks = []
    for first, last in shape.spans:
        position, branch = positions[first:last], shape.branches[first:last]
        seen = (branch[None, :] < 0) | (branch[None, :] == branch[:, None])
        seen = seen & mask_function(0, 0, position[:, None], position[None, :])
        masks.append(torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, least)[None, None])
    holder: Any = positions.new_empty(0)
    holder.trees = _TreeMasks(spans=shape.spans, masks=tuple(masks))
    return holder
