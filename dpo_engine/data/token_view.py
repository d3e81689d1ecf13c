"""Which characters does each token of a row stand for, and is it scored?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
_MOST_TOKENS = 8
"""Of one piece; a character of 4 bytes is 4 tokens at most, and tokens may overlap two characters."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""How sentencepiece writes the bytes of characters it has no token for: text, whatever list they stand in."""
_SHOWN = {" ": "·", "\n": "↵", "\t": "→"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Tokens that are whole characters together: one token, unless a character is spread over several."""

    ids: tuple[int, ...]
    text: str
    scored: bool
    special: bool
    """A marker of the vocabulary rather than text, such as <|im_end|>."""


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], scored: Sequence[bool], before: Sequence[int] = ()
) -> list[Piece]:
    """The pieces of `ids`, in order and without gaps.

    Args:
        tokenizer: made the ids.
        ids: token ids, (n,).
        scored: which of them are scored, (n,).
        before: ids in front of these, since some tokenizers write a token's leading space only behind another token.
    """
    special = _special_ids(tokenizer)
    pieces: list[Piece] = []
    last, begin = list(before[-1:]), 0
    for end in range(1, len(ids) + 1):
        own = list(ids[begin:end])
        text = _text_behind(tokenizer, last, own)
        goes_on = end < len(ids) and ids[end] not in special and scored[end] == scored[begin]
        if text.endswith(_BROKEN) and goes_on and len(own) < _MOST_TOKENS:
            continue
        pieces.append(Piece(ids=tuple(own), text=text, scored=scored[begin], special=own[0] in special))
        last, begin = own, end
    return pieces


def visible(text: str) -> str:
    """`text` with its white space as marks; what a terminal would obey or not show is escaped."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if unicodedata.category(character)[0] in "CZ":  # control and format characters, other spaces
        return character.encode("unicode_escape").decode("ascii")
    return character


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index: str(token) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    added |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {index for index, token in added.items() if token.strip() and not _BYTE.fullmatch(token)}


def _text_behind(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """What `ids` add to the text of `before`."""
    head, whole = _decoded(tokenizer, before), _decoded(tokenizer, before + ids)
    return whole[len(head) :] if whole.startswith(head) else _decoded(tokenizer, ids)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
