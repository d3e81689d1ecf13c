"""Up to which length does a row's rope not look at the whole row?

Most rotary embeddings turn a position into angles and look at nothing else. Two look at the longest position of the row:
beyond a threshold, dynamic NTK changes all frequencies with it, and longrope switches to another set. There a neighbour in
the row would change what a sequence computes, so longer ones are laid out alone (`Layout.longest`).

The threshold is measured, not read: a copy of the model's own rotary embedding is asked for the same four positions, alone
and beside a far one, and where the answers differ, bisection finds from where on. The module costs nothing to ask about
real lengths, so no threshold has to be shrunk for it.

Dynamic NTK also remembers: a row no longer than the longest before it, and not below the threshold, is computed with that
one's frequencies. `forget_longer_rows` makes a row's numbers its own, whatever came before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASKED = 4  # positions 0, 1, 2, 3
_FAR = 1 << 24
"""No row is longer."""


def longest_free_row(model: PreTrainedModel) -> int | None:
    """The length in tokens up to which the rope of a row does not depend on its longest position; None for any length.

    Raises:
        RuntimeError, TypeError, ValueError: a rotary embedding that cannot be called with positions alone.
    """
    lengths = [_longest_free(rotary, kind) for rotary, kind in _rotary_embeddings(model)]
    return min((length for length in lengths if length is not None), default=None)


def forget_longer_rows(model: nn.Module) -> None:
    """Give dynamic ropes their first frequencies back, as in a model that has not yet seen a row beyond the threshold."""
    for rotary, kind in _rotary_embeddings(model):
        rope_type = rotary.rope_type if kind is None else rotary.rope_type[kind]
        if "dynamic" in rope_type:
            _forget(rotary, "" if kind is None else f"{kind}_")


def has_dynamic_rope(config: Any) -> bool:
    """Whether the config names a rope that remembers (cheap; asked before every forward)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    return any("dynamic" in str(p.get("rope_type", p.get("type"))) for p in by_layer)


def _rotary_embeddings(model: nn.Module) -> Iterator[tuple[Any, str | None]]:
    """Each rotary embedding, once per kind of layer that has frequencies of its own there."""
    for module in model.modules():
        if "rope_type" not in vars(module) or "max_seq_len_cached" not in vars(module):
            continue
        if isinstance(module.rope_type, dict):
            yield from ((module, kind) for kind in module.rope_type)
        else:
            yield module, None


def _forget(rotary: Any, prefix: str) -> None:
    cached = getattr(rotary, f"{prefix}max_seq_len_cached", rotary.max_seq_len_cached)
    if cached > rotary.original_max_seq_len:
        first = getattr(rotary, f"{prefix}original_inv_freq").to(getattr(rotary, f"{prefix}inv_freq").device)
        rotary.register_buffer(f"{prefix}inv_freq", first, persistent=False)
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)


def _longest_free(rotary: Any, kind: str | None) -> int | None:
    """The largest row length that changes nothing for the first positions; None if none does."""
    alone = _angles(rotary, kind, _ASKED)
    if torch.equal(_angles(rotary, kind, _FAR), alone):
        return None
    free, bound = _ASKED, _FAR  # a row of `free` tokens changes nothing, one of `bound` does
    while bound - free > 1:
        middle = (free + bound) // 2
        if torch.equal(_angles(rotary, kind, middle), alone):
            free = middle
        else:
            bound = middle
    return free


def _angles(rotary: Any, kind: str | None, length: int) -> Tensor:
    """What a fresh copy of `rotary` answers for the first positions of a row of `length` tokens."""
    fresh = copy.deepcopy(rotary, {id(rotary.config): rotary.config})
    forget_longer_rows(fresh)
    device = next(fresh.buffers()).device
    positions = torch.tensor([[*range(_ASKED), length - 1]], device=device)
    arguments: dict[str, Any] = {"position_ids": positions}
    if kind is not None and "layer_type" in inspect.signature(fresh.forward).parameters:
        arguments["layer_type"] = kind
    with torch.no_grad():
        answer = fresh(torch.zeros(1, 1, 1, device=device), **arguments)
    parts = answer if isinstance(answer, tuple) else (answer,)
    real = [torch.view_as_real(part).flatten(-2) if part.is_complex() else part for part in parts]
    return torch.cat([part[:, :_ASKED].flatten() for part in real])
