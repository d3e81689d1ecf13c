"""What do the columns of a data set mean?

Each understood shape is one `Shape`: the columns it needs, a test on one row, and a function from a row to a pair.
The shape is detected once, from the first rows; after that every row must have it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_engine.data.messages import completion_messages, read_messages, transcript_messages, with_system
from dpo_engine.data.records import BadRow, Message, PreferenceRow, SourceRow, UnusableRow
from dpo_engine.errors import DataError

SAMPLE_ROWS = 100
"""How many rows vote on the shape, so that one odd first row does not decide."""

REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")
"""What a row may bring of its reference: sums over scored tokens, in nats."""
TRL_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""TRL's names for the same."""

_NOT_SUPPORTED = {
    "tools": "tool definitions are not supported yet",
    "chat_template_kwargs": "a chat template is given nothing but messages",
    "image": "the engine trains language models on text alone",
    "images": "the engine trains language models on text alone",
}

Text = str | list[Message]
Pair = tuple[Text, Text, Text]
"""Prompt, chosen, rejected."""

_KINDS = {str: "text", list: "list", dict: "object", bool: "true or false", int: "number", float: "number"} | {
    type(None): "null"
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One understood arrangement of columns."""

    name: str
    needs: tuple[str, ...]
    """Columns every row must have."""
    optional: tuple[str, ...] = ()
    """Columns that are read when they are there."""
    matches: Callable[[Mapping[str, Any]], bool]
    """Does a row that has the needed columns also have the right kinds of values?"""
    convert: Callable[[Mapping[str, Any]], Pair] | None
    """Row -> pair; raises `BadRow` or `UnusableRow`. None: the rows are not pairs."""
    plain_separator: str = ""
    """What stands between prompt and completion without a chat template."""
    continues: bool = False
    """Completions go on with the prompt's own text, which is put in no chat template unless that is asked for."""
    transcript: bool = False
    """Texts are HH-RLHF transcripts, which are parsed into messages when there is a chat template."""


@dataclass(frozen=True, kw_only=True)
class DataFormat:
    """The detected shape of one data source."""

    shape: Shape
    columns: tuple[str, ...]
    """The columns that are read."""
    ignored: tuple[str, ...]
    """The columns that are not."""

    @property
    def is_paired(self) -> bool:
        """Whether each row holds a chosen and a rejected completion."""
        return self.shape.convert is not None

    def __str__(self) -> str:
        ignored = f" (ignored: {', '.join(self.ignored)})" if self.ignored else ""
        return f"{self.shape.name}: {', '.join(self.columns)}{ignored}"


def detect_format(rows: Iterable[Mapping[str, Any]]) -> DataFormat:
    """Which shape do most of these rows have?

    Args:
        rows: A sample of rows as dicts of columns.

    Returns:
        The shape with its columns, and the columns that are left alone.

    Raises:
        DataError: No row has a shape that is understood; the message lists the columns found and the shapes.
    """
    rows = list(rows)
    votes = Counter(shape.name for row in rows if (shape := _shape_of(row)))
    if not votes:
        found, expected = _columns_found(rows), _shapes_understood()
        raise DataError(f"the columns are not understood: found {found}; expected one of: {expected}")
    name = votes.most_common(1)[0][0]
    shape = next(shape for shape in SHAPES if shape.name == name)
    present = dict.fromkeys(column for row in rows for column in row)
    known = sorted((*shape.needs, *shape.optional), key=lambda column: column in _PAIR)  # the pair last
    if shape.convert is not None:
        known += [*REFERENCE_COLUMNS, *TRL_REFERENCE_COLUMNS]
    return DataFormat(
        shape=shape,
        columns=tuple(column for column in known if column in present),
        ignored=tuple(column for column in present if column not in known),
    )


def require_pairs(data_format: DataFormat, source: str, method: str) -> None:
    """Refuses unpaired rows for a method that compares two completions.

    Raises:
        DataError: The rows have one completion and a label each.
    """
    if not data_format.is_paired:
        raise DataError(
            f"{source} holds {data_format}: one completion and a label a row, but method {method!r} needs pairs; "
            "give data with a chosen and a rejected completion for each prompt"
        )


def preference_row(data_format: DataFormat, row: SourceRow) -> PreferenceRow:
    """Reads one row in the detected shape.

    Raises:
        BadRow: A column is missing or holds the wrong type.
        UnusableRow: "prompts differ", "empty prompt", "empty completion" or "identical completions".
    """
    shape, columns = data_format.shape, row.columns
    if columns is None:
        raise BadRow(row.fault)
    missing = [column for column in shape.needs if column not in columns]
    if missing:
        raise BadRow(f"missing column {', '.join(map(repr, missing))}, found {', '.join(columns) or 'none'}")
    for column, why in _NOT_SUPPORTED.items():
        if columns.get(column):
            raise BadRow(f"column {column!r} is not empty, and {why}")
    if shape.convert is None:
        raise BadRow("is not a pair")
    prompt, chosen, rejected = shape.convert(columns)
    if isinstance(prompt, list) and not prompt:
        raise UnusableRow("empty prompt")
    if not completion_text(chosen).strip() or not completion_text(rejected).strip():
        raise UnusableRow("empty completion")
    if chosen == rejected:
        raise UnusableRow("identical completions")
    reference = _reference_logps(columns)
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, origin=row.origin, reference_logps=reference)


def _reference_logps(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The sums that a row brings; None where it has no such columns, or null in both."""
    found = [
        names
        for names in (REFERENCE_COLUMNS, TRL_REFERENCE_COLUMNS)
        if any(row.get(name) is not None for name in names)
    ]
    if len(found) > 1:
        raise BadRow(
            f"columns {found[0][0]!r} and {found[1][0]!r} are both there; expected the reference's log-probs once"
        )
    columns = found[0] if found else REFERENCE_COLUMNS
    values = [row.get(column) for column in columns]
    if values == [None, None]:
        return None
    for column, other in (columns, columns[::-1]):
        if column not in row:
            raise BadRow(f"column {other!r} is there without {column!r}; expected both, or none")
    for column, value in zip(columns, values, strict=True):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or not is_number or not math.isfinite(value) or value > 0:
            raise BadRow(f"column {column!r} must be a finite log-prob of at most 0, or null in both, found {value!r}")
    return float(values[0]), float(values[1])  # type: ignore[arg-type]


def completion_text(completion: Text) -> str:
    """What the assistant says in a completion."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion if message["role"] == "assistant")


def as_messages(row: PreferenceRow, transcript: bool) -> tuple[list[Message], list[list[Message]]]:
    """The row as chat messages: a plain prompt is one user turn, a transcript is taken apart into its turns.

    Returns:
        The prompt's messages, and those of each completion.
    """
    prompt = row.prompt
    if isinstance(prompt, str):
        prompt = transcript_messages(prompt) if transcript else [{"role": "user", "content": prompt}]
    completions = []
    for completion in (row.chosen, row.rejected):
        if isinstance(completion, str):
            # the space after "Assistant:" is the transcript's, not the answer's
            completion = [{"role": "assistant", "content": completion.strip() if transcript else completion}]
        completions.append(completion)
    return prompt, completions


def _shape_of(row: Mapping[str, Any]) -> Shape | None:
    return next((s for s in SHAPES if all(column in row for column in s.needs) and s.matches(row)), None)


def _columns_found(rows: list[Mapping[str, Any]]) -> str:
    kinds = {column: _kind(value) for row in reversed(rows) for column, value in row.items()}
    return ", ".join(f"{column} ({kind})" for column, kind in kinds.items()) or "none"


def _shapes_understood() -> str:
    return "; ".join(f"{shape.name} ({', '.join(shape.needs)})" for shape in SHAPES if shape.convert)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} must be text, found {_kind(value)}")
    return value


def _text_pair(row: Mapping[str, Any]) -> Pair:
    return with_system(row, _text(row, "prompt")), _text(row, "chosen"), _text(row, "rejected")


def _instruction_pair(row: Mapping[str, Any]) -> Pair:
    prompt, extra = _text(row, "instruction"), row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow(f"column 'input' must be text, found {_kind(extra)}")
    if extra:
        prompt = f"{prompt}\n{extra}"
    return with_system(row, prompt), _text(row, "chosen"), _text(row, "rejected")


def _conversation_pair(column: str) -> Callable[[Mapping[str, Any]], Pair]:
    """Prompt messages in `column`, and the turns (or the text) of an answer each in `chosen` and `rejected`."""

    def convert(row: Mapping[str, Any]) -> Pair:
        prompt = read_messages(row[column], column)
        chosen, rejected = (completion_messages(row[name], name, prompt) for name in ("chosen", "rejected"))
        return with_system(row, prompt), chosen, rejected

    return convert


def _chat_pair(row: Mapping[str, Any]) -> Pair:
    """Messages in `chosen` and `rejected`; `prompt` is messages, or text beside full conversations that repeat it."""
    if not isinstance(row["prompt"], str):
        return _conversation_pair("prompt")(row)
    text = row["prompt"]
    if not any(_repeats_prompt(row[column], column) for column in _PAIR):
        prompt = [{"role": "user", "content": text}]
        chosen, rejected = (completion_messages(row[name], name, prompt) for name in _PAIR)
        return with_system(row, prompt), chosen, rejected
    prompt, chosen, rejected = _full_conversations(row, text)
    if not any(message["role"] == "user" and message["content"].strip() == text.strip() for message in prompt):
        raise UnusableRow("prompts differ")
    return prompt, chosen, rejected


def _repeats_prompt(value: Any, column: str) -> bool:
    """Whether a column beside a text prompt holds a whole conversation, rather than the turns of an answer."""
    return isinstance(value, list) and len(value) > 1 and read_messages(value, column)[0]["role"] != "assistant"


def _full_conversations(
    row: Mapping[str, Any], asked: str | None = None
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two conversations that share everything before their last message, or up to the user's message `asked`."""
    chosen, rejected = (read_messages(row[column], column) for column in ("chosen", "rejected"))
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow(f"column {column!r} must end with an assistant message")
    shared = _shared_messages(chosen, rejected, asked)
    prompt = with_system(row, chosen[:shared]) if shared else []
    return prompt, chosen[shared:], rejected[shared:]  # type: ignore[return-value]


def _shared_messages(chosen: list[Message], rejected: list[Message], asked: str | None) -> int:
    """How many messages are the prompt; raises `UnusableRow` where the two do not share it."""
    if chosen[:-1] == rejected[:-1]:
        return len(chosen) - 1
    for shared, message in enumerate(chosen, start=1):
        asks = message["role"] == "user" and asked is not None and message["content"].strip() == asked.strip()
        if asks and chosen[:shared] == rejected[:shared]:  # both end with an assistant's message, so both go on
            if chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
                return shared
            break
    raise UnusableRow("prompts differ")


def _transcript_pair(row: Mapping[str, Any]) -> Pair:
    """Two HH-RLHF transcripts, cut after their last "Assistant:"."""
    halves = []
    for column in ("chosen", "rejected"):
        head, found, completion = _text(row, column).rpartition(_MARKER)
        if not found:
            raise BadRow(f"there is no 'prompt', and column {column!r} has no '\\n\\nAssistant:' as transcripts do")
        halves.append((head + found, completion))
    (prompt, chosen), (other_prompt, rejected) = halves
    transcript_messages(prompt)
    transcript_messages(other_prompt)
    if prompt != other_prompt:
        raise UnusableRow("prompts differ")
    return prompt, chosen, rejected


def _shared_text_pair(row: Mapping[str, Any]) -> Pair:
    """Two texts that begin alike: the prompt is what they share, without a space at its end."""
    chosen, rejected = (_text(row, column) for column in _PAIR)
    differ = (at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = next(differ, min(len(chosen), len(rejected)))
    if chosen[:shared].endswith(" "):
        shared -= 1
    if not chosen[:shared].strip():
        raise UnusableRow("prompts differ")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _are_transcripts(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row[column], str) and _MARKER in row[column] for column in _PAIR)


def _all_text(*columns: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(isinstance(row[column], str) for column in columns)


def _any_messages(*columns: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: any(isinstance(row[column], list | dict) for column in columns)


def _labelled(row: Mapping[str, Any]) -> bool:
    return isinstance(row["label"], bool)


_PAIR = ("chosen", "rejected")
_MARKER = "\n\nAssistant:"

SHAPES = (
    Shape(
        name="text pairs",
        needs=("prompt", *_PAIR),
        optional=("system",),
        matches=_all_text("prompt", *_PAIR),
        convert=_text_pair,
    ),
    Shape(
        name="chat pairs",
        needs=("prompt", *_PAIR),
        optional=("system",),
        matches=_any_messages("prompt", *_PAIR),
        convert=_chat_pair,
    ),
    Shape(
        name="ShareGPT pairs",
        needs=("conversations", *_PAIR),
        optional=("system",),
        matches=_any_messages("conversations"),
        convert=_conversation_pair("conversations"),
    ),
    Shape(
        name="chat pairs with messages",
        needs=("messages", *_PAIR),
        optional=("system",),
        matches=_any_messages("messages"),
        convert=_conversation_pair("messages"),
    ),
    Shape(
        name="instruction pairs",
        needs=("instruction", *_PAIR),
        optional=("input", "system"),
        matches=_all_text("instruction", *_PAIR),
        convert=_instruction_pair,
        plain_separator="\n",  # an instruction is a sentence, and the answer begins another
    ),
    Shape(
        name="HH-RLHF transcripts",
        needs=_PAIR,
        matches=_are_transcripts,
        convert=_transcript_pair,
        transcript=True,
    ),
    Shape(
        name="texts that begin alike",
        needs=_PAIR,
        matches=_all_text(*_PAIR),
        convert=_shared_text_pair,
        continues=True,
    ),
    Shape(
        name="full conversations",
        needs=_PAIR,
        optional=("system",),
        matches=lambda row: all(isinstance(row[column], list) for column in _PAIR),
        convert=_full_conversations,
    ),
    Shape(name="unpaired messages", needs=("messages", "label"), matches=_labelled, convert=None),
    Shape(name="unpaired conversations", needs=("conversations", "label"), matches=_labelled, convert=None),
    Shape(name="unpaired completions", needs=("prompt", "completion", "label"), matches=_labelled, convert=None),
)
"""In the order they are tried: a shape with more columns comes before one with fewer."""
