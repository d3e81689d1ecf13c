"""How does a model attend over a forest, where a token sees its own prompt and its own completion and nothing else?

Attention and mask functions are registered with transformers under names of ours. The mask function is handed the
model's *own* rule for a layer (causal, sliding window, chunks) and evaluates it on positions, which restart in every
tree, not on indices of the row. The attention function cuts queries, keys and values at the completions and calls the
model's *own* attention on each, with the keys of its prompt before its own and a small mask, so that softcaps, sinks,
windows and scaling stay the model's. No (L, L) mask exists, and no work is done between trees, nor between completions.

What a forest looks like reaches the mask function by a context variable. What the layers get as their attention mask is
an empty tensor that carries the small masks: gradient checkpointing hands the same object to a layer again in backward.
Without a forest both functions are the model's own, so generation and plain scoring go on as before.

On a card the same functions hand the whole row to one kernel (`flex_attention`), and models that keep their attention to
themselves take the forest as one mask (`forest_mask`). Which of these forms a model uses is put there by
`use_forest_attention` and said by `forest_form`, and nowhere else.

Sources: `transformers.AttentionInterface`, `transformers.AttentionMaskInterface`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from dpo_engine.batch.forest import ForestShape
from dpo_engine.model.flex_attention import attend, forest_blocks, why_not_flex

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIXES = {"blocks": "dpo_engine_blocks_", "trees": "dpo_engine_forest_"}
FORMS = ("blocks", "trees", "mask")
"""Forms of forest attention, the fastest first."""
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
        form: "blocks", one kernel on a CUDA card; "trees", the model's own attention called completion by completion; or
            "mask", one additive mask for the whole row.
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
    elif model._can_set_attn_implementation() and (form == "trees" or why_not_flex(model) is None):
        _register(own, form)
        model.set_attn_implementation(_PREFIXES[form] + own)
    return forest_form(model) == form


def forest_form(model: PreTrainedModel) -> str | None:
    """Which form of forest attention is in effect: "blocks", "trees", "mask", or None."""
    for form, prefix in _PREFIXES.items():
        if model.config._attn_implementation.startswith(prefix):
            return form
    return "mask" if getattr(model, "takes_forest_mask", False) else None


def restore_attention(model: PreTrainedModel) -> None:
    """Give the model its own attention back."""
    name = model.config._attn_implementation
    for prefix in _PREFIXES.values():
        if name.startswith(prefix):
            model.set_attn_implementation(name.removeprefix(prefix))
    if hasattr(model, "takes_forest_mask"):
        delattr(model, "takes_forest_mask")


@dataclass(frozen=True)
class _Stretches:
    """`ForestShape.stretches` and what each token of one may see: (1, 1, queries, keys) to be added to attention scores, or
    None for all that came before."""

    stretches: tuple[tuple[int, int, int, int], ...]
    masks: tuple[Tensor | None, ...]


def _register(own: str, form: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    own_mask = ALL_MASK_ATTENTION_FUNCTIONS[own]
    # Without a mask, sdpa takes a stretch for causal, and does half the work; eager would let it see what comes later.
    forest_masks = partial(_stretch_masks, causal_is_none=own == "sdpa") if form == "trees" else forest_blocks

    def mask(*args: Any, **kwargs: Any) -> Any:
        shape = _current.get()
        return own_mask(*args, **kwargs) if shape is None else _holder(forest_masks(shape, **kwargs), shape)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        forest = getattr(attention_mask, "forest", None)
        if isinstance(forest, BlockMask):
            return attend(module, query, key, value, forest, *args, **kwargs)
        own_attention = _own_attention(module, own)
        if forest is None:
            return own_attention(module, query, key, value, attention_mask, *args, **kwargs)
        outputs = []
        for (prompt, end, first, last), seen in zip(forest.stretches, forest.masks, strict=True):
            keys, values = (_joined(x, prompt, end, first, last) for x in (key, value))
            outputs.append(own_attention(module, query[:, :, first:last], keys, values, seen, *args, **kwargs)[0])
        return torch.cat(outputs, 1), None  # (1, L, heads, head_dim)

    AttentionInterface.register(_PREFIXES[form] + own, attention)
    AttentionMaskInterface.register(_PREFIXES[form] + own, mask)


def _own_attention(module: nn.Module, own: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that this module would have called by itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if own != "eager":
        return ALL_ATTENTION_FUNCTIONS[own]
    return sys.modules[type(module).__module__].eager_attention_forward


def _joined(x: Tensor, prompt: int, end: int, first: int, last: int) -> Tensor:
    """(1, heads, keys, head_dim) a stretch's keys or values: those of its prompt, then its own."""
    own = x[:, :, first:last]
    return own if prompt == end else torch.cat([x[:, :, prompt:end], own], 2)


def _stretch_masks(
    shape: ForestShape,
    *,
    mask_function: Callable[..., Any],
    causal_is_none: bool,
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> _Stretches:
    """The masks of `mask_function` on positions."""
    from transformers.masking_utils import causal_mask_function

    positions, least = shape.position_ids[0], torch.finfo(dtype).min
    masks: list[Tensor | None] = []
    for prompt, end, first, last in shape.stretches:
        if causal_is_none and prompt == end and mask_function is causal_mask_function:
            masks.append(None)
            continue
        own = positions[first:last]
        seen = mask_function(0, 0, own[:, None], torch.cat([positions[prompt:end], own])[None, :])
        masks.append(torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, least)[None, None])
    return _Stretches(stretches=shape.stretches, masks=tuple(masks))


def _holder(forest: _Stretches | BlockMask, shape: ForestShape) -> Tensor:
    """The layers' attention mask: an empty tensor that carries what our attention reads."""
    holder: Any = shape.position_ids.new_empty(0)  # on their device: a copy to another would carry nothing
    holder.forest = forest
    return holder
