"""How is a list of completions read that numbers put in order?

A prompt (`prompt`: text or messages, or `instruction`) stands beside a list: `completions`, `responses`, `answers` or
`generations`. Each item is text, messages, or an object that holds the text. The numbers are in the objects, or in a list of
their own beside the completions. The shape says which were read, and whether more is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from dpo_engine.data.records import BadRow
from dpo_engine.data.repeats import close_ranks
from dpo_engine.data.shapes import (
    Answers,
    Shape,
    check_transcript,
    instruction_text,
    is_open_transcript,
    kind_of_value,
    text_or_chat,
)

LISTS = ("completions", "responses", "answers", "generations")
TEXTS = ("text", "response", "answer", "content", "completion")
"""Where an object of the list may hold its text, in the order they are looked for."""
NUMBERS_INSIDE = ("score", "rating", "overall_score", "rank")
"""Where it may hold its number."""
NUMBER_COLUMNS = ("scores", "ratings", "ranks", "rankings")
"""Columns that may hold the numbers of the whole list."""
_LOWER_IS_BETTER = ("rank", "ranks", "rankings")
_INFINITY = float("inf")

UNDERSTOOD = (
    f"ranked lists (prompt or instruction, and {', '.join(LISTS[:-1])} or {LISTS[-1]}: a list with a number for each, which is in "
    f"its objects as {', '.join(NUMBERS_INSIDE[:-1])} or {NUMBERS_INSIDE[-1]}, or a column {', '.join(NUMBER_COLUMNS[:-1])} or "
    f"{NUMBER_COLUMNS[-1]})"
)


def ranked_shape(row: Mapping[str, Any]) -> Shape | None:
    """The shape of a row that holds a prompt and a list of completions; None of any other."""
    prompt = next(
        (c for c, kinds in (("prompt", str | list), ("instruction", str)) if isinstance(row.get(c), kinds)), None
    )
    listed = next((column for column in LISTS if _are_completions(row.get(column))), None)
    if prompt is None or listed is None:
        return None
    objects = [item for item in row[listed] if isinstance(item, Mapping)]
    inside = next((name for name in NUMBERS_INSIDE if any(item.get(name) is not None for item in objects)), None)
    column = next((name for name in NUMBER_COLUMNS if isinstance(row.get(name), list)), None)
    transcript = prompt == "prompt" and is_open_transcript(row["prompt"]) and not row.get("system")
    return _shape(prompt, listed, inside, None if inside else column, transcript)


def ranks_of(values: list[float]) -> tuple[list[int], tuple[int, ...]]:
    """In which order do these values go, least first and otherwise as they stand, and which rank has each of that order?"""
    order = sorted(range(len(values)), key=values.__getitem__)
    return order, close_ranks([values[index] for index in order])


def _are_completions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str | list | Mapping) for item in value)


@cache
def _shape(prompt: str, listed: str, inside: str | None, column: str | None, transcript: bool) -> Shape:
    number = inside or column
    way = "lower is better" if number in _LOWER_IS_BETTER else "higher is better"
    if inside:
        name = f"ranked lists by {inside} in {listed} ({way})"
    else:
        name = f"ranked lists by {column} ({way})" if column else "ranked lists without numbers"
    return Shape(
        name=("transcripts with " if transcript else "") + name,
        kind="ranked",
        needs=(prompt, listed) if column is None else (prompt, listed, column),
        optional=() if transcript else ("input", "system") if prompt == "instruction" else ("system",),
        matches=lambda row: True,  # made for such rows
        convert=_converter(prompt, listed, inside, column, transcript),
        plain_separator="\n" if prompt == "instruction" else "",
        transcript=transcript,
    )


def _converter(
    prompt: str, listed: str, inside: str | None, column: str | None, transcript: bool
) -> Callable[[Mapping[str, Any]], Answers]:
    def convert(row: Mapping[str, Any]) -> Answers:
        items = row[listed]
        if not isinstance(items, list):
            raise BadRow(f"column {listed!r} must be a list of completions, found {kind_of_value(items)}")
        asked = instruction_text(row) if prompt == "instruction" else row[prompt]
        if transcript:
            asked = check_transcript(asked) if isinstance(asked, str) else asked
        answers = [(f"{listed}[{at}]", _text(item, f"{listed}[{at}]")) for at, item in enumerate(items)]
        values = _inside(items, listed, inside) if inside else _beside(row, listed, column)
        better_first = values if (inside or column) in _LOWER_IS_BETTER else [-value for value in values]
        order, ranks = ranks_of(better_first)
        text, completions = text_or_chat(row, asked, prompt, [answers[index] for index in order])
        return Answers(prompt=text, completions=completions, ranks=ranks)

    return convert


def _text(item: Any, where: str) -> Any:
    """What an item of the list says, text or messages."""
    if not isinstance(item, Mapping) or item.get("role") or item.get("from"):
        return item
    # where objects differ, Parquet gives each the fields of all, with null in those that it lacks
    name = next((name for name in TEXTS if item.get(name) is not None), None)
    if name is None:
        raise BadRow(
            f"{where} holds {', '.join(map(str, item)) or 'nothing'}; expected its text in one of {', '.join(TEXTS)}"
        )
    return item[name]


def _inside(items: list[Any], listed: str, name: str) -> list[float]:
    for at, item in enumerate(items):
        if not isinstance(item, Mapping) or name not in item:
            raise BadRow(f"{listed}[{at}] has no {name!r}, by which others are ranked")
    return [_number(item[name], f"{listed}[{at}].{name}") for at, item in enumerate(items)]


def _beside(row: Mapping[str, Any], listed: str, column: str | None) -> list[float]:
    if column is None:
        raise BadRow(
            f"no number says which of {listed!r} is better; expected one in each object ({', '.join(NUMBERS_INSIDE)}), or a list "
            f"of them in a column {', '.join(NUMBER_COLUMNS[:-1])} or {NUMBER_COLUMNS[-1]}"
        )
    values, wanted = row[column], len(row[listed])
    if not isinstance(values, list) or len(values) != wanted:
        found = f"{len(values)}" if isinstance(values, list) else kind_of_value(values)
        raise BadRow(f"column {column!r} must be a list of {wanted} numbers, one for each of {listed!r}, found {found}")
    return [_number(value, f"{column}[{at}]") for at, value in enumerate(values)]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_INFINITY < value < _INFINITY:
        said = repr(value) if isinstance(value, int | float | str) else kind_of_value(value)
        raise BadRow(f"{where} must be a finite number, found {said[:60]}")
    return value
