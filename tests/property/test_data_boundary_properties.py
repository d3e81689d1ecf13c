"""Whatever the text, is nothing lost, doubled or moved across the boundary between prompt and completion?"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.data import tokenize_pairs
from dpo_engine.data.pairs import MERGED
from dpo_engine.data.strict_json import StrictDecoder, value_fault
from dpo_engine.errors import DataError
from support import small_tokenizers as small
from support.small_tokenizers import small_tokenizer

WORDS = st.sampled_from(["the cat", " the", " ", "\n", "\n\n", "Answer:", "ran", "é", "猫", "🐈", "</", "a", "?"])
TEXTS = st.lists(WORDS, max_size=6).map("".join) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=8
)
COMPLETIONS = TEXTS.filter(str.strip)

TOKENIZERS = {
    (kind, name): small_tokenizer(kind, chat_template=template, adds_bos=kind == "words")
    for kind in ("words", "merging")
    for name, template in [("plain", None), ("ChatML", small.CHATML), ("two ends", small.TWO_ENDS)]
}


def _pair(tokenizer: Any, prompt: str, chosen: str, rejected: str) -> Any:
    try:
        return tokenize_pairs([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], tokenizer, max_length=None)
    except DataError as error:
        assert chosen == rejected, error
        return None


@pytest.mark.parametrize("key", TOKENIZERS, ids=" ".join)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, chosen=COMPLETIONS, rejected=COMPLETIONS)
def test_the_ids_decode_to_the_text_and_the_prompt_is_what_is_asked(
    key: tuple[str, str], prompt: str, chosen: str, rejected: str
) -> None:
    tokenizer = TOKENIZERS[key]
    data = _pair(tokenizer, prompt, chosen, rejected)
    if data is None:
        return
    (tree,) = data
    asked = prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tree.prompt_ids == tokenizer(asked, add_special_tokens=False)["input_ids"]
    elif prompt:
        assert tree.prompt_ids == tokenizer(prompt)["input_ids"]
    begins_with_bos = not tokenizer.chat_template and (key[0] == "words" or not prompt)
    start = "<s>" * begins_with_bos + asked
    end = "<|im_end|>" if tokenizer.chat_template else "</s>"
    merged = False
    for completion, text in zip(tree.completions, (chosen, rejected), strict=True):
        assert tokenizer.decode(tree.prompt_ids + completion) == start + text + end
        assert completion.count(tokenizer.convert_tokens_to_ids(end)) == 1
        together = tokenizer(asked + text, add_special_tokens=False)["input_ids"]
        alone = tokenizer(asked, add_special_tokens=False)["input_ids"]
        if together[: len(alone)] == alone:
            assert together == alone + completion[:-1]
        else:
            merged = True
            assert completion[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any(MERGED in note for note in data.report.notes) == merged


SENTENCEPIECE = small_tokenizer("sentencepiece")
ASCII = st.lists(st.sampled_from(["the cat", " the", " ", "c", "at", "Answer:", " on"]), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(prompt=ASCII.map("".join), chosen=ASCII.map("".join).filter(str.strip), rejected=st.just("Zebra"))
def test_no_space_appears_at_the_boundary_with_a_tokenizer_that_puts_one_before_texts(
    prompt: str, chosen: str, rejected: str
) -> None:
    data = _pair(SENTENCEPIECE, prompt, chosen, rejected)
    assert data is not None
    written = (prompt if prompt.startswith(" ") else " " + prompt).replace(" ", "\u2581")
    for completion, text in zip(data[0].completions, (chosen, rejected), strict=True):
        tokens = SENTENCEPIECE.convert_ids_to_tokens(data[0].prompt_ids + completion)
        assert "".join(tokens) == written + text.replace(" ", "\u2581") + "</s>"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda child: (
        st.lists(child, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), child, max_size=3)
    ),
    max_leaves=8,
)


@given(value=JSON_VALUES)
def test_strict_json_gives_what_json_gives_or_a_fault(value: Any) -> None:
    """`json.dumps` writes NaN, Infinity and lone surrogates as `json.loads` reads them: exactly these are faults."""
    text = json.dumps(value)
    decoded, fault = StrictDecoder().decode(text)
    strict_number = all(word not in _without_strings(value) for word in ("nan", "inf"))
    if fault is None:
        assert decoded == value and strict_number
    else:
        assert value_fault(value) == fault or not strict_number


@given(text=st.text(max_size=40))
def test_strict_json_never_accepts_what_json_refuses(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = ValueError
    try:
        decoded, fault = StrictDecoder().decode(text)
    except ValueError:
        assert expected is ValueError
    else:
        assert fault is not None or decoded == expected


def _without_strings(value: Any) -> str:
    """The numbers of a value, as text."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(map(_without_strings, value))
    return "" if isinstance(value, str) else repr(value)
