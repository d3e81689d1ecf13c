"""Which token ids are the prompt, and which are each completion?

    ids(prompt + completion) == prompt_ids + completion_ids        wherever ids(prompt) begins ids(prompt + completion)

Where it does not, because the tokenizer merges characters across the boundary, the prompt keeps the ids it has alone,
which are the ids the model sees when it is asked, and the completion is tokenised on its own. No completion token ever
leaks into the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_engine.data.templates import RenderedTree
from dpo_engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTree:
    """A tree's token ids before truncation."""

    prompt_ids: list[int]
    completions: tuple[list[int], ...]
    """Each with its end token; empty when its text has no tokens."""
    merged: bool
    """The tokenizer merges across the boundary of a completion."""


_SPACE_MARKS = ("\u2581", "\u0120")
"""How sentencepiece and byte-level vocabularies write a space."""


class TreeEncoder:
    """Turns rendered trees into ids.

    Args:
        tokenizer: Any transformers tokenizer.
        adds_bos: Put before each prompt what the tokenizer puts before a text (BOS, mostly), unless the text brings it.
        appends_eos: Put the EOS token after each completion that does not end with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, adds_bos: bool, appends_eos: bool) -> None:
        if appends_eos and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so completions cannot be ended: set tokenizer.eos_token")
        self._tokenizer = tokenizer
        self._prefix = self._ids_before_text() if adds_bos else []
        self._eos = tokenizer.eos_token_id if appends_eos else None
        first = "".join(tokenizer.convert_ids_to_tokens(self._ids(["a"])[0]))[:1]
        # sentencepiece and some byte-level tokenizers put a space before a text that stands alone
        self._pads_with_space = first in _SPACE_MARKS
        self._shared: dict[int, int] = {}

    def encode(self, trees: Sequence[RenderedTree]) -> list[EncodedTree]:
        """Encodes a batch of trees by one call of the tokenizer."""
        texts = []
        for tree in trees:
            texts.append(tree.prompt)
            texts.extend(tree.prompt + completion for completion in tree.completions)
        ids = iter(self._ids(texts))
        return [self._split(tree, next(ids), [next(ids) for _ in tree.completions]) for tree in trees]

    def _split(self, tree: RenderedTree, prompt: list[int], wholes: list[list[int]]) -> EncodedTree:
        merged, completions = False, []
        for text, whole in zip(tree.completions, wholes, strict=True):
            if whole[: len(prompt)] == prompt:
                completion = whole[len(prompt) :]
            else:
                merged = True
                completion = self._continuation(text)
            if self._eos is not None and completion and completion[-1] != self._eos:
                completion = [*completion, self._eos]
            completions.append(self._compact(completion))
        return EncodedTree(
            prompt_ids=self._compact(self._with_bos(prompt)), completions=tuple(completions), merged=merged
        )

    def _with_bos(self, prompt: list[int]) -> list[int]:
        if not self._prefix:
            bos = self._tokenizer.bos_token_id
            return prompt if prompt or bos is None else [bos]
        return prompt if prompt[: len(self._prefix)] == self._prefix else self._prefix + prompt

    def _continuation(self, text: str) -> list[int]:
        """Ids of `text` as it continues something, so without the space that is put before a text on its own."""
        if self._pads_with_space:
            for anchor in ("\n", "0", "a"):
                head, whole = self._ids([anchor, anchor + text])
                if whole[: len(head)] == head:
                    return whole[len(head) :]
        return self._ids([text])[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # transformers raises IndexError for an empty batch
            return []
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _ids_before_text(self) -> list[int]:
        bare, dressed = self._ids(["a"])[0], self._tokenizer("a")["input_ids"]
        starts = (start for start in range(len(dressed)) if dressed[start : start + len(bare)] == bare)
        return dressed[: next(starts, 0)]

    def _compact(self, ids: list[int]) -> list[int]:
        """The same ids as one shared object each: 8 bytes a token instead of 36."""
        share = self._shared.setdefault
        return [share(token, token) for token in ids]
