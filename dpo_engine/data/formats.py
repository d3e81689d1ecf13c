"""What do the columns of a data set mean?

Each understood arrangement of columns is one `Shape` (shapes.py): those of pairs are below, those of labelled completions in
unpaired.py, those of ranked lists in ranked.py. The shape is detected once, from the first rows; after that every row must
have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_engine.data import unpaired
from dpo_engine.data.messages import completion_messages, read_messages, transcript_messages, with_system
from dpo_engine.data.ranked import UNDERSTOOD as RANKED_LISTS
from dpo_engine.data.ranked import ranked_shape
from dpo_engine.data.records import KINDS, BadRow, Message, PreferenceRow, SourceRow, Text, UnusableRow
from dpo_engine.data.repeats import distinct
from dpo_engine.data.shapes import Answers, Shape, instruction_text, kind_of_value, text_in
from dpo_engine.errors import ConfigError, DataError

SAMPLE_ROWS = 100
"""How many rows vote on the shape, so that one odd first row does not decide."""

REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")
"""What a pair may bring of its reference: sums over scored tokens, in nats."""
TRL_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""TRL's names for the same."""

IDENTICAL = "identical completions"
NO_PREFERENCE = "no preference among completions"
"""A list of one completion, or of which all tie."""

_NOT_SUPPORTED = {
    "tools": "tool definitions are not supported yet",
    "chat_template_kwargs": "a chat template is given nothing but messages",
    "image": "the engine trains language models on text alone",
    "images": "the engine trains language models on text alone",
}
_INFINITY = float("inf")

Pair = tuple[Text, Text, Text]
"""Prompt, chosen, rejected."""

_TAKES = {"pairs": ("pairs", "ranked"), "unpaired": ("unpaired", "pairs"), "ranked": ("ranked", "pairs")}
"""What a method trains on -> the kinds of rows it can be given."""


@dataclass(frozen=True, kw_only=True)
class DataFormat:
    """The detected shape of one data source."""

    shape: Shape
    columns: tuple[str, ...]
    """The columns that are read."""
    ignored: tuple[str, ...]
    """The columns that are not."""

    @property
    def kind(self) -> str:
        """What each row is, one of `KINDS`."""
        return self.shape.kind

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
    votes = Counter(shape for row in rows if (shape := _shape_of(row)))
    if not votes:
        found, expected = _columns_found(rows), _shapes_understood()
        raise DataError(f"the columns are not understood: found {found}; expected one of: {expected}")
    shape = votes.most_common(1)[0][0]
    present = dict.fromkeys(column for row in rows for column in row)
    known = sorted((*shape.needs, *shape.optional), key=lambda column: column in _PAIR)  # the pair last
    if shape.kind == "pairs":
        known += [*REFERENCE_COLUMNS, *TRL_REFERENCE_COLUMNS]
    return DataFormat(
        shape=shape,
        columns=tuple(column for column in known if column in present),
        ignored=tuple(column for column in present if column not in known),
    )


def require_kind(data_format: DataFormat, source: str, method: str, kind: str) -> None:
    """Refuses rows that a method cannot train on.

    Raises:
        ConfigError: `kind` is not one of `KINDS`.
        DataError: The rows are labelled one by one and the method compares, or they are lists and the method needs labels.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is not known; expected one of {', '.join(KINDS)}")
    if data_format.kind in _TAKES[kind]:
        return
    if kind == "unpaired":
        raise DataError(
            f"{source} holds {data_format}: a ranked list a row, but method {method!r} needs completions that are labelled "
            "desirable or not; give one completion and its label a row (where a number becomes a good one is yours to say), or "
            "take a method that compares (dpo, plackett_luce, ...)"
        )
    wanted = "ranked lists, or pairs" if kind == "ranked" else "pairs"
    raise DataError(
        f"{source} holds {data_format}: one completion and a label a row, but method {method!r} needs {wanted}; "
        "set method: kto, which trains on such rows, or give data with a chosen and a rejected completion for each prompt"
    )


def preference_row(data_format: DataFormat, row: SourceRow, kind: str = "pairs") -> PreferenceRow:
    """Reads one row in the detected shape, as what `kind` needs.

    Raises:
        BadRow: A column is missing or holds the wrong type.
        UnusableRow: "prompts differ", "empty prompt", "empty completion", "identical completions" or "no preference among
            completions".
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
    answers = shape.convert(columns)
    _check_answers(answers)
    desirable, ranks = answers.desirable, answers.ranks
    if shape.kind == "pairs" and kind == "unpaired":
        desirable = (True, False)
    if shape.kind == "pairs" and kind == "ranked":
        ranks = (0, 1)
    return PreferenceRow(
        prompt=answers.prompt,
        completions=answers.completions,
        origin=row.origin,
        desirable=desirable,
        ranks=ranks,
        reference_logps=_reference_logps(columns) if shape.kind == "pairs" else None,
    )


def _check_answers(answers: Answers) -> None:
    """Raises `UnusableRow` for a row that teaches nothing."""
    prompt, completions, ranks = answers.prompt, answers.completions, answers.ranks
    if isinstance(prompt, list) and not prompt:
        raise UnusableRow("empty prompt")
    if not all(completion_text(completion).strip() for completion in completions):
        raise UnusableRow("empty completion")
    kept = distinct(completions)
    if len(completions) > 1 and len(kept) < 2:
        raise UnusableRow(IDENTICAL)
    if ranks is not None and len({ranks[index] for index in kept}) < 2:
        raise UnusableRow(NO_PREFERENCE)


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
        if value is None or not is_number or not -_INFINITY < value <= 0:
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
    for completion in row.completions:
        if isinstance(completion, str):
            # the space after "Assistant:" is the transcript's, not the answer's
            completion = [{"role": "assistant", "content": completion.strip() if transcript else completion}]
        completions.append(completion)
    return prompt, completions


def _shape_of(row: Mapping[str, Any]) -> Shape | None:
    known = next((s for s in SHAPES if all(column in row for column in s.needs) and s.matches(row)), None)
    return known or ranked_shape(row)


def _columns_found(rows: list[Mapping[str, Any]]) -> str:
    kinds = {column: kind_of_value(value) for row in reversed(rows) for column, value in row.items()}
    return ", ".join(f"{column} ({kind})" for column, kind in kinds.items()) or "none"


def _shapes_understood() -> str:
    shapes = [f"{shape.name} ({', '.join(shape.needs)})" for shape in SHAPES if unpaired.LABELS[1] not in shape.needs]
    return "; ".join([*shapes, RANKED_LISTS])


def _text_pair(row: Mapping[str, Any]) -> Pair:
    return with_system(row, text_in(row, "prompt")), text_in(row, "chosen"), text_in(row, "rejected")


def _instruction_pair(row: Mapping[str, Any]) -> Pair:
    return with_system(row, instruction_text(row)), text_in(row, "chosen"), text_in(row, "rejected")


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
        head, found, completion = text_in(row, column).rpartition(_MARKER)
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
    chosen, rejected = (text_in(row, column) for column in _PAIR)
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


def _pairs(*, convert: Callable[[Mapping[str, Any]], Pair], **fields: Any) -> Shape:
    """A shape whose rows are a prompt, a chosen and a rejected completion."""

    def answers(row: Mapping[str, Any]) -> Answers:
        prompt, chosen, rejected = convert(row)
        return Answers(prompt=prompt, completions=(chosen, rejected))

    return Shape(kind="pairs", convert=answers, **fields)


_PAIR = ("chosen", "rejected")
_MARKER = "\n\nAssistant:"

SHAPES = (
    _pairs(
        name="text pairs",
        needs=("prompt", *_PAIR),
        optional=("system",),
        matches=_all_text("prompt", *_PAIR),
        convert=_text_pair,
    ),
    _pairs(
        name="chat pairs",
        needs=("prompt", *_PAIR),
        optional=("system",),
        matches=_any_messages("prompt", *_PAIR),
        convert=_chat_pair,
    ),
    _pairs(
        name="ShareGPT pairs",
        needs=("conversations", *_PAIR),
        optional=("system",),
        matches=_any_messages("conversations"),
        convert=_conversation_pair("conversations"),
    ),
    _pairs(
        name="chat pairs with messages",
        needs=("messages", *_PAIR),
        optional=("system",),
        matches=_any_messages("messages"),
        convert=_conversation_pair("messages"),
    ),
    _pairs(
        name="instruction pairs",
        needs=("instruction", *_PAIR),
        optional=("input", "system"),
        matches=_all_text("instruction", *_PAIR),
        convert=_instruction_pair,
        plain_separator="\n",  # an instruction is a sentence, and the answer begins another
    ),
    _pairs(
        name="HH-RLHF transcripts",
        needs=_PAIR,
        matches=_are_transcripts,
        convert=_transcript_pair,
        transcript=True,
    ),
    _pairs(
        name="texts that begin alike",
        needs=_PAIR,
        matches=_all_text(*_PAIR),
        convert=_shared_text_pair,
        continues=True,
    ),
    _pairs(
        name="full conversations",
        needs=_PAIR,
        optional=("system",),
        matches=lambda row: all(isinstance(row[column], list) for column in _PAIR),
        convert=_full_conversations,
    ),
    *unpaired.SHAPES,
)
"""In the order they are tried: a shape with more columns comes before one with fewer, and ranked lists after all of them."""
