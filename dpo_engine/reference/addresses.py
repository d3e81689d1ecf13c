"""Under which address do a completion's reference log-probs lie? Under what decides them, beside the model: its tokens.

    address = blake2b(prompt ids, completion ids, which of them are scored)

Text, template and tokenizer are in it only by the ids that they came to, so that changing one of them misses exactly the rows
whose ids change. Position in a file, seed, epoch, batch and packing are not in it.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from dpo_engine.batch.forest import TokenTree

ADDRESS_BYTES = 16
_PERSON = b"dpo-entry-1"


def entry_addresses(tree: TokenTree) -> list[bytes]:
    """One address of `ADDRESS_BYTES` for each completion of a tree.

    Args:
        tree: its `scored` masks count; weights do not, since values are per token.

    Raises:
        OverflowError: an id that is no 32-bit integer.
    """
    prompt = blake2b(_encoded(tree.prompt_ids), digest_size=ADDRESS_BYTES, person=_PERSON)
    masks = getattr(tree, "scored", None) or [None] * len(tree.completions)
    addresses = []
    for ids, mask in zip(tree.completions, masks, strict=True):
        entry = prompt.copy()
        entry.update(_encoded(ids))
        if mask is not None and not all(mask):  # a mask of ones is no mask
            entry.update(bytes(bool(scored) for scored in mask))
        addresses.append(entry.digest())
    return addresses


def _encoded(ids: Sequence[int]) -> bytes:
    """The number of ids, then the ids, little-endian, so that no two lists of lists read alike."""
    numbers = array("i", ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return struct.pack("<Q", len(ids)) + numbers.tobytes()
