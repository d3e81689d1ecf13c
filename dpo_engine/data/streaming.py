"""How do rows that arrive one by one, perhaps for ever, become trees? As files do, a few rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from dpo_engine.data.formats import SAMPLE_ROWS
from dpo_engine.data.pairs import (
    Loading,
    PairSource,
    ReadingOptions,
    check_usable,
    format_of,
    preference_rows,
    readable_rows,
)
from dpo_engine.data.reading import rows_in_memory
from dpo_engine.data.records import DataReport, TokenizedTree
from dpo_engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 32
_ROWS_TO_JUDGE = 1000
"""After so many rows, and at the end, a stream with too many unusable rows is refused."""


class PairStream(IterableDataset):
    """Tokenised trees of a stream of rows, as they arrive, without an end: after the last row comes the first again.

    So a trainer's steps alone say when to stop, and where a run that goes on has to begin.

    The shape of the rows is that of the first hundred. A row that cannot be parsed stops the stream, or is counted where
    `skip_bad_rows` says so; unusable rows are counted in `report`, and too many of them are refused.

    Args:
        rows: an iterable of dicts, such as a `datasets.IterableDataset`.
        tokenizer: a transformers tokenizer.
        source: what to call the rows in messages.
        max_length, truncation, skip_bad_rows, chat_template, method, kind, max_prompt_length, max_completion_length: as for
            `load_pairs`.

    Raises:
        ConfigError: an option is out of range.
        DataError: while iterating: as `load_pairs`.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: str,
        max_length: int | None,
        truncation: str = "keep_start",
        skip_bad_rows: bool = False,
        chat_template: str | bool = "auto",
        method: str = "dpo",
        kind: str = "pairs",
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
    ) -> None:
        self.options = ReadingOptions(
            max_length=max_length,
            truncation=truncation,
            skip_bad_rows=skip_bad_rows,
            limit=None,
            chat_template=chat_template,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
        )
        self.options.check(tokenizer)
        self.rows, self.tokenizer, self.source = rows, tokenizer, source
        self.method, self.kind = method, kind
        self.report = DataReport(source=source, format="")
        """The account of the pass that is under way."""
        self._was_read = False

    def __iter__(self) -> Iterator[TokenizedTree]:
        for number in itertools.count():
            if number and hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(number)  # so that a stream that shuffles does so anew
            yield from self._once()
            if number == 0:
                rows = self.report.rows_used
            elif not self.report.rows_read:
                raise DataError(
                    f"{self.source} ended after {rows} usable rows and cannot be read again; set max_steps to what they suffice "
                    "for, or pass rows that can be iterated more than once"
                )

    def _once(self) -> Iterator[TokenizedTree]:
        """One pass."""
        self.report = report = DataReport(source=self.source, format="")
        skips = self.options.skip_bad_rows
        parsed = readable_rows(rows_in_memory(self.rows, self.source), report, skips)
        sample = list(itertools.islice(parsed, SAMPLE_ROWS))
        if self._was_read and not report.rows_read:
            return
        self._was_read = True
        data_format = format_of(sample, report, self.method, self.kind)
        usable = preference_rows(itertools.chain(sample, parsed), data_format, report, skips, self.kind)
        judged = 0
        while some := list(itertools.islice(usable, _ROWS_AT_ONCE)):
            part = DataReport(source=self.source, format="")
            source = PairSource(rows=some, report=part, format=data_format, kind=self.kind)
            data = Loading(source, self.tokenizer, self.options).run()
            report.add(data.report)
            yield from data.trees
            if report.rows_read - judged >= _ROWS_TO_JUDGE:
                check_usable(report)
                judged = report.rows_read
        check_usable(report)
