"""Does a view of tokens show every character once, whole, and nothing that a terminal would obey?"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.data.token_view import token_pieces, visible
from support.small_tokenizers import small_tokenizer

TOKENIZERS = {kind: small_tokenizer(kind) for kind in ("words", "merging", "sentencepiece")}


def _pieces(kind: str, text: str) -> tuple[list[int], list]:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, token_pieces(tokenizer, ids, [True] * len(ids))


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(
    text=st.lists(st.sampled_from(["the cat", " ", "\n", "é", "猫", "🐈", "a\n\n", "<|im_end|>", "Zu"])).map("".join)
)
def test_pieces_hold_all_ids_in_order_and_their_texts_are_the_text(kind: str, text: str) -> None:
    ids, pieces = _pieces(kind, text)
    assert [index for piece in pieces for index in piece.ids] == ids
    shown = "".join(piece.text for piece in pieces)
    assert shown == TOKENIZERS[kind].decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "\ufffd" not in shown
    assert [piece.text for piece in pieces if piece.special] == ["<|im_end|>"] * text.count("<|im_end|>")


def test_a_character_of_several_tokens_is_one_piece_and_others_are_one_token_each() -> None:
    _, pieces = _pieces("words", "the 🐈 cat")
    assert "".join(piece.text for piece in pieces if len(piece.ids) > 1).strip() == "🐈"
    assert all(len(piece.ids) == 1 for piece in pieces if "🐈" not in piece.text)


def test_a_piece_does_not_reach_from_scored_into_unscored_tokens() -> None:
    tokenizer = TOKENIZERS["words"]
    ids = tokenizer("🐈", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    pieces = token_pieces(tokenizer, ids, [True] + [False] * (len(ids) - 1))
    assert pieces[0].ids == (ids[0],) and pieces[0].scored and not any(piece.scored for piece in pieces[1:])


def test_a_sentencepiece_token_keeps_its_space_at_the_start_of_a_completion() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer("where is the cat", add_special_tokens=False)["input_ids"]
    cut = next(index for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if index and token[0] == "▁")
    pieces = token_pieces(tokenizer, ids[cut:], [True] * len(ids[cut:]), before=ids[:cut])
    assert pieces[0].text.startswith(" ")


def test_white_space_is_marked_and_control_characters_are_escaped() -> None:
    assert visible("a b\n\tc") == "a·b↵→c"
    assert visible("\x1b[31mred\u202e\u200b\u00a0\r") == "\\x1b[31mred\\u202e\\u200b\\xa0\\r"
    assert visible("é猫🐈") == "é猫🐈"
