"""Whatever is said in how many turns, are the ids those of the whole conversation and the mask exactly the assistant's?"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.data import tokenize_pairs
from dpo_engine.data.pairs import MERGED
from dpo_engine.errors import DataError
from support import small_tokenizers as small
from support.small_tokenizers import small_tokenizer

WORDS = st.sampled_from(["the cat", " the", " ", "\n", "\n\n", "Answer:", "é", "猫", "🐈", "</", "a", "?"])
TEXTS = st.lists(WORDS, max_size=4).map("".join)
OTHERS = st.sampled_from(["user", "tool", "system", "assistant"])


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@st.composite
def completions(draw: st.DrawFn) -> list[dict[str, str]]:
    """Turns that begin and end with the assistant's, of which the last says something."""
    between = draw(st.lists(st.builds(_said, OTHERS, TEXTS), max_size=4))
    first = [_said("assistant", draw(TEXTS))] if between or draw(st.booleans()) else []
    return [*first, *between, _said("assistant", draw(TEXTS.filter(str.strip)))]


TOKENIZERS = {
    (kind, name): small_tokenizer(kind, chat_template=template)
    for kind in ("words", "merging")
    for name, template in [("ChatML", small.CHATML), ("two ends", small.TWO_ENDS), ("BOS", small.WITH_BOS)]
}


@pytest.mark.parametrize("key", TOKENIZERS, ids=" ".join)
@settings(max_examples=40, deadline=None)
@given(prompt=TEXTS, chosen=completions(), rejected=completions())
def test_the_mask_covers_the_assistants_words_and_ends_and_the_ids_are_the_conversations(
    key: tuple[str, str], prompt: str, chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> None:
    tokenizer: Any = TOKENIZERS[key]
    messages = [_said("user", prompt)]
    try:
        data = tokenize_pairs(
            [{"prompt": messages, "chosen": chosen, "rejected": rejected}], tokenizer, max_length=None
        )
    except DataError as error:
        assert chosen == rejected, error
        return
    (tree,) = data
    merged = False
    for turns, ids, mask in zip((chosen, rejected), tree.completions, tree.scored_masks, strict=True):
        text = tokenizer.apply_chat_template(messages + turns, tokenize=False)
        tail = "<|im_end|>\n" + "</s>" * (key[1] == "two ends")
        whole = tokenizer(text.removesuffix(tail) + "<|im_end|>", add_special_tokens=False)["input_ids"]
        merged |= tree.prompt_ids + ids != whole
        assert tokenizer.decode(tree.prompt_ids + ids) == text.removesuffix(tail) + "<|im_end|>"
        # the conversation written by hand, with every token's characters marked as scored or not
        parts = [(turn["content"] + "<|im_end|>", turn["role"] == "assistant") for turn in turns]
        heads = [""] + [f"\n<|im_start|>{turn['role']}\n" for turn in turns[1:]]
        expected = ""
        for head, (said, is_scored) in zip(heads, parts, strict=True):
            expected += "0" * len(head.encode()) + str(int(is_scored)) * len(said.encode())
        assert _by_bytes(tokenizer, ids, mask) == expected
    assert merged == any(MERGED in note for note in data.report.notes)


def _by_bytes(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    """One digit for each byte of the text: 1 where its token is scored."""
    digits = ""
    for token, is_scored in zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True):
        # byte-level vocabularies write one character a byte; markers are themselves
        digits += str(int(is_scored)) * len(token)
    return digits
