"""How does a data source become trees ready to train on, with every row accounted for?

`check_source` reads files, columns and rows, needs neither model nor tokenizer, and gives a `PairSource`.
`load_pairs` goes on to token ids that fit max_length, and gives the `PairData` to train on.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_engine.data.formats import (
    IDENTICAL,
    NO_PREFERENCE,
    SAMPLE_ROWS,
    DataFormat,
    detect_format,
    preference_row,
    require_kind,
)
from dpo_engine.data.reading import read_rows, rows_in_memory
from dpo_engine.data.records import (
    BadRow,
    DataReport,
    PairData,
    PreferenceRow,
    SourceRow,
    TokenizedTree,
    UnusableRow,
    describe_reason,
)
from dpo_engine.data.repeats import repeated, without
from dpo_engine.data.templates import (
    ChatRenderer,
    PlainRenderer,
    RenderedTree,
    marker_tokens,
    texts_of,
    use_chat_template,
)
from dpo_engine.data.tokenizing import EncodedTree, TreeEncoder
from dpo_engine.data.truncation import LOST, bound_tree, check_truncation, truncate_tree
from dpo_engine.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_UNUSABLE_SHARE = 0.05
"""Above this share of unusable rows the data is taken for broken, or for misread."""

UNPARSED = "could not be parsed"
UNUSABLE = ("prompts differ", "empty prompt", "empty completion", "nothing to score", IDENTICAL)
"""Reasons that count towards `MAX_UNUSABLE_SHARE`; truncation, ties and rows skipped on request do not."""
NO_PROMPT = "empty prompt and no BOS token"
_NO_PROMPT = "the prompt is empty, and the tokenizer has no BOS token from which a first token could be predicted"
REFUSED = "refused by the chat template"
IDENTICAL_AFTER_CUT = "identical after truncation"
BEYOND_LIMIT = "beyond limit"
CUT_SUMS = "cut to max_length, so the reference log-probs that they bring, of the whole row, are not used but computed"
REPEATED = "a completion that stands in the list more than once is taken once, with the best of its numbers"
ALIKE_AFTER_CUT = "completions that are alike when cut to length are taken once, with the best of their numbers"
BOTH_JUDGED = "pairs are taken as one desirable and one undesirable completion each"
MERGED = "the tokenizer merges across the end of the prompt (or of a turn), so what follows is tokenised on its own"
_BATCH = 512


@dataclass(kw_only=True)
class PairSource:
    """A data source whose every row was read and understood, still text."""

    rows: list[PreferenceRow]
    report: DataReport
    """What is known so far; `rows_used` counts the rows in `rows`."""
    format: DataFormat
    kind: str = "pairs"
    """What the rows were read as, one of `KINDS`."""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    max_length: int | None
    truncation: str
    skip_bad_rows: bool
    limit: int | None
    chat_template: str | bool
    max_prompt_length: int | None = None
    max_completion_length: int | None = None

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `ConfigError` for the first option out of range."""
        check_truncation(self.max_length, self.truncation)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}, expected at least 1 or none")
        use_chat_template(tokenizer, self.chat_template)


def check_source(
    source: str | Path,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    method: str = "dpo",
    kind: str = "pairs",
) -> PairSource:
    """Reads a source and says all that can be said without a tokenizer.

    Args:
        source: A .jsonl, .json, .csv (also .gz) or .parquet file, or a hub dataset id.
        split: Which split of a hub dataset.
        skip_bad_rows: Leave out and count rows that cannot be parsed, instead of stopping at the first.
        method: The method that will use the rows, for the message that refuses what it cannot train on.
        kind: What the method trains on: "pairs" (ranked lists are taken too), "unpaired" completions with a label (of a pair
            the chosen one is desirable and the rejected one not) or "ranked" lists (a pair is a list of two).

    Returns:
        The usable rows, for `load_pairs`.

    Raises:
        ConfigError: `kind` is not one of these.
        DataError: The source is missing, empty or not understood; a row cannot be parsed ("file:line: reason"); the
            rows are not of the kind; or more than 5 % of the rows are unusable.
    """
    return _understood(read_rows(source, split=split), str(source), skip_bad_rows, method, kind)


def load_pairs(
    source: str | Path | PairSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation: str = "keep_start",
    skip_bad_rows: bool = False,
    split: str = "train",
    limit: int | None = None,
    chat_template: str | bool = "auto",
    method: str = "dpo",
    kind: str = "pairs",
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> PairData:
    """Reads a source of pairs, labelled completions or ranked lists and tokenises it, one tree a row.

    Args:
        source: As for `check_source`, or what `check_source` returned.
        tokenizer: A transformers tokenizer.
        max_length: Tokens of a prompt and its longest completion together; None for no bound.
        truncation: What to do beyond it: "keep_start", "keep_end", "drop" or "error" (see truncation.py).
        skip_bad_rows: Leave out and count rows that cannot be parsed or that the chat template refuses.
        split: Which split of a hub dataset.
        limit: Keep only the first so many usable rows, and do not look at those after them.
        chat_template: "auto" (if the tokenizer has one), "on" or "off".
        method, kind: As for `check_source`; what it returned is of a kind already.
        max_prompt_length: Tokens of a prompt, which loses its beginning beyond it; before `max_length`.
        max_completion_length: Tokens of a completion, which loses its end beyond it; before `max_length`.

    Returns:
        The trees, their rows and the report.

    Raises:
        ConfigError: An option is out of range, or `check_source` read the rows as another kind.
        DataError: As for `check_source`; a row is too long with "error"; the template cannot be used; no row is left.
    """
    options = ReadingOptions(
        max_length=max_length,
        truncation=truncation,
        skip_bad_rows=skip_bad_rows,
        limit=limit,
        chat_template=chat_template,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
    )
    options.check(tokenizer)
    if not isinstance(source, PairSource):
        source = check_source(source, split=split, skip_bad_rows=skip_bad_rows, method=method, kind=kind)
    elif kind not in ("pairs", source.kind):
        raise ConfigError(f"kind={kind!r}, but check_source read the rows as {source.kind!r}; give it the same kind")
    data = Loading(source, tokenizer, options).run()
    check_usable(data.report)
    return data


def load_row(
    source: str | Path,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation: str = "keep_start",
    split: str = "train",
    chat_template: str | bool = "auto",
    skip_bad_rows: bool = False,
    method: str = "dpo",
    kind: str = "pairs",
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> TokenizedTree:
    """The tree of one row, as `load_pairs` makes it.

    Args:
        number: The row's number in messages about it: of a .jsonl file the line, else the row, from 1.
        source, tokenizer, max_length, truncation, split, chat_template, skip_bad_rows, method, kind,
            max_prompt_length, max_completion_length: As for `load_pairs`.

    Raises:
        ConfigError, DataError: As for `load_pairs`; there is no such row, or it is left out (the message says why).
    """
    options = ReadingOptions(
        max_length=max_length,
        truncation=truncation,
        skip_bad_rows=skip_bad_rows,
        limit=None,
        chat_template=chat_template,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
    )
    options.check(tokenizer)
    found = check_source(source, split=split, skip_bad_rows=skip_bad_rows, method=method, kind=kind)
    rows = [row for row in found.rows if _number(row.origin) == number]
    if not rows:
        raise DataError(_why_not_there(source, split, number, found.format))
    report = DataReport(source=str(source), format=found.report.format)
    data = Loading(replace(found, rows=rows, report=report), tokenizer, options).run()
    if not data.trees:
        raise DataError(f"{rows[0].origin} is left out: {', '.join(data.report.rows_left_out)}")
    return data.trees[0]


def _number(origin: str) -> int:
    """17 of "pairs.jsonl:17", of "pairs.json:row 17" and of "row 17"."""
    return int(re.split(r"\D", origin)[-1])


def _why_not_there(source: str | Path, split: str, number: int, data_format: DataFormat) -> str:
    """Why a row is not among those that `check_source` found usable."""
    last = ""
    for row in read_rows(source, split=split):
        last = row.origin
        if _number(row.origin) == number:
            try:
                preference_row(data_format, row)
            except (BadRow, UnusableRow) as error:
                return f"{row.origin} is left out: {row.fault or error}"
    return f"{source} has no row {number}; its last is {last}"


def tokenize_pairs(
    rows: PairSource | Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation: str = "keep_start",
    skip_bad_rows: bool = False,
    limit: int | None = None,
    chat_template: str | bool = "auto",
    method: str = "dpo",
    kind: str = "pairs",
    source: str | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> PairData:
    """Tokenises rows that are already in memory: pairs, labelled completions or ranked lists, one tree a row.

    Args:
        rows: A list of dicts or a `datasets.Dataset`, in any shape that files may have; or a `PairSource`.
        tokenizer: A transformers tokenizer.
        max_length, truncation, skip_bad_rows, limit, chat_template, method, kind, max_prompt_length,
            max_completion_length: As for `load_pairs`.
        source: What to call the rows in messages, such as "train_dataset".

    Returns:
        As `load_pairs`, with origins "row 17", or "train_dataset:row 17".

    Raises:
        As `load_pairs`.
    """
    if not isinstance(rows, PairSource):
        name = source or "the data in memory"
        rows = _understood(rows_in_memory(rows, source), name, skip_bad_rows, method, kind)
    return load_pairs(
        rows,
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        skip_bad_rows=skip_bad_rows,
        limit=limit,
        chat_template=chat_template,
        method=method,
        kind=kind,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
    )


def _understood(rows: Iterator[SourceRow], source: str, skip_bad_rows: bool, method: str, kind: str) -> PairSource:
    report = DataReport(source=source, format="")
    parsed = readable_rows(rows, report, skip_bad_rows)
    sample = list(itertools.islice(parsed, SAMPLE_ROWS))
    data_format = format_of(sample, report, method, kind)
    kept = list(preference_rows(itertools.chain(sample, parsed), data_format, report, skip_bad_rows, kind))
    report.rows_used = len(kept)
    check_usable(report)
    return PairSource(rows=kept, report=report, format=data_format, kind=kind)


def format_of(sample: list[SourceRow], report: DataReport, method: str, kind: str) -> DataFormat:
    """The shape of a source's first rows, which must be of a kind that the method can use."""
    source = report.source
    if not sample:
        if report.rows_left_out:
            raise DataError(f"{source}: no row could be parsed: {describe_reason(report, UNPARSED)}")
        raise DataError(f"{source} holds no rows")
    try:
        data_format = detect_format(row.columns for row in sample if row.columns is not None)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    require_kind(data_format, source, method, kind)
    report.format = str(data_format)
    if data_format.kind == "pairs" and kind == "unpaired":
        report.notes.append(BOTH_JUDGED)
    return data_format


def preference_rows(
    rows: Iterable[SourceRow], data_format: DataFormat, report: DataReport, skip_bad_rows: bool, kind: str
) -> Iterator[PreferenceRow]:
    """The rows that are usable as text; the report counts the others."""
    for row in rows:
        try:
            yield preference_row(data_format, row, kind)
        except BadRow as error:
            skip_or_stop(report, row.origin, str(error), skip_bad_rows)
        except UnusableRow as error:
            report.leave_out(str(error), row.origin)


def readable_rows(rows: Iterator[SourceRow], report: DataReport, skip_bad_rows: bool) -> Iterator[SourceRow]:
    for row in rows:
        report.rows_read += 1
        if row.fault is None:
            yield row
        else:
            skip_or_stop(report, row.origin, row.fault, skip_bad_rows)


def skip_or_stop(report: DataReport, origin: str, fault: str, skip_bad_rows: bool, reason: str = UNPARSED) -> None:
    if not skip_bad_rows:
        raise DataError(f"{origin}: {fault} (mend the row, or leave such rows out with --skip_bad_rows)")
    report.leave_out(reason, origin)


def check_usable(report: DataReport) -> None:
    """Raises `DataError` when too many rows are unusable, or none is left."""
    reasons = [reason for reason in report.rows_left_out if reason in UNUSABLE]
    unusable = sum(report.rows_left_out[reason] for reason in reasons)
    if unusable > MAX_UNUSABLE_SHARE * report.rows_read:
        said = "; ".join(describe_reason(report, reason) for reason in reasons)
        raise DataError(
            f"{report.source}: {unusable} of {report.rows_read} rows are unusable, more than {MAX_UNUSABLE_SHARE:.0%}: "
            f"{said}; check that the columns mean what was read ({report.format}), or remove these rows"
        )
    if not report.rows_used:
        said = "; ".join(describe_reason(report, reason) for reason in report.rows_left_out)
        raise DataError(f"{report.source}: no usable row is left of {report.rows_read}: {said}")


class Loading:
    """One pass over the rows of a source, batch by batch, in order."""

    def __init__(
        self,
        source: PairSource,
        tokenizer: PreTrainedTokenizerBase,
        options: ReadingOptions,
    ) -> None:
        shape = source.format.shape
        renderer: ChatRenderer | PlainRenderer = PlainRenderer(shape.plain_separator)
        is_plain = shape.continues and options.chat_template == "auto"
        if use_chat_template(tokenizer, options.chat_template) and not is_plain:
            renderer = ChatRenderer(tokenizer, transcript=shape.transcript)
        self._rows, self._renderer, self._options = source.rows, renderer, options
        self._encoder = TreeEncoder(tokenizer, adds_bos=renderer.adds_bos, appends_eos=renderer.appends_eos)
        self._markers = re.compile("|".join(map(re.escape, marker_tokens(tokenizer))) or "(?!)")
        known = source.report
        report = replace(known, rows_left_out=dict(known.rows_left_out), notes=list(known.notes))
        report.examples = {reason: list(origins) for reason, origins in known.examples.items()}
        report.format = f"{known.format}; {renderer.clause}"
        self._data = PairData(trees=[], rows=[], report=report)
        self._noted: Counter[str] = Counter()

    def run(self) -> PairData:
        data, report, limit = self._data, self._data.report, self._options.limit
        for start in range(0, len(self._rows), _BATCH):
            batch = self._rows[start : start + _BATCH]
            if len(data) == limit:  # rows that nobody will use need no tokens
                for row in batch:
                    report.leave_out(BEYOND_LIMIT, row.origin)
                continue
            for row, rendered, encoded in self._encoded(batch):
                if len(data) == limit:
                    report.leave_out(BEYOND_LIMIT, row.origin)
                else:
                    self._take(row, rendered, encoded)
        report.rows_used = len(data)
        report.notes += [f"{count} {'row' if count == 1 else 'rows'}: {note}" for note, count in self._noted.items()]
        return data

    def _encoded(self, batch: list[PreferenceRow]) -> Iterator[tuple[PreferenceRow, RenderedTree, EncodedTree]]:
        rows, rendered = [], []
        for row in batch:
            try:
                rendered.append(self._renderer.render(row))
                rows.append(row)
            except BadRow as error:
                skip_or_stop(self._data.report, row.origin, str(error), self._options.skip_bad_rows, REFUSED)
        return zip(rows, rendered, self._encoder.encode(rendered), strict=True)

    def _take(self, row: PreferenceRow, rendered: RenderedTree, encoded: EncodedTree) -> None:
        """Keeps one row, or leaves it out for a reason that only its tokens show."""
        report, options = self._data.report, self._options
        if not encoded.prompt_ids:
            skip_or_stop(report, row.origin, _NO_PROMPT, options.skip_bad_rows, NO_PROMPT)
            return
        reason = _unusable(encoded)
        if reason:
            report.leave_out(reason, row.origin)
            return
        whole = TokenizedTree(
            prompt_ids=encoded.prompt_ids,
            completions=encoded.completions,
            origin=row.origin,
            scored=encoded.scored,
            desirable=row.desirable,
            ranks=row.ranks,
            reference_logps=row.reference_logps,
        )
        several = len(row.completions) > 1
        same = repeated(whole)
        if same:
            whole, row = without(whole, same), without(row, same)
        reason = _nothing_compared(whole, several, IDENTICAL)
        if reason:
            report.leave_out(reason, row.origin)
            return
        bounded = bound_tree(whole, options.max_prompt_length, options.max_completion_length)
        tree = bounded and truncate_tree(bounded, options.max_length, options.truncation)
        if tree is None:
            report.leave_out(LOST[options.truncation], row.origin)
            return
        was_cut = tree is not whole
        alike = repeated(tree)
        if alike:
            tree, row = without(tree, alike), without(row, alike)
        reason = _nothing_compared(tree, several, IDENTICAL_AFTER_CUT)
        if reason:
            report.leave_out(reason, row.origin)
            return
        self._data.trees.append(tree)
        self._data.rows.append(row)
        report.truncated += was_cut
        found = {
            CUT_SUMS: was_cut and row.reference_logps is not None,
            REPEATED: bool(same),
            ALIKE_AFTER_CUT: bool(alike),
        }
        self._noted.update(note for note, holds in found.items() if holds)
        self._noted.update(note for note, holds in self._notes(row, rendered, encoded) if holds)

    def _notes(self, row: PreferenceRow, rendered: RenderedTree, encoded: EncodedTree) -> Iterator[tuple[str, bool]]:
        yield MERGED, encoded.merged
        yield "the template's generation prompt ends with white space that answers do not begin with", rendered.trimmed
        yield "the text itself holds a special token of the tokenizer", bool(self._markers.search(texts_of(row)))


def _unusable(encoded: EncodedTree) -> str | None:
    if not all(encoded.completions):
        return "empty completion"
    if encoded.scored and not all(map(any, encoded.scored)):
        return "nothing to score"
    return None


def _nothing_compared(tree: TokenizedTree, several: bool, reason: str) -> str | None:
    """Why a tree without repetitions teaches nothing: `reason` where one completion is left of several, or all tie."""
    if several and len(tree.completions) < 2:
        return reason
    return NO_PREFERENCE if tree.ranks is not None and len(set(tree.ranks)) < 2 else None
