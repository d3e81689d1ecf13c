"""How do rows that are token ids already become trees? By the columns that TRL's preparation writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dpo_engine.data.records import DataReport, PairData, PreferenceRow, TokenizedTree
from dpo_engine.data.truncation import LOST, bound_tree, check_truncation, truncate_tree
from dpo_engine.errors import DataError

COLUMNS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),  # TRL up to 0.28
)
_SUMS = ("ref_chosen_logps", "ref_rejected_logps")


def token_columns(row: Any) -> tuple[str, str, str] | None:
    """Which columns of a row are its ids; None where it has text, or has no ids."""
    if not isinstance(row, Mapping) or "chosen" in row:
        return None
    return next((columns for columns in COLUMNS if all(column in row for column in columns)), None)


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
) -> PairData:
    """Trees of rows of ids; nothing is put before or behind them, and every id of a completion is scored.

    Raises:
        ConfigError: an option is out of range.
        DataError: a row lacks a column or has an empty one, or no row is left.
    """
    check_truncation(max_length, truncation)
    report = DataReport(source=source, format=f"token ids: {', '.join(columns)}")
    trees = []
    for number, row in enumerate(rows, start=1):
        report.rows_read += 1
        origin = f"{source}:row {number}"
        ids = [row.get(column) for column in columns]
        if bad := next((x for x in zip(columns, ids, strict=True) if not _are_ids(x[1])), None):
            if not skip_bad_rows:
                raise DataError(
                    f"{origin}: column {bad[0]!r} is a {type(bad[1]).__name__}, {str(bad[1])[:60]}; expected a list of at least "
                    "one token id (of a data set in torch or numpy format: dataset.with_format(None))"
                )
            report.leave_out("bad row", origin)
            continue
        prompt, chosen, rejected = (list(value) for value in ids)  # type: ignore[arg-type]
        sums = tuple(row.get(column) for column in _SUMS)
        whole = TokenizedTree(
            prompt_ids=prompt,
            completions=(chosen, rejected),
            origin=origin,
            reference_logps=None if None in sums else (float(sums[0]), float(sums[1])),  # type: ignore[arg-type]
        )
        bounded = bound_tree(whole, max_prompt_length, max_completion_length)
        tree = bounded and truncate_tree(bounded, max_length, truncation)
        if tree is None or tree.completions[0] == tree.completions[1]:
            report.leave_out(LOST[truncation] if tree is None else "identical completions", origin)
            continue
        report.truncated += tree is not whole
        trees.append(tree)
    report.rows_used = len(trees)
    if not trees:
        raise DataError(f"{source}: no usable row is left of {report.rows_read}")
    empty = [PreferenceRow(prompt="", chosen="", rejected="", origin=tree.origin) for tree in trees]
    return PairData(trees=trees, rows=empty, report=report)


def _are_ids(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(token, int) for token in value)
