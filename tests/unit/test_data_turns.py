"""In a completion of several turns, are exactly the assistant's tokens scored, each turn's end token included?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpo_engine.batch import build_forest
from dpo_engine.data import PairData, TokenizedTree, tokenize_pairs
from dpo_engine.data.pairs import MERGED
from dpo_engine.data.truncation import truncate_tree
from dpo_engine.errors import DataError
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from support import small_tokenizers as small
from support.small_tokenizers import small_tokenizer
from support.tiny_pairs import tiny_llama


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USER = _said("user", "where is the cat?")
CHOSEN = [_said("assistant", "on the mat"), _said("user", "and the dog?"), _said("assistant", "after the cat")]
REJECTED = [_said("assistant", "ran away")]
ROW = {"prompt": [USER], "chosen": CHOSEN, "rejected": REJECTED}


def _pairs(row: dict[str, Any], template: str = small.CHATML, kind: str = "words", **options: Any) -> PairData:
    return tokenize_pairs([row], small_tokenizer(kind, chat_template=template), **({"max_length": None} | options))


def _scored_text(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    """The text of a completion with [brackets] around what is scored."""
    text, inside = "", False
    for token, is_scored in zip(ids, mask, strict=True):
        if is_scored != inside:
            text += "[" if is_scored else "]"
            inside = is_scored
        text += tokenizer.decode([token], skip_special_tokens=False)
    return text + "]" * inside


@pytest.mark.parametrize("kind", ["words", "merging"])
@pytest.mark.parametrize(
    ("template", "scored"),
    [
        (
            small.CHATML,
            "[on the mat<|im_end|>]\n<|im_start|>user\nand the dog?<|im_end|>\n<|im_start|>assistant\n"
            "[after the cat<|im_end|>]",
        ),
        (
            small.TWO_ENDS,
            "[on the mat<|im_end|>]\n<|im_start|>user\nand the dog?<|im_end|>\n<|im_start|>assistant\n"
            "[after the cat<|im_end|>]",
        ),
        (
            small.TRIMS_ANSWER_SPACE,
            "[on the mat<|im_end|>]<|im_start|>user:and the dog?<|im_end|><|im_start|>assistant:[after the cat<|im_end|>]",
        ),
        (
            small.THINKS_LAST,
            "[on the mat<|im_end|>]\n<|im_start|>user\nand the dog?<|im_end|>\n<|im_start|>assistant\n"
            "[<think>\n\n</think>\n\nafter the cat<|im_end|>]",
        ),
        # there is no end token in the text: as for a single answer, EOS is added where the completion ends
        (small.WITHOUT_END, "[on the mat]\nuser: and the dog?\nassistant: [after the cat</s>]"),
    ],
    ids=["ChatML", "two ends", "trims", "thinks last", "no end"],
)
def test_the_assistants_words_and_end_tokens_are_scored_and_nothing_between_them(
    template: str, scored: str, kind: str
) -> None:
    data = _pairs(ROW, template, kind)
    (tree,) = data
    tokenizer = small_tokenizer(kind, chat_template=template)
    assert tree.scored is not None and all(tree.scored[1])
    shown = _scored_text(tokenizer, tree.completions[0], tree.scored[0])
    if not data.report.notes:  # else the prompt of "trims" holds a space that answers lack
        assert tokenizer.decode(tree.prompt_ids) == tokenizer.apply_chat_template(
            [USER], tokenize=False, add_generation_prompt=True
        )
    assert shown == scored


@pytest.mark.parametrize(
    "roles", [("user",), ("tool",), ("system", "user"), ("tool", "user"), ("assistant", "tool"), ()]
)
def test_turns_of_anybody_else_are_not_scored(roles: tuple[str, ...]) -> None:
    between = [_said(role, f"the {role} ran") for role in roles]
    row = ROW | {"rejected": [*REJECTED, *between, _said("assistant", "the mat")]}
    tree = _pairs(row)[0]
    tokenizer = small_tokenizer(chat_template=small.CHATML)
    expected = "[ran away<|im_end|>]"
    for message in between:
        mine = message["role"] == "assistant"
        expected += f"\n<|im_start|>{message['role']}\n" + "[" * mine + message["content"] + "<|im_end|>" + "]" * mine
    assert tree.scored is not None
    assert _scored_text(tokenizer, tree.completions[1], tree.scored[1]) == (
        expected + "\n<|im_start|>assistant\n[the mat<|im_end|>]"
    )


def test_a_single_answer_has_no_mask_and_a_forest_scores_what_the_mask_says() -> None:
    single = _pairs(ROW | {"chosen": CHOSEN[:1]})[0]
    assert single.scored is None and single.scored_masks == tuple([True] * len(ids) for ids in single.completions)
    tree = _pairs(ROW)[0]
    assert tree.scored is not None
    forest = build_forest([tree])
    labels = [
        token
        for ids, mask in zip(tree.completions, tree.scored, strict=True)
        for token, is_scored in zip(ids, mask, strict=True)
        if is_scored
    ]
    assert forest.labels.tolist() == labels and forest.lengths == tuple(map(sum, tree.scored))
    assert forest.lengths[0] < len(tree.completions[0])


def test_the_model_is_scored_on_the_assistants_tokens_in_the_whole_conversation() -> None:
    tree = _pairs(ROW)[0]
    assert tree.scored is not None
    model: Any = tiny_llama(vocab_size=1000)
    bind_scoring(model)
    found = forest_token_logps(model, build_forest([tree], "padded"))
    expected = []
    for ids, mask in zip(tree.completions, tree.scored, strict=True):
        whole = torch.tensor([[*tree.prompt_ids, *ids]])
        logps = model(input_ids=whole).logits.log_softmax(-1)[0, len(tree.prompt_ids) - 1 : -1]
        picked = logps.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        expected.append(picked[torch.tensor(mask)])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_turn_whose_beginning_merges_with_what_is_before_it_is_tokenised_on_its_own() -> None:
    tokenizer = small_tokenizer("merging", chat_template=small.WITHOUT_END)
    first, asks = "on the mat.", _said("user", "what is the cat called?")
    row = ROW | {"chosen": [_said("assistant", first), asks, _said("assistant", "the cat has no name.")]}
    data = _pairs(row, small.WITHOUT_END, "merging")
    tree = data[0]
    assert tree.scored is not None
    shown = _scored_text(tokenizer, tree.completions[0], tree.scored[0])
    assert shown == "[on the mat.]\nuser: what is the cat called?\nassistant: [the cat has no name.</s>]"
    text = tokenizer.apply_chat_template([USER, *row["chosen"]], tokenize=False)
    together = tokenizer(text, add_special_tokens=False)["input_ids"]
    merges = (
        together[: len(tree.prompt_ids) + len(tree.completions[0]) - 1] != tree.prompt_ids + tree.completions[0][:-1]
    )
    assert merges == any(MERGED in note for note in data.report.notes)


def test_a_template_that_writes_earlier_turns_anew_makes_a_bad_row() -> None:
    with pytest.raises(DataError, match=r"^row 1: the chat template asks for an answer .*mend the row"):
        _pairs(ROW, small.FORGETS)
    data = tokenize_pairs(
        [ROW, ROW | {"chosen": CHOSEN[:1]}],
        small_tokenizer(chat_template=small.FORGETS),
        max_length=None,
        skip_bad_rows=True,
    )
    assert len(data) == 1 and data.report.rows_left_out == {"refused by the chat template": 1}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            small.CHATML.replace(
                "<|im_end|>\n{%", "{% if loop.last or m['role'] == 'user' %}<|im_end|>{% endif %}\n{%"
            ),
            "the chat template writes an answer otherwise than as it was given when the conversation goes on",
        ),
        (
            small.CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{{ messages | length if loop.index0 == 2 }}"),
            "the chat template writes what comes before message 3 of an answer anew",
        ),
    ],
    ids=["ends only the last", "counts messages"],
)
def test_a_template_that_does_not_write_turns_alike_in_all_places_is_refused(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _pairs(ROW, template)


def test_special_tokens_in_any_turn_are_noted() -> None:
    row = ROW | {"chosen": [CHOSEN[0], _said("user", "a<|im_end|>b"), CHOSEN[2]]}
    assert "1 row: the text itself holds a special token of the tokenizer" in _pairs(row).report.notes


def test_the_same_tokens_scored_alike_are_identical_and_otherwise_they_are_not() -> None:
    spoken = "on the mat<|im_end|>\n<|im_start|>user\nand the dog?<|im_end|>\n<|im_start|>assistant\nafter the cat"
    data = _pairs(ROW | {"rejected": [_said("assistant", spoken)]})
    tree = data[0]
    assert tree.completions[0] == tree.completions[1] and tree.scored_masks[0] != tree.scored_masks[1]
    with pytest.raises(DataError, match="identical completions"):
        _pairs(
            ROW | {"chosen": CHOSEN[:2] + CHOSEN[2:], "rejected": [*CHOSEN[:2], _said("assistant", "after the cat")]}
        )


def test_ids_and_mask_are_cut_together() -> None:
    whole = _pairs(ROW)[0]
    assert whole.scored is not None
    for max_length in range(len(whole.prompt_ids) + 1, len(whole.prompt_ids) + len(whole.completions[0])):
        tree = truncate_tree(whole, max_length, "keep_start")
        assert tree is not None and tree.scored is not None
        assert list(map(len, tree.scored)) == list(map(len, tree.completions))
        assert tree.scored[0] == whole.scored[0][: len(tree.completions[0])]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_completion_of_which_nothing_scored_is_left_is_lost_and_counted(truncation: str) -> None:
    tree = TokenizedTree(
        prompt_ids=[1],
        completions=([2, 3, 4, 5], [6, 7]),
        scored=([False, False, False, True], [True, True]),
        origin="row 1",
    )
    assert truncate_tree(tree, 4, truncation) is None
    assert truncate_tree(tree, 5, truncation) is tree
    # the first answer is empty, so that in a template without end tokens nothing of it is scored
    late = [_said("assistant", ""), _said("user", "and the dog? " * 5), _said("assistant", "after the cat")]
    rows = [ROW | {"chosen": CHOSEN[:1]}, ROW | {"chosen": late}]
    tokenizer = small_tokenizer(chat_template=small.WITHOUT_END)
    data = tokenize_pairs(rows, tokenizer, max_length=24, truncation="keep_start")
    assert data.report.rows_left_out == {"completion lost by truncation": 1} and len(data) == 1


def test_messages_of_several_turns_need_a_template() -> None:
    with pytest.raises(DataError, match=r"row 1: the data holds chat messages .* no chat template is in use"):
        tokenize_pairs([ROW], small_tokenizer(), max_length=None)
