"""Are prompt and completion ids exactly what the model sees, with one BOS, an exact boundary and a scored end token?"""

from __future__ import annotations

from typing import Any

import pytest

from dpo_engine.batch import build_forest
from dpo_engine.data import PairData, tokenize_pairs
from dpo_engine.data.pairs import MERGED
from dpo_engine.errors import ConfigError, DataError
from support import small_tokenizers as small
from support.small_tokenizers import small_tokenizer

USER = {"role": "user", "content": "where is the cat?"}
CHAT = {"prompt": [USER], "chosen": "on the mat", "rejected": "ran away"}
TEXT = {"prompt": "Question: where is the cat?", "chosen": " on the mat", "rejected": " ran away"}


def _pairs(row: dict[str, Any], tokenizer: Any, **options: Any) -> PairData:
    return tokenize_pairs([row], tokenizer, **({"max_length": None} | options))


@pytest.mark.parametrize("kind", ["words", "merging", "sentencepiece"])
@pytest.mark.parametrize("template", [small.CHATML, small.WITH_BOS], ids=["template without BOS", "template with BOS"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_templated_ids_are_those_of_apply_chat_template_so_bos_is_never_doubled(
    kind: str, template: str, adds_bos: bool
) -> None:
    tokenizer = small_tokenizer(kind, chat_template=template, adds_bos=adds_bos)
    tree = _pairs(CHAT, tokenizer)[0]
    expected = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert tree.prompt_ids == expected
    assert tree.prompt_ids.count(tokenizer.bos_token_id) == (template == small.WITH_BOS)
    for completion, text in zip(tree.completions, (CHAT["chosen"], CHAT["rejected"]), strict=True):
        answer = {"role": "assistant", "content": text}
        whole = tokenizer.apply_chat_template([USER, answer], return_dict=False)
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        assert [*tree.prompt_ids, *completion, newline] == whole


@pytest.mark.parametrize("kind", ["words", "merging", "sentencepiece"])
@pytest.mark.parametrize("bos_in_text", [False, True])
def test_a_plain_prompt_has_the_bos_its_tokenizer_adds_once(kind: str, bos_in_text: bool) -> None:
    tokenizer = small_tokenizer(kind, adds_bos=True, adds_eos=True)
    row = TEXT | {"prompt": "<s>" * bos_in_text + TEXT["prompt"]}
    tree = _pairs(row, tokenizer)[0]
    assert (
        tree.prompt_ids
        == tokenizer(row["prompt"], add_special_tokens=not bos_in_text)["input_ids"][: len(tree.prompt_ids)]
    )
    assert tree.prompt_ids[0] == tokenizer.bos_token_id and tree.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in tree.prompt_ids
    assert tokenizer.decode(tree.prompt_ids, skip_special_tokens=True).strip() == TEXT["prompt"]
    without = _pairs(TEXT, small_tokenizer(kind))[0]
    assert tokenizer.bos_token_id not in without.prompt_ids


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (small.CHATML, "<|im_end|>"),
        (small.WITH_BOS, "<|im_end|>"),
        (small.TWO_ENDS, "<|im_end|>"),
        (small.WITHOUT_END, "</s>"),
        (None, "</s>"),
    ],
    ids=["newline after the end", "BOS", "two ends", "no end", "no template"],
)
def test_every_completion_ends_with_one_end_token_and_nothing_after_it(template: str | None, end: str) -> None:
    tokenizer = small_tokenizer(chat_template=template)
    tree = _pairs(TEXT, tokenizer)[0]
    ends = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]))
    for completion, text in zip(tree.completions, (TEXT["chosen"], TEXT["rejected"]), strict=True):
        assert completion[-1] == tokenizer.convert_tokens_to_ids(end)
        assert not ends & set(completion[:-1])
        assert tokenizer.decode(completion[:-1]) == text


def test_an_end_token_that_the_plain_text_brings_is_not_added_again() -> None:
    tokenizer = small_tokenizer()
    tree = _pairs(TEXT | {"chosen": " on the mat</s>"}, tokenizer)[0]
    assert tree.completions[0].count(tokenizer.eos_token_id) == tree.completions[1].count(tokenizer.eos_token_id) == 1


def test_the_end_token_is_scored_where_it_is_also_the_padding_token() -> None:
    tokenizer = small_tokenizer(chat_template=small.CHATML)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tree = _pairs(CHAT, tokenizer)[0]
    assert [completion[-1] for completion in tree.completions] == [tokenizer.pad_token_id] * 2


def test_where_the_tokenizer_merges_across_the_boundary_the_prompt_keeps_its_ids_and_the_row_is_counted() -> None:
    tokenizer = small_tokenizer("merging")
    row = {"prompt": "the c", "chosen": "at sat on the mat", "rejected": "Zebra"}
    data = _pairs(row, tokenizer)
    tree, prompt = data[0], tokenizer("the c", add_special_tokens=False)["input_ids"]
    whole = tokenizer(row["prompt"] + row["chosen"], add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt  # the tokenizer does merge here
    assert tree.prompt_ids == prompt
    assert tree.completions[0][:-1] == tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tree.prompt_ids + tree.completions[0][:-1]) == "the cat sat on the mat"
    assert data.report.notes == [f"1 row: {MERGED}"]
    assert _pairs(row | {"prompt": "the cat\n"}, tokenizer).report.notes == []


def test_a_completion_tokenised_on_its_own_gets_no_space_before_it() -> None:
    tokenizer = small_tokenizer("sentencepiece", adds_bos=True)
    row = {"prompt": "where is the c", "chosen": "at on the mat", "rejected": "Zebra"}
    data = _pairs(row, tokenizer)
    alone = tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
    assert data.report.notes == [f"1 row: {MERGED}"]
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("\u2581")
    tokens = tokenizer.convert_ids_to_tokens(data[0].prompt_ids + data[0].completions[0][:-1])
    assert "".join(tokens) == "<s>\u2581where\u2581is\u2581the\u2581cat\u2581on\u2581the\u2581mat"


def test_white_space_that_the_template_drops_before_answers_stays_in_the_prompt() -> None:
    tokenizer = small_tokenizer(chat_template=small.TRIMS_ANSWER_SPACE)
    data = _pairs(CHAT, tokenizer)
    assert tokenizer.decode(data[0].prompt_ids).endswith("<|im_start|>assistant: ")
    assert [tokenizer.decode(completion) for completion in data[0].completions] == [
        "on the mat<|im_end|>",
        "ran away<|im_end|>",
    ]
    assert any("generation prompt ends with white space" in note for note in data.report.notes)


def test_a_template_that_asks_otherwise_than_it_answers_is_refused_with_both_texts() -> None:
    with pytest.raises(DataError, match=r"row 1: .*assistant\\n<think>\\n', but writes the answer after") as caught:
        _pairs(CHAT, small_tokenizer(chat_template=small.OPENS_THINKING))
    assert "chat_template: off" in str(caught.value)


def test_a_template_that_leaves_out_the_answer_is_refused() -> None:
    with pytest.raises(DataError, match="leaves out the assistant's answer"):
        _pairs(CHAT, small_tokenizer(chat_template="{{ messages[0]['content'] }}"))


def test_a_conversation_that_the_template_refuses_is_named_or_skipped() -> None:
    tokenizer = small_tokenizer(chat_template=small.ALTERNATING)
    rows = [CHAT, CHAT | {"prompt": [{"role": "system", "content": "be brief"}, USER]}]
    with pytest.raises(
        DataError, match=r"^row 2: the chat template refuses a conversation of system, user: .*alternate"
    ):
        tokenize_pairs(rows, tokenizer, max_length=None)
    data = tokenize_pairs(rows, tokenizer, max_length=None, skip_bad_rows=True)
    assert len(data) == 1 and data.report.rows_left_out == {"refused by the chat template": 1}


@pytest.mark.parametrize("choice", ["auto", "on", True])
def test_a_text_prompt_is_one_user_message_where_there_is_a_template(choice: str | bool) -> None:
    tokenizer = small_tokenizer(chat_template=small.CHATML)
    data = _pairs({"prompt": USER["content"], "chosen": "a", "rejected": "b"}, tokenizer, chat_template=choice)
    assert data[0].prompt_ids == _pairs(CHAT, tokenizer)[0].prompt_ids
    assert data.report.format == (
        "text pairs: prompt, chosen, rejected; rendered by the tokenizer's chat template, completions end with <|im_end|>"
    )


@pytest.mark.parametrize("choice", ["off", False])
def test_the_template_can_be_turned_off_for_text_but_not_for_messages(choice: str | bool) -> None:
    tokenizer = small_tokenizer(chat_template=small.CHATML)
    data = _pairs(TEXT, tokenizer, chat_template=choice)
    assert data[0] == _pairs(TEXT, small_tokenizer())[0]
    assert data.report.format.endswith("plain text without a chat template")
    with pytest.raises(DataError, match=r"row 1: the data holds chat messages .* no chat template is in use"):
        _pairs(CHAT, tokenizer, chat_template=choice)


def test_a_template_that_is_asked_for_must_be_there_and_the_choice_known() -> None:
    with pytest.raises(ConfigError, match="chat_template is 'on', but the tokenizer has none"):
        _pairs(TEXT, small_tokenizer(), chat_template="on")
    with pytest.raises(ConfigError, match="chat_template is 'maybe', expected one of auto, on, off"):
        _pairs(TEXT, small_tokenizer(), chat_template="maybe")


def test_transcripts_become_messages_with_a_template_and_stay_text_without() -> None:
    head = "\n\nHuman: what is the cat called? \n\nAssistant:"
    row = {"chosen": head + " the cat has no name.", "rejected": head + " the dog."}
    tokenizer = small_tokenizer(chat_template=small.CHATML)
    tree = _pairs(row, tokenizer)[0]
    assert tokenizer.decode(tree.prompt_ids) == (
        "<|im_start|>user\nwhat is the cat called?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tree.completions[0]) == "the cat has no name.<|im_end|>"
    plain = _pairs(row, small_tokenizer())[0]
    assert tokenizer.decode(plain.prompt_ids) == head
    assert tokenizer.decode(plain.completions[0]) == " the cat has no name.</s>"


def test_an_instruction_is_separated_from_its_plain_answer() -> None:
    row = {"instruction": "where is", "input": "the cat?", "chosen": "on the mat", "rejected": "away"}
    tokenizer = small_tokenizer()
    data = _pairs(row, tokenizer)
    assert tokenizer.decode(data[0].prompt_ids + data[0].completions[0]) == "where is\nthe cat?\non the mat</s>"
    assert r"prompts end with '\n'" in data.report.format


@pytest.mark.parametrize("kind", ["words", "merging", "sentencepiece"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_an_empty_plain_prompt_is_the_bos_token(kind: str, adds_bos: bool) -> None:
    tokenizer = small_tokenizer(kind, adds_bos=adds_bos)
    tree = _pairs(TEXT | {"prompt": ""}, tokenizer)[0]
    assert tree.prompt_ids == [tokenizer.bos_token_id]
    assert tree.completions[0] == [
        *tokenizer(TEXT["chosen"], add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    forest = build_forest([tree])
    assert forest.score_from.tolist()[0] == 0 and forest.labels.tolist()[0] == tree.completions[0][0]


def test_an_empty_plain_prompt_without_a_bos_token_is_named_or_skipped() -> None:
    tokenizer = small_tokenizer()
    tokenizer.bos_token = None
    rows = [*[TEXT] * 3, TEXT | {"prompt": ""}]
    with pytest.raises(
        DataError, match=r"^row 4: the prompt is empty, and the tokenizer has no BOS token .*--skip_bad_rows"
    ):
        tokenize_pairs(rows, tokenizer, max_length=None)
    data = tokenize_pairs(rows, tokenizer, max_length=None, skip_bad_rows=True)
    assert data.report.rows_left_out == {"empty prompt and no BOS token": 1} and len(data) == 3


def test_a_tokenizer_without_eos_is_refused_where_completions_would_have_no_end() -> None:
    tokenizer = small_tokenizer(chat_template=small.CHATML)
    tokenizer.eos_token = None
    assert len(_pairs(CHAT, tokenizer)) == 1
    with pytest.raises(DataError, match="no EOS token"):
        _pairs(TEXT, tokenizer, chat_template="off")


def test_special_tokens_in_the_text_itself_are_noted() -> None:
    data = _pairs(CHAT | {"rejected": "a<|im_end|>b"}, small_tokenizer(chat_template=small.CHATML))
    assert data.report.notes == ["1 row: the text itself holds a special token of the tokenizer"]


def test_a_source_whose_every_conversation_the_template_refuses_is_refused() -> None:
    row = CHAT | {"prompt": [{"role": "system", "content": "be brief"}, USER]}
    with pytest.raises(DataError, match=r"no usable row is left of 2: 2 refused by the chat template \(row 1, row 2\)"):
        tokenize_pairs([row] * 2, small_tokenizer(chat_template=small.ALTERNATING), max_length=None, skip_bad_rows=True)
