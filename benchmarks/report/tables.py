"""What is a table, and how is it written in Markdown?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.harness import quantile
from benchmarks.report.results import Source

NOTHING = "–"
"""Stands where a figure has no meaning."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table."""

    cells: tuple[str, ...]
    """As many as the header; where there are no figures, the name alone."""
    why: str | None = None
    """Stands in place of figures: "n/a: ...", "failed: ...", "not measured: ..."."""
    ours: bool = False
    wrong: bool = False
    """Its answer is not to be used, so that neither is its time."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures of one kind, and the runs that they are from."""

    title: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()


def trimmed(table: Table) -> Table:
    """The same without the columns in which no row has anything."""
    kept = [
        column
        for column in range(len(table.header))
        if column == 0 or any(row.why is None and row.cells[column] not in ("", NOTHING) for row in table.rows)
    ]
    rows = [row if row.why else replace(row, cells=tuple(row.cells[column] for column in kept)) for row in table.rows]
    return replace(table, header=tuple(table.header[column] for column in kept), rows=tuple(rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def number(value: object, form: str) -> str:
    """`value` in that form; `NOTHING` where it is none, its own text where it is not a number."""
    if value is None:
        return NOTHING
    return format(value, form) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def spread(values: Mapping[str, float] | None, form: str) -> str:
    """As `1.13 (1.10–1.15)`: median, 20th and 80th percentile."""
    if not values:
        return NOTHING
    middle, low, high = (format(values[name], form) for name in ("median", "p20", "p80"))
    return middle if low == high == middle else f"{middle} ({low}–{high})"


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of a figure's rounds."""
    return {name: quantile(values, q) for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}


def mebibytes(value: object) -> str:
    """MiB, to three digits or so."""
    if not isinstance(value, (int, float)):
        return NOTHING if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"


def counted(count: object, noun: str) -> str:
    """As `2 threads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def short(text: str, width: int) -> str:
    """`text` cut to so many letters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def once(lines: Sequence[str]) -> tuple[str, ...]:
    """Each line once, in order."""
    return tuple(dict.fromkeys(lines))
