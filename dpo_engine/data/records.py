"""What passes between the data modules?

A row is followed from its place in a file (`SourceRow`), through its meaning (`PreferenceRow`), to token ids
(`TokenizedTree`). Every one carries its `origin`, such as "pairs.jsonl:17", so that what a message is about can be
looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

Message = dict[str, str]
"""One chat message: {"role": ..., "content": ...}."""

Text = str | list[Message]
"""Plain text, or chat messages."""

KINDS = ("pairs", "unpaired", "ranked")
"""What a method trains on: pairs of a better and a worse completion, labelled completions, or ranked lists of them."""

EXAMPLES_KEPT = 5
"""How many origins a report keeps for each reason."""


class BadRow(ValueError):
    """A row that cannot be parsed; the message is the reason. It stops the run unless such rows are skipped."""


class UnusableRow(ValueError):
    """A well-formed row that teaches nothing; the message is the reason under which it is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One row as the source holds it."""

    origin: str
    """Where it is: "file.jsonl:17" (line, from 1), "file.json:row 17" for the other formats, "row 17" in memory."""
    columns: dict[str, Any] | None
    """Its columns; None when it could not be parsed."""
    fault: str | None = None
    """Why it could not be parsed; None when it could."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceRow:
    """One usable row, still text: a pair, a completion with a label, or a ranked list."""

    prompt: Text
    """Text, or chat messages up to the completion."""
    completions: tuple[Text, ...]
    """Each text, or messages of which the first and the last are the assistant's. Of a pair the chosen one comes first, of a
    ranked list the best."""
    origin: str
    """Where it came from, for messages."""
    desirable: tuple[bool, ...] | None = None
    """Whether each completion is a good one, where they are judged one by one; None where they are compared."""
    ranks: tuple[int, ...] | None = None
    """Of a ranked list: from 0, ascending; equal ranks are a tie. None: no list."""
    reference_logps: tuple[float, ...] | None = None
    """Sums over scored tokens under the reference that the row brings, one a completion, in nats."""

    @property
    def chosen(self) -> Text:
        """The first completion: of a pair the better one."""
        return self.completions[0]

    @property
    def rejected(self) -> Text:
        """The second completion: of a pair the worse one."""
        return self.completions[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedTree:
    """One prompt and its K completions as token ids; of a pair the chosen one comes first, of a ranked list the best.

    The model is given `prompt_ids` and scored on the ids of each completion, its end token included.
    """

    prompt_ids: list[int]
    completions: tuple[list[int], ...]
    origin: str
    scored: tuple[list[bool], ...] | None = None
    """Which ids of each completion are scored: of several turns the assistant's. None: all of them."""
    desirable: tuple[bool, ...] | None = None
    """Whether each of the row's own completions is a good one, where they are judged one by one."""
    ranks: tuple[int, ...] | None = None
    """Of a ranked list: from 0, ascending; equal ranks are a tie."""
    reference_logps: tuple[float, ...] | None = None
    """Sums over scored tokens under the reference that the row brings, one a completion, in nats."""
    mismatched: bool = False
    """The last completion is another prompt's, for a baseline."""

    @property
    def scored_masks(self) -> tuple[list[bool], ...]:
        """`scored`, written out where it is None."""
        return self.scored or tuple([True] * len(ids) for ids in self.completions)


@dataclass(kw_only=True)
class DataReport:
    """The account of a data source: `rows_read == rows_used + sum(rows_left_out.values())`."""

    source: str
    """The path or hub id, as given."""
    format: str
    """One human line: which shape the columns have and how prompts are rendered."""
    rows_read: int = 0
    rows_used: int = 0
    rows_left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> number of rows."""
    truncated: int = 0
    """Trees that were kept but cut to fit max_length."""
    notes: list[str] = field(default_factory=list)
    """Facts about rows that were kept, one sentence each."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the first few origins."""

    def leave_out(self, reason: str, origin: str) -> None:
        """Counts one row under `reason`."""
        self.rows_left_out[reason] = self.rows_left_out.get(reason, 0) + 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append(origin)

    def add(self, part: DataReport) -> None:
        """Counts what was found of some rows that were read and understood before."""
        self.rows_used += part.rows_used
        self.truncated += part.truncated
        for reason, count in part.rows_left_out.items():
            self.rows_left_out[reason] = self.rows_left_out.get(reason, 0) + count
            kept = self.examples.setdefault(reason, [])
            kept += part.examples[reason][: EXAMPLES_KEPT - len(kept)]

    def lines(self) -> list[str]:
        """The report for people, one fact a line."""
        lines = [f"{self.source}: {self.format}", f"{self.rows_used} of {self.rows_read} rows used"]
        lines += [f"left out: {describe_reason(self, reason)}" for reason in self.rows_left_out]
        if self.truncated:
            lines.append(f"cut to fit max_length: {self.truncated}")
        return lines + self.notes


def describe_reason(report: DataReport, reason: str) -> str:
    """For example "6 identical completions (pairs.json:row 4, pairs.json:row 9, ...)"."""
    count, examples = report.rows_left_out[reason], report.examples[reason]
    more = ", ..." if count > len(examples) else ""
    return f"{count} {reason} ({', '.join(examples)}{more})"


@dataclass(kw_only=True)
class PairData(Sequence[TokenizedTree]):
    """Tokenised trees, a sequence of them, with the rows they came from and the report on the source."""

    trees: list[TokenizedTree]
    rows: list[PreferenceRow]
    """`rows[i]` is the text of `trees[i]`, as it was read (of a list, the completions that the tree has)."""
    report: DataReport

    def __len__(self) -> int:
        return len(self.trees)

    @overload
    def __getitem__(self, index: int) -> TokenizedTree: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedTree]: ...

    def __getitem__(self, index: int | slice) -> TokenizedTree | list[TokenizedTree]:
        return self.trees[index]

    def __iter__(self) -> Iterator[TokenizedTree]:
        return iter(self.trees)
