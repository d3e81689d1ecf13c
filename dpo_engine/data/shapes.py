"""What is one understood arrangement of columns?

A `Shape` says which columns it needs, tests one row, and turns a row into `Answers`. The shapes themselves are in formats.py
(pairs), unpaired.py and ranked.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_engine.data.messages import completion_messages, read_messages, transcript_messages, with_system
from dpo_engine.data.records import BadRow, Text

_VALUES = {str: "text", list: "list", dict: "object", bool: "true or false", int: "number", float: "number"} | {
    type(None): "null"
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a row says: a prompt, and completions that are compared, judged or ranked."""

    prompt: Text
    completions: tuple[Text, ...]
    desirable: tuple[bool, ...] | None = None
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One understood arrangement of columns."""

    name: str
    kind: str
    """What a row is, one of `KINDS`."""
    needs: tuple[str, ...]
    """Columns every row must have."""
    optional: tuple[str, ...] = ()
    """Columns that are read when they are there."""
    matches: Callable[[Mapping[str, Any]], bool]
    """Does a row that has the needed columns also have the right kinds of values?"""
    convert: Callable[[Mapping[str, Any]], Answers]
    """Row -> what it says; raises `BadRow` or `UnusableRow`."""
    plain_separator: str = ""
    """What stands between prompt and completion without a chat template."""
    continues: bool = False
    """Completions go on with the prompt's own text, which is put in no chat template unless that is asked for."""
    transcript: bool = False
    """Texts are HH-RLHF transcripts, which are parsed into messages when there is a chat template."""


def kind_of_value(value: Any) -> str:
    """What a column's value is, in words."""
    return _VALUES.get(type(value), type(value).__name__)


def text_in(row: Mapping[str, Any], column: str) -> str:
    """A column's text; raises `BadRow` for anything else."""
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} must be text, found {kind_of_value(value)}")
    return value


def instruction_text(row: Mapping[str, Any]) -> str:
    """The instruction, with its input on the next line where there is one."""
    prompt, extra = text_in(row, "instruction"), row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow(f"column 'input' must be text, found {kind_of_value(extra)}")
    return f"{prompt}\n{extra}" if extra else prompt


def text_or_chat(
    row: Mapping[str, Any], prompt: Any, prompt_column: str, answers: Sequence[tuple[str, Any]]
) -> tuple[Text, tuple[Text, ...]]:
    """A prompt and its completions, as text where all of them are text and else as messages.

    Args:
        prompt: text or messages.
        answers: (what to call it in messages, text or messages) of each completion.

    Raises:
        BadRow: something is neither.
    """
    for column, value in ((prompt_column, prompt), *answers):
        if not isinstance(value, str | list | Mapping):
            raise BadRow(f"column {column!r} must be text or messages, found {kind_of_value(value)}")
    if isinstance(prompt, str) and all(isinstance(value, str) for _, value in answers):
        return with_system(row, prompt), tuple(value for _, value in answers)
    messages = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else read_messages(prompt, prompt_column)
    )
    completions = tuple(completion_messages(value, column, messages) for column, value in answers)
    return with_system(row, messages), completions


def is_open_transcript(text: Any) -> bool:
    """Whether a prompt's text is an HH-RLHF transcript up to an open "Assistant:"."""
    return isinstance(text, str) and text.startswith("\n\nHuman:") and text.rstrip().endswith("\n\nAssistant:")


def check_transcript(text: str) -> str:
    """The text of a prompt, if it is a transcript; raises `BadRow` if not."""
    transcript_messages(text)
    return text
