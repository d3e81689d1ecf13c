"""Does the shipped demo preference set hold the one preference it claims: concise over padded?

The demo's result means something only if the two files are well formed, disjoint, and differ in the way
`examples/README.md` says. Everything is read with plain `json`: no tokenizer, no model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = {"train": EXAMPLES / "concise_train.jsonl", "eval": EXAMPLES / "concise_eval.jsonl"}
MIN_ROWS = {"train": 200, "eval": 40}

FILLER_OPENINGS = (
    "absolutely",
    "ah",
    "allow me",
    "as an ai",
    "certainly",
    "first of all",
    "glad you",
    "good question",
    "great",
    "happy to",
    "here are",
    "here is",
    "here's",
    "hmm",
    "i can",
    "i would",
    "i'd",
    "i'll",
    "i'm glad",
    "i'm happy",
    "i'm so sorry",
    "in my opinion",
    "interesting",
    "let me",
    "let's",
    "no problem",
    "of course",
    "okay",
    "so",
    "sure",
    "thank you for asking",
    "thank you for sharing",
    "thank you for your",
    "thanks for asking",
    "thanks for your",
    "that is a",
    "that's a",
    "the answer",
    "to answer",
    "well",
    "what a",
    "when it comes to",
    "you asked",
)

# Too common to say what a prompt is about.
STOPWORDS = frozenset(
    "a an and are at be by can do does for from give has have how i in is it its many me much my name of on one or "
    "please should tell that the this to was what when where which who why will with word would you your".split()
)


def words(text: str) -> list[str]:
    """`text` as lower-case words, punctuation dropped; an apostrophe stays inside its word."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def read_rows(split: str) -> list[dict[str, str]]:
    lines = FILES[split].read_bytes().decode("utf-8").splitlines()
    return [json.loads(line) for line in lines]


TRAIN = read_rows("train")
EVAL = read_rows("eval")
ALL = TRAIN + EVAL


@pytest.mark.parametrize("split", FILES)
def test_each_file_has_enough_rows_of_exactly_three_non_empty_strings(split: str) -> None:
    rows = read_rows(split)
    assert len(rows) >= MIN_ROWS[split]
    for number, row in enumerate(rows, start=1):
        assert list(row) == ["prompt", "chosen", "rejected"], f"{split}:{number}"
        for key, value in row.items():
            assert isinstance(value, str) and value.strip(), f"{split}:{number} {key} is empty"
            assert value == value.strip(), f"{split}:{number} {key} has outer whitespace"
        assert words(row["chosen"]) != words(row["rejected"]), f"{split}:{number}"


def test_no_prompt_appears_twice_in_either_file() -> None:
    counts = Counter(" ".join(words(row["prompt"])) for row in ALL)
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_no_held_out_prompt_is_a_near_copy_of_a_training_prompt() -> None:
    def subject(row: dict[str, str]) -> frozenset[str]:
        return frozenset(words(row["prompt"])) - STOPWORDS

    train_subjects = [(row["prompt"], subject(row)) for row in TRAIN]
    near_copies = [
        (row["prompt"], prompt)
        for row in EVAL
        for prompt, other in train_subjects
        if 2 * len(subject(row) & other) > len(subject(row) | other)  # Jaccard index over one half
    ]
    assert near_copies == []


def test_no_answer_appears_twice() -> None:
    counts = Counter(" ".join(words(row["rejected"])) for row in ALL)
    assert max(counts.values()) == 1
    held_out = {row["chosen"].lower() for row in EVAL}
    assert [row["chosen"] for row in TRAIN if row["chosen"].lower() in held_out] == []


def test_every_chosen_answer_is_at_most_half_as_long_as_the_rejected_one() -> None:
    too_long = [row["prompt"] for row in ALL if 2 * len(words(row["chosen"])) > len(words(row["rejected"]))]
    assert too_long == []


def test_chosen_answers_are_short_and_rejected_ones_padded_but_bounded() -> None:
    assert [row["prompt"] for row in ALL if len(words(row["chosen"])) > 30] == []
    assert [row["prompt"] for row in ALL if not 30 <= len(words(row["rejected"])) <= 75] == []


def test_no_chosen_answer_opens_with_filler() -> None:
    openings = [tuple(words(opening)) for opening in FILLER_OPENINGS]
    fillers = [
        row["chosen"]
        for row in ALL
        if any(tuple(words(row["chosen"])[: len(opening)]) == opening for opening in openings)
    ]
    assert fillers == []


def test_no_chosen_answer_offers_more_help() -> None:
    offer = re.compile(r"let me know|feel free|hope (this|that) helps|happy to help|anything else", re.IGNORECASE)
    assert [row["chosen"] for row in ALL if offer.search(row["chosen"])] == []


def test_rejected_answers_open_in_different_words() -> None:
    for length, most in ((8, 2), (3, 6)):
        openings = Counter(tuple(words(row["rejected"])[:length]) for row in ALL)
        repeated = {" ".join(opening): count for opening, count in openings.items() if count > most}
        assert repeated == {}, f"first {length} words shared by more than {most} rejected answers"


def test_rejected_answers_are_not_built_from_the_same_phrases() -> None:
    most = 0.03 * len(ALL)
    rows_with: Counter[tuple[str, ...]] = Counter()
    for row in ALL:
        text = words(row["rejected"])
        rows_with.update({tuple(text[i : i + 6]) for i in range(len(text) - 5)})
    repeated = {" ".join(sequence): count for sequence, count in rows_with.items() if count > most}
    assert repeated == {}


def test_rejected_answers_close_in_different_words() -> None:
    closings = Counter(tuple(words(row["rejected"])[-5:]) for row in ALL)
    repeated = {" ".join(closing): count for closing, count in closings.items() if count > 3}
    assert repeated == {}


def test_prompts_and_chosen_answers_come_in_varied_forms() -> None:
    # One form would teach the form instead of the preference: no first word may dominate, questions and
    # commands both occur, and chosen lengths run from a single word to a full sentence or two.
    for key in ("prompt", "chosen"):
        first_words = Counter(words(row[key])[0] for row in ALL)
        assert first_words.most_common(1)[0][1] <= 0.25 * len(ALL), f"{key}: {first_words.most_common(3)}"
    questions = sum(row["prompt"].endswith("?") for row in ALL) / len(ALL)
    assert 0.3 <= questions <= 0.8
    lengths = [len(words(row["chosen"])) for row in ALL]
    assert sum(length <= 3 for length in lengths) >= 0.05 * len(ALL)
    assert sum(length >= 12 for length in lengths) >= 0.1 * len(ALL)
