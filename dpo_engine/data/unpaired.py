"""How is a completion read that has a label of its own: good, or not?

    prompt, completion, label            text or messages, as TRL's KTO trainer takes them
    messages, label                      a conversation that ends with the completion
    conversations, label                 the same as ShareGPT writes it
    instruction, input, output, label    as LLaMA-Factory writes it

LLaMA-Factory calls the label `kto_tag`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpo_engine.data.messages import read_messages, with_system
from dpo_engine.data.records import BadRow
from dpo_engine.data.shapes import (
    Answers,
    Shape,
    check_transcript,
    instruction_text,
    is_open_transcript,
    kind_of_value,
    text_in,
    text_or_chat,
)

LABELS = ("label", "kto_tag")


def read_label(value: Any, column: str) -> bool:
    """True or false; 1 and 0 are the same. Raises `BadRow` for anything else."""
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    found = repr(value) if isinstance(value, int | float | str) else kind_of_value(value)
    raise BadRow(f"column {column!r} must be true or false (or 1 or 0), found {found[:60]}")


def _completion(label: str) -> Callable[[Mapping[str, Any]], Answers]:
    def convert(row: Mapping[str, Any]) -> Answers:
        desirable = read_label(row[label], label)
        prompt, completions = text_or_chat(row, row["prompt"], "prompt", [("completion", row["completion"])])
        return Answers(prompt=prompt, completions=completions, desirable=(desirable,))

    return convert


def _transcript(label: str) -> Callable[[Mapping[str, Any]], Answers]:
    """The prompt is a transcript up to an open "Assistant:"."""

    def convert(row: Mapping[str, Any]) -> Answers:
        prompt, completion = check_transcript(text_in(row, "prompt")), text_in(row, "completion")
        return Answers(prompt=prompt, completions=(completion,), desirable=(read_label(row[label], label),))

    return convert


def _instruction(label: str) -> Callable[[Mapping[str, Any]], Answers]:
    def convert(row: Mapping[str, Any]) -> Answers:
        prompt, output = with_system(row, instruction_text(row)), text_in(row, "output")
        return Answers(prompt=prompt, completions=(output,), desirable=(read_label(row[label], label),))

    return convert


def _conversation(column: str, label: str) -> Callable[[Mapping[str, Any]], Answers]:
    """The assistant's last messages, without another's between them, are the completion; what comes before is the prompt."""

    def convert(row: Mapping[str, Any]) -> Answers:
        desirable = read_label(row[label], label)
        messages = read_messages(row[column], column)
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow(f"column {column!r} must end with an assistant message")
        start = len(messages)
        while start and messages[start - 1]["role"] == "assistant":
            start -= 1
        prompt = with_system(row, messages[:start]) if start else []
        return Answers(prompt=prompt, completions=(messages[start:],), desirable=(desirable,))

    return convert


def _is_transcript(row: Mapping[str, Any]) -> bool:
    return is_open_transcript(row["prompt"]) and isinstance(row["completion"], str) and not row.get("system")


def _of_conversations(column: str, label: str) -> Shape:
    return Shape(
        name=f"unpaired {column}",
        kind="unpaired",
        needs=(column, label),
        optional=("system",),
        matches=lambda row: isinstance(row[column], list),
        convert=_conversation(column, label),
    )


def _shapes(label: str) -> tuple[Shape, ...]:
    return (
        Shape(
            name="unpaired transcripts",
            kind="unpaired",
            needs=("prompt", "completion", label),
            matches=_is_transcript,
            convert=_transcript(label),
            transcript=True,
        ),
        Shape(
            name="unpaired completions",
            kind="unpaired",
            needs=("prompt", "completion", label),
            optional=("system",),
            matches=lambda row: isinstance(row["prompt"], str | list),
            convert=_completion(label),
        ),
        _of_conversations("messages", label),
        _of_conversations("conversations", label),
        Shape(
            name="unpaired instructions",
            kind="unpaired",
            needs=("instruction", "output", label),
            optional=("input", "system"),
            matches=lambda row: isinstance(row["instruction"], str),
            convert=_instruction(label),
            plain_separator="\n",
        ),
    )


SHAPES = tuple(shape for label in LABELS for shape in _shapes(label))
"""In the order they are tried."""
