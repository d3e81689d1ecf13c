"""What do the records of the suite `memory` say? The operator by vocabulary, and a whole step by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.names import is_ours, order, row_order, row_title, title
from benchmarks.report.results import Found, sources_of
from benchmarks.report.tables import Row, Table, markdown, mebibytes, once

VOCABULARY, STEP = "vocabulary", "step"
SETTINGS = ("rows", "hidden", "dtype", "threads")
PARTS = ("weights", "adapters", "forward", "backward", "optimizer")
Key = tuple[Any, ...]


def tables(found: Sequence[Found]) -> list[Table]:
    """By vocabulary, a table for each shape; and one of steps."""
    made = []
    for key, by_name in by_vocabulary(found).items():
        every = [of for of_name in by_name.values() for of in of_name.values()]
        sizes = vocabularies(by_name)
        made.append(
            Table(
                title=f"extra MiB of a frozen head's forward and backward pass by vocabulary: {settings_words(key)}",
                header=("", *(f"V={size:,}" for size in sizes), "remark"),
                rows=tuple(_vocabulary_row(name, of_name, sizes) for name, of_name in by_name.items()),
                sources=sources_of(every),
            )
        )
    steps = steps_of(found)
    if steps:
        parts = parts_of(steps)
        made.append(
            Table(
                title="one optimiser step by part, MiB",
                header=("", *parts, "peak resident", "remark"),
                rows=tuple(row for of in steps for row in _step_rows(of, parts)),
                notes=once([f"{row_title(of['implementation'])}: {of['note']}" for of in steps if of.get("note")]),
                sources=sources_of(steps),
            )
        )
    return made


def by_vocabulary(found: Sequence[Found]) -> dict[Key, dict[str, dict[int, Found]]]:
    """Shape -> implementation -> vocabulary -> what was found."""
    shapes: dict[Key, dict[str, dict[int, Found]]] = {}
    of_case = [of for of in found if of["case"] == VOCABULARY]
    for of in sorted(of_case, key=lambda of: (order(of["implementation"]), of["vocabulary"])):
        key = tuple(of.get(name) for name in SETTINGS)
        shapes.setdefault(key, {}).setdefault(of["implementation"], {})[of["vocabulary"]] = of
    return shapes


def vocabularies(by_name: Mapping[str, Mapping[int, Found]]) -> list[int]:
    return sorted({size for of_name in by_name.values() for size in of_name})


def settings_words(key: Key) -> str:
    rows, hidden, dtype, threads = key
    return f"N={rows}, D={hidden}, {dtype}, {threads} threads"


def extra(of: Found) -> float | None:
    """MiB beyond inputs and results."""
    value = of.get("extra_mb") if of.is_measured else None
    return float(value) if isinstance(value, (int, float)) else None


def steps_of(found: Sequence[Found]) -> list[Found]:
    return sorted((of for of in found if of["case"] == STEP), key=lambda of: row_order(of["implementation"]))


def parts_of(steps: Sequence[Found]) -> list[str]:
    """Parts of a step, in the order in which they come."""
    there = once([part for of in steps for part in of.get("parts") or {}])
    return [*(part for part in PARTS if part in there), *(part for part in there if part not in PARTS)]


def _vocabulary_row(name: str, of_name: Mapping[int, Found], sizes: Sequence[int]) -> Row:
    reasons = once([of.status for of in of_name.values() if not of.is_measured])
    if len(reasons) == 1 and not any(of.is_measured for of in of_name.values()):
        return Row(cells=(title(name),), why=reasons[0], ours=is_ours(name))
    cells = []
    for size in sizes:
        of = of_name.get(size)
        cells.append(
            "not measured" if of is None else mebibytes(extra(of)) if of.is_measured else of.status.partition(":")[0]
        )
    said = [*reasons, *(f"no ratio: {of.unquotable}" for of in of_name.values() if of.unquotable)]
    return Row(cells=(title(name), *cells, "; ".join(once(said))), ours=is_ours(name))


def _step_rows(of: Found, parts: Sequence[str]) -> list[Row]:
    name = of["implementation"]
    words = row_title(name)
    if not of.is_measured:
        return [Row(cells=(words,), why=of.status, ours=is_ours(name))]
    its = of.get("parts") or {}
    cells = (words, *(_part(its.get(part)) for part in parts), mebibytes(of.get("peak_rss_mb")))
    rows = [Row(cells=(*cells, f"no ratio: {of.unquotable}" if of.unquotable else ""), ours=is_ours(name))]
    planned = of.get("planned")
    if isinstance(planned, dict):
        cells = (
            f"{words}: planned",
            *(_part(planned.get(part)) for part in parts),
            _part(planned.get("total")),
            "",
        )
        rows.append(Row(cells=cells, ours=is_ours(name)))
    return rows


def _part(value: Any) -> str:
    """A part's MiB; where both are given, its peak and what stays after it."""
    if isinstance(value, dict):
        peak, stays = (value.get(name, value.get(f"{name}_mb")) for name in ("peak", "stays"))
        return f"{mebibytes(peak)}, {mebibytes(stays)} stay" if stays is not None else mebibytes(peak)
    return mebibytes(value)


# ---- for a page written by hand ----


def block(found: Sequence[Found]) -> tuple[str, Sequence[Found]]:
    """Markdown of both cases, and the records that it is from."""
    lines = []
    for table in tables(found):
        header = [table.title, *table.header[1:-1]]
        rows = [
            [row.cells[0], *(["n/a" if row.why.startswith("n/a") else row.why.partition(":")[0]] * (len(header) - 1))]
            if row.why
            else list(row.cells[:-1])
            for row in table.rows
        ]
        lines += [markdown(header, rows), ""]
        said = [(row.cells[0], row.why or row.cells[-1]) for row in table.rows]
        lines += [f"{name}: {why}." for name, why in said if why]
        lines += [""] if lines[-1] else []
    return "\n".join(lines).rstrip("\n"), found


# ---- for a comparison of two runs ----


def ratios(found: Sequence[Found]) -> dict[tuple[str, ...], tuple[float, str]]:
    """`(what, implementation, ...)` -> MiB that two runs may be compared by."""
    figures = {}
    for of in found:
        if of.unquotable:
            continue
        name = (title if of["case"] == VOCABULARY else row_title)(of["implementation"])
        if of["case"] == VOCABULARY and extra(of) is not None:
            words = settings_words(tuple(of.get(key) for key in SETTINGS))
            figures[("by vocabulary", name, f"{words}, V={of['vocabulary']}", "extra MiB")] = (extra(of) or 0.0, "MiB")
        if of["case"] == STEP and of.is_measured and of.get("peak_rss_mb") is not None:
            figures[("a step", name, "peak MiB")] = (float(of["peak_rss_mb"]), "MiB")
    return figures
