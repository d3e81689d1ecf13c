"""What do the records of the suite `cache` say? What the reference cache costs, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.names import is_ours, title
from benchmarks.report.results import COMMON as IN_EVERY_LINE
from benchmarks.report.results import EVERY_RECORD, Found, sources_of
from benchmarks.report.tables import NOTHING, Row, Table, counted, markdown, once, spread

CASES = {
    "store": "made-up log-probs, written and read back",
    "build": "filling an empty cache beside the bare forward pass of the same forests",
    "sweep": "until the reference of all pairs is at hand, one beta after another on one cache",
}
TIMED = {"store": "seconds to read", "build": "seconds to fill", "sweep": "seconds"}
"""What the time of a case is of."""
WORDS = {
    "store_rows": "rows",
    "over_bare": "× the bare forward pass",
    "rows_per_s_written": "rows/s written",
    "rows_per_s_read": "rows/s read",
    "bytes_per_token": "bytes a token",
    "bytes_per_entry_over_values": "bytes an entry beside its values",
    "weights_read_s": "seconds to read the weights",
    "start_of_a_run_s": "seconds to start a run",
    "reused": "rows found",
    "computed": "rows computed",
}
RATIOS = ("over_bare",)
_LEFT_OUT = {*IN_EVERY_LINE, *EVERY_RECORD, "model", "data", "note"}


def tables(found: Sequence[Found]) -> list[Table]:
    """A table for each case; its columns are all figures that its records have."""
    made = []
    for case, every in by_case(found).items():
        shown = [figures(of) for of in every]
        columns = once([name for its in shown for name in its])
        first = every[0]
        data = ", ".join(str(first.get(name)) for name in ("data", "model", "dtype") if first.get(name))
        rows = [
            Row(
                cells=(title(of["implementation"]), *(its.get(name, NOTHING) for name in columns), _remark(of)),
                ours=True,
            )
            if of.is_measured
            else Row(cells=(title(of["implementation"]),), why=of.status, ours=is_ours(of["implementation"]))
            for of, its in zip(every, shown, strict=True)
        ]
        made.append(
            Table(
                title=f"{case}: {CASES.get(case, '')} ({data}, {counted(first['threads'], 'thread')})",
                header=("", *columns, "remark"),
                rows=tuple(rows),
                notes=once([str(of["note"]) for of in every if of.get("note")]),
                sources=sources_of(every),
            )
        )
    return made


def by_case(found: Sequence[Found]) -> dict[str, list[Found]]:
    cases: dict[str, list[Found]] = {name: [] for name in CASES}
    for of in found:
        cases.setdefault(of["case"], []).append(of)
    return {name: every for name, every in cases.items() if every}


def figures(of: Found) -> dict[str, str]:
    """What a figure is -> the figure, of all that a record has; times as median, p20 and p80 in one."""
    if not of.is_measured:
        return {}
    made: dict[str, str] = {}
    for name, value in of.records[0].items():
        if name in _LEFT_OUT or name.endswith(("p20_ms", "p80_ms")):
            continue
        if name.endswith("median_ms"):
            its = {part: of[name.replace("median", part)] / 1e3 for part in ("median", "p20", "p80")}
            what = name.removesuffix("median_ms").strip("_")
            made[f"seconds, {what}" if what else TIMED.get(of["case"], "seconds")] = spread(its, ".3g")
        elif of.unquotable and name in RATIOS:
            made[_words(name)] = "not quoted"
        else:
            made[_words(name)] = _shown(value)
    return made


def _words(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return spread(value, ".3g")
    if value is None or isinstance(value, (str, bool)):
        return NOTHING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _remark(of: Found) -> str:
    return f"no ratio: {of.unquotable}" if of.unquotable else ""


# ---- for a page written by hand ----


def block(found: Sequence[Found]) -> tuple[str, Sequence[Found]]:
    """Markdown: a case's figures one below the other, and the records that it is from."""
    rows, notes = [], []
    for case, every in by_case(found).items():
        for of in every:
            name = case if of.get("beta") is None else f"{case}, beta {of['beta']}"
            if not of.is_measured:
                rows.append([name, "", of.status])
            for what, figure in figures(of).items():
                if what != "beta":
                    rows.append([name, what, figure])
                    name = ""
            if of.unquotable:
                notes.append(f"{case}: no ratio: {of.unquotable}.")
    return "\n".join([markdown(["reference cache", "", "measured"], rows), "", *once(notes)]).rstrip("\n"), found


# ---- for a comparison of two runs ----


def ratios(found: Sequence[Found]) -> dict[tuple[str, ...], tuple[float, str]]:
    """`(case, what)` -> a figure that two runs may be compared by, and its kind."""
    made: dict[tuple[str, ...], tuple[float, str]] = {}
    for of in found:
        if not of.is_measured or of.unquotable:
            continue
        for name in (*RATIOS, "bytes_per_token", "bytes_per_entry_over_values"):
            value = of.get(name)
            value = value.get("median") if isinstance(value, dict) else value
            if isinstance(value, (int, float)):
                made[(of["case"], title(of["implementation"]), _words(name))] = (float(value), "ratio")
    return made
