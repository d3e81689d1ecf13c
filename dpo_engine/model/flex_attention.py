"""How does a forest attend on a CUDA card, in one kernel for all its trees?

By torch's FlexAttention. A block mask names the blocks of 128 queries by 128 keys in which anything is seen, so that the
work between trees is not done, and one rule, the same for every model and forest, decides within a block:

    q sees k  iff  tree[k] == tree[q]  and  branch[k] in (-1, branch[q])  and  lowest[q] <= position[k] <= position[q]

What a layer limits beyond causality, a window or a chunk, is in `lowest`: it is read from the model's own mask function, on
positions, and a limit that is not of that shape is refused. All four are tensors that the rule captures, forests are padded
to multiples of 128 tokens (the padding is a tree of its own), and lengths are symbolic: the kernel is compiled once.

Sinks, biases by position and dropout of attention weights are not in it; models that have them attend by trees. Nor do
CPUs, where FlexAttention has no backward pass. A probe runs the kernel forward and backward before it is chosen (`layout`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dpo_engine.batch.forest import ForestShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 128
_SLAB = 1024  # rows of a mask that are evaluated at a time
_SMALL = (
    100 * 1024
)  # bytes of shared memory in a multiprocessor of sm_86, sm_89, sm_120; a block of threads gets 99 KiB
_SMALLER_BLOCKS = {"BLOCK_M1": 16, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 16}
_DROPS = re.compile(r"att(ention|n).*drop")


def padded_forest(row: Tensor, shape: ForestShape) -> tuple[Tensor, ForestShape]:
    """(1, L) tokens and what they see, with a last tree of token 0 up to a multiple of `BLOCK`."""
    length = row.shape[1]
    more = max(-length % BLOCK, 2 * BLOCK - length)  # a single block would be compiled for by itself
    if not more:
        return row, shape
    positions = torch.arange(more, device=row.device)[None]
    return nn.functional.pad(row, (0, more)), ForestShape(
        spans=(*shape.spans, (length, length + more)),
        stretches=(*shape.stretches, (length, length, length, length + more)),
        position_ids=torch.cat([shape.position_ids, positions], 1),
        branches=nn.functional.pad(shape.branches, (0, more), value=-1),
    )


def forest_blocks(shape: ForestShape, *, mask_function: Callable[..., Any], **_: Any) -> BlockMask:
    """The block mask of a padded forest, in a kind of layer.

    Args:
        mask_function: the model's own rule for that kind, `(batch, head, query, key) -> seen`.

    Raises:
        ValueError: what it shows a query is not the positions from some first one up to its own.
    """
    positions, device = shape.position_ids[0], shape.branches.device
    lengths = torch.tensor([last - first for first, last in shape.spans], device=device)
    total = shape.spans[-1][1]
    trees = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=total)
    # Positions restart in every tree, so none has a position beyond the longest tree's tokens.
    lowest = _lowest_seen(mask_function, max(last - first for first, last in shape.spans), device)[positions]
    rule = _rule(trees, shape.branches, positions, lowest)
    return _compiled_block_mask()(rule, None, None, total, total, device=str(device))


def attend(
    module: nn.Module,
    query: Tensor,  # (1, heads, L, head_dim)
    key: Tensor,  # (1, key heads, L, head_dim)
    value: Tensor,
    blocks: BlockMask,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer's own attention gives, as transformers calls it: (1, L, heads, head_dim), no weights.

    Raises:
        ValueError: the layer needs what the kernel does not have.
    """
    asked = [name for name in ("s_aux", "sinks", "position_bias") if others.get(name) is not None]
    if asked or dropout:
        raise ValueError(f"FlexAttention has no {', '.join(asked) or 'dropout'}; expected a model without")
    output = _compiled_attention()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(query.new_full((), softcap, dtype=torch.float32)),
        block_mask=blocks,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_kernel_options(query),
    )
    return output.transpose(1, 2).contiguous(), None


def why_not_flex(model: PreTrainedModel) -> str | None:
    """None where the kernel has what the model needs, as far as its config tells; else why it is not used."""
    if model.device.type != "cuda":
        return f"FlexAttention has no backward pass on {model.device.type}"
    for name, value in model.config.get_text_config().to_dict().items():
        if _DROPS.search(name) and value:
            return f"FlexAttention has no dropout, and the model has {name}={value}"
    return None


def _rule(trees: Tensor, branches: Tensor, positions: Tensor, lowest: Tensor) -> Callable[..., Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        here = (trees[query] == trees[key]) & ((branches[key] < 0) | (branches[key] == branches[query]))
        return here & (positions[key] <= positions[query]) & (positions[key] >= lowest[query])

    return sees


def _lowest_seen(mask_function: Callable[..., Any], count: int, device: torch.device) -> Tensor:
    """(count,) the first position that each position sees, `count` where it sees none."""
    keys = torch.arange(count, device=device)
    lowest, good = [], torch.ones((), dtype=torch.bool, device=device)
    for first in range(0, count, _SLAB):
        queries = keys[first : first + _SLAB, None]
        seen = mask_function(0, 0, queries, keys[None, :]).expand(len(queries), count)
        # Of a kind of layer that it does not have, a model may give a rule that shows nothing (a window of 0).
        low = seen.to(torch.uint8).argmax(1, keepdim=True).masked_fill(~seen.any(1, keepdim=True), count)
        good &= (seen == ((keys <= queries) & (keys >= low))).all()
        lowest.append(low[:, 0])
    if not bool(good):
        raise ValueError("a layer's mask shows a token other positions than those from a first one up to its own")
    return torch.cat(lowest)


def _capped(softcap: Tensor) -> Callable[..., Tensor]:
    """By a tensor, since a captured number becomes symbolic under `dynamic=True`, and the kernel takes none of those."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _kernel_options(query: Tensor) -> dict[str, Any] | None:
    """Smaller blocks for the backward pass of wide heads where the usual ones do not fit."""
    if not query.is_cuda or query.shape[-1] <= 128:
        return None
    memory = torch.cuda.get_device_properties(query.device).shared_memory_per_multiprocessor
    return _SMALLER_BLOCKS if memory <= _SMALL else None


@functools.cache
def _compiled_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _compiled_block_mask() -> Any:
    return torch.compile(create_block_mask, dynamic=True)
