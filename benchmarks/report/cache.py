"""What do the records of the suite `cache` say? What the reference cache costs, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.names import is_ours, title
from benchmarks.report.results import COMMON as IN_EVERY_LINE
from benchmarks.report.results import EVERY_RECORD, KEY, Found, sources_of
from benchmarks.report.tables import Row, Table, markdown, once

PARTS = {
    "store": "made-up log-probs, written and read",
    "build": "filling an empty cache beside the bare forward pass of the same forests",
    "sweep": "until the reference of all pairs is at hand, one beta after another on one cache",
}
UNITS = (
    ("median_ms", "median, ms"),
    ("p20_ms", "p20, ms"),
    ("p80_ms", "p80, ms"),
    ("median_s", "median, s"),
    ("p20_s", "p20, s"),
    ("p80_s", "p80, s"),
)
_LEFT_OUT = {*IN_EVERY_LINE, *EVERY_RECORD, "model", "data", "note", "part", "device"}


def tables(found: Sequence[Found]) -> list[Table]:
    """A table for each part; its columns are all figures that its records have."""
    made = []
    for part, of_part in by_part(found).items():
        columns = once([name for of in of_part for name in of.records[0] if name not in _LEFT_OUT])
        first = of_part[0]
        data = ", ".join(str(first.get(name)) for name in ("data", "model", "dtype") if first.get(name))
        made.append(
            Table(
                title=f"{part}: {PARTS.get(part, '')} ({data}, {first['threads']} threads)",
                header=("", *(_words(name) for name in columns), "remark"),
                rows=tuple(_row(of, columns) for of in of_part),
                notes=once([str(of["note"]) for of in of_part if of.get("note")]),
                sources=sources_of(of_part),
            )
        )
    return made


def by_part(found: Sequence[Found]) -> dict[str, list[Found]]:
    parts: dict[str, list[Found]] = {name: [] for name in PARTS}
    for of in found:
        parts.setdefault(of["case"], []).append(of)
    return {name: of for name, of in parts.items() if of}


def _words(name: str) -> str:
    return dict(UNITS).get(name, name.replace("_", " "))


def _row(of: Found, columns: Sequence[str]) -> Row:
    name = of["implementation"]
    if not of.is_measured:
        return Row(cells=(title(name),), why=of.status, ours=is_ours(name))
    cells = [shown(of.get(column), column, of.unquotable) for column in columns]
    return Row(cells=(title(name), *cells, f"no ratio: {of.unquotable}" if of.unquotable else ""), ours=is_ours(name))


def shown(value: Any, column: str, unquotable: str | None) -> str:
    """A figure of any kind; ratios are left out where they are not to be quoted."""
    if unquotable and ("ratio" in column or column.startswith("over_")):
        return "not quoted"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(of, column, None)}" for name, of in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(of, column, None) for of in value)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


# ---- for a page written by hand ----


def block(found: Sequence[Found]) -> tuple[str, Sequence[Found]]:
    """Markdown: every part's figures, one a line, and the records that it is from."""
    rows = []
    for part, of_part in by_part(found).items():
        for of in of_part:
            settings = ", ".join(f"{name} {of[name]}" for name in ("beta",) if of.get(name) is not None)
            name = f"{part}, {settings}" if settings else part
            if not of.is_measured:
                rows.append([name, of.status, ""])
                continue
            for column in (name for name in of.records[0] if name not in _LEFT_OUT and name not in KEY):
                rows.append([name, _words(column), shown(of.get(column), column, of.unquotable)])
                name = ""
            if of.unquotable:
                rows.append(["", "no ratio", of.unquotable])
    return markdown(["reference cache", "", "measured"], rows), found


# ---- for a comparison of two runs ----


def ratios(found: Sequence[Found]) -> dict[tuple[str, ...], tuple[float, str]]:
    """`(part, what)` -> a figure that two runs may be compared by, and its kind."""
    figures: dict[tuple[str, ...], tuple[float, str]] = {}
    for of in found:
        if not of.is_measured or of.unquotable:
            continue
        for name in ("ratio", "bytes_per_token", "bytes_per_entry_over_values"):
            value = of.get(name)
            value = value.get("median") if isinstance(value, dict) else value
            if isinstance(value, (int, float)):
                figures[(of["case"], title(of["implementation"]), _words(name))] = (float(value), "ratio")
    return figures
