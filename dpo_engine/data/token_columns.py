"""How do rows that are token ids already become trees? By the columns that TRL's preparation writes.

prompt_ids, chosen_ids, rejected_ids    pairs
prompt_ids, completion_ids, label       labelled completions
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dpo_engine.data.pairs import BOTH_JUDGED, IDENTICAL_AFTER_CUT
from dpo_engine.data.records import KINDS, BadRow, DataReport, PairData, PreferenceRow, TokenizedTree
from dpo_engine.data.truncation import LOST, bound_tree, check_truncation, truncate_tree
from dpo_engine.data.unpaired import read_label
from dpo_engine.errors import ConfigError, DataError

COLUMNS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),  # TRL up to 0.28
)
LABELLED = ("prompt_ids", "completion_ids", "label")
_SUMS = ("ref_chosen_logps", "ref_rejected_logps")


def token_columns(row: Any) -> tuple[str, str, str] | None:
    """Which columns of a row are its ids (and its label); None where it has text, or has no ids."""
    if not isinstance(row, Mapping):
        return None
    if "chosen" not in row:
        found = next((columns for columns in COLUMNS if all(column in row for column in columns)), None)
        if found:
            return found
    return LABELLED if "completion" not in row and all(column in row for column in LABELLED) else None


def pairs_of_ids(
    rows: Iterable[Mapping[str, Any]],
    columns: tuple[str, str, str],
    source: str,
    *,
    max_length: int | None,
    truncation: str,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    skip_bad_rows: bool = False,
    method: str = "dpo",
    kind: str = "pairs",
) -> PairData:
    """Trees of rows of ids; nothing is put before or behind them, and every id of a completion is scored.

    Args:
        columns: What `token_columns` found.
        kind: What `method` trains on: "pairs", "unpaired" or "ranked", as for `load_pairs`.

    Raises:
        ConfigError: an option is out of range.
        DataError: a row lacks a column or has an empty one, the rows are not of the kind, or no row is left.
    """
    check_truncation(max_length, truncation)
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is not known; expected one of {', '.join(KINDS)}")
    if columns == LABELLED and kind != "unpaired":
        raise DataError(
            f"{source} holds token ids of one completion and a label a row, but method {method!r} compares completions; set "
            f"method: kto, which trains on such rows, or give {', '.join(COLUMNS[0])}"
        )
    report = DataReport(source=source, format=f"token ids: {', '.join(columns)}")
    if columns != LABELLED and kind == "unpaired":
        report.notes.append(BOTH_JUDGED)
    trees = []
    for number, row in enumerate(rows, start=1):
        report.rows_read += 1
        origin = f"{source}:row {number}"
        try:
            whole = _tree(row, columns, origin, kind)
        except BadRow as error:
            if not skip_bad_rows:
                raise DataError(f"{origin}: {error}") from error
            report.leave_out("bad row", origin)
            continue
        if len(whole.completions) > 1 and whole.completions[0] == whole.completions[1]:
            report.leave_out("identical completions", origin)
            continue
        bounded = bound_tree(whole, max_prompt_length, max_completion_length)
        tree = bounded and truncate_tree(bounded, max_length, truncation)
        if tree is None or (len(tree.completions) > 1 and tree.completions[0] == tree.completions[1]):
            report.leave_out(LOST[truncation] if tree is None else IDENTICAL_AFTER_CUT, origin)
            continue
        report.truncated += tree is not whole
        trees.append(tree)
    report.rows_used = len(trees)
    if not trees:
        raise DataError(f"{source}: no usable row is left of {report.rows_read}")
    empty = [
        PreferenceRow(
            prompt="",
            completions=("",) * len(tree.completions),
            origin=tree.origin,
            desirable=tree.desirable,
            ranks=tree.ranks,
        )
        for tree in trees
    ]
    return PairData(trees=trees, rows=empty, report=report)


def _tree(row: Mapping[str, Any], columns: tuple[str, str, str], origin: str, kind: str) -> TokenizedTree:
    """One row as it stands; raises `BadRow`."""
    named = columns[:2] if columns == LABELLED else columns
    for column in named:
        if not _are_ids(value := row.get(column)):
            raise BadRow(
                f"column {column!r} is a {type(value).__name__}, {str(value)[:60]}; expected a list of at least one token id (of "
                "a data set in torch or numpy format: dataset.with_format(None))"
            )
    prompt, *completions = (list(row[column]) for column in named)
    desirable: tuple[bool, ...] | None = (True, False) if kind == "unpaired" else None
    if columns == LABELLED:
        desirable = (read_label(row.get("label"), "label"),)
    sums = tuple(row.get(column) for column in _SUMS)
    return TokenizedTree(
        prompt_ids=prompt,
        completions=tuple(completions),
        origin=origin,
        desirable=desirable,
        ranks=(0, 1) if kind == "ranked" else None,
        reference_logps=None if columns == LABELLED or None in sums else (float(sums[0]), float(sums[1])),  # type: ignore[arg-type]
    )


def _are_ids(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(token, int) for token in value)
