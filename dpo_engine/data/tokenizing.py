"""Which token ids are the prompt, and which are each completion?

    ids(prompt + completion) == prompt_ids + completion_ids        wherever ids(prompt) begins ids(prompt + completion)

Where it does not, because the tokenizer merges characters across the boundary, the prompt keeps the ids it has alone,
which are the ids the model sees when it is asked, and the completion is tokenised on its own. No completion token ever
leaks into the prompt. The same holds at every boundary within a completion, where scored and unscored parts meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_engine.data.templates import Part, RenderedTree
from dpo_engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTree:
    """A tree's token ids before truncation."""

    prompt_ids: list[int]
    completions: tuple[list[int], ...]
    """Each with its end token; empty when its text has no tokens."""
    scored: tuple[list[bool], ...] | None
    """Which tokens of each completion are scored; None: all of them."""
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
            for parts in tree.completions:
                texts += _prefixes(tree.prompt, parts)
        ids = iter(self._ids(texts))
        return [self._encoded(tree, ids) for tree in trees]

    def _encoded(self, tree: RenderedTree, ids: Iterator[list[int]]) -> EncodedTree:
        """`ids` gives those of the prompt, and then those of each completion's prefixes."""
        prompt = next(ids)
        found = [self._completion(prompt, parts, ids) for parts in tree.completions]
        every = all(all(mask) for _, mask, _ in found)
        return EncodedTree(
            prompt_ids=self._compact(self._with_bos(prompt)),
            completions=tuple(self._compact(completion) for completion, _, _ in found),
            scored=None if every else tuple(mask for _, mask, _ in found),
            merged=any(merged for _, _, merged in found),
        )

    def _completion(
        self, prompt: list[int], parts: Sequence[Part], prefixes: Iterator[list[int]]
    ) -> tuple[list[int], list[bool], bool]:
        """A completion's ids, which of them are scored, and whether the tokenizer merges across a boundary."""
        so_far, mask, merged = prompt, [], False
        for text, is_scored in parts:
            whole = next(prefixes)
            if whole[: len(so_far)] != so_far:
                merged = True
                whole = so_far + self._continuation(text)
            mask += [is_scored] * (len(whole) - len(so_far))
            so_far = whole
        completion = so_far[len(prompt) :]
        if self._eos is not None and completion and completion[-1] != self._eos:
            completion, mask = [*completion, self._eos], [*mask, True]
        return completion, mask, merged

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


def _prefixes(prompt: str, parts: Sequence[Part]) -> Iterator[str]:
    """The text up to the end of each part."""
    text = prompt
    for part, _ in parts:
        text += part
        yield text
