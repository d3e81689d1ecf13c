"""What do the records of the suite `memory` say? The operator by vocabulary, and a whole step by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.names import is_ours, order, row_title, title
from benchmarks.report.results import Found, sources_of
from benchmarks.report.tables import NOTHING, Row, Table, counted, markdown, mebibytes, once, quantiles, trimmed

VOCABULARY, GROWTH, STEP = "vocabulary", "independent_of_vocabulary", "step"
SETTINGS = ("rows", "hidden", "dtype", "threads")
JOB = ("model", "data", "batch", "max_length", "dtype", "threads")
STEPS = {
    "engine_naive": "engine, padded, logits built",
    "engine_operator": "engine, padded, no logits",
    "engine_packed": "engine, packed",
    "engine_shared": "engine, packed, prompts shared",
}
"""What the engine's rows of a step are called; others have the names of the suite `steps`."""
PARTS = ("weights", "adapters", "forward", "backward", "optimizer")
Key = tuple[Any, ...]


def tables(found: Sequence[Found]) -> list[Table]:
    """By vocabulary, a table for each shape, and whether it matters; then one for each model and data that steps were taken of."""
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
    growths = [of for of in found if of["case"] == GROWTH and of.is_measured]
    if growths:
        made.append(
            Table(
                title="whether that depends on the vocabulary",
                header=("", "MiB", "vocabulary", "independent", "claim", "holds", "remark"),
                rows=tuple(map(_growth_row, sorted(growths, key=lambda of: order(of["implementation"])))),
                sources=sources_of(growths),
            )
        )
    return made + [_step_table(key, of_key) for key, of_key in by_job(found).items()]


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
    return f"N={rows}, D={hidden}, {dtype}, {counted(threads, 'thread')}"


def extra(of: Found) -> float | None:
    """MiB beyond inputs and results."""
    value = of.get("extra_mb") if of.is_measured else None
    return float(value) if isinstance(value, (int, float)) else None


def by_job(found: Sequence[Found]) -> dict[Key, list[Found]]:
    """Model, data and settings of a step -> its rows, in order."""
    jobs: dict[Key, list[Found]] = {}
    for of in sorted((of for of in found if of["case"] == STEP), key=lambda of: _place(of["implementation"])):
        jobs.setdefault(tuple(of.get(name) for name in JOB), []).append(of)
    return jobs


def step_title(implementation: str) -> str:
    return STEPS.get(implementation, row_title(implementation))


def _place(implementation: str) -> tuple[int, str]:
    names = list(STEPS)
    return (names.index(implementation) if implementation in STEPS else len(names), step_title(implementation))


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


def _growth_row(of: Found) -> Row:
    name = of["implementation"]
    claim = of.get("claim")
    cells = (
        title(name),
        f"{mebibytes(of['smallest_mb'])}–{mebibytes(of['largest_mb'])}",
        f"{of['vocabulary_from']:,}–{of['vocabulary_to']:,}",
        "yes" if of["independent"] else "no",
        claim or NOTHING,
        NOTHING if not claim else "yes" if of["holds"] else "no",
        _remark(of),
    )
    return Row(cells=cells, ours=is_ours(name))


def _step_table(key: Key, steps: Sequence[Found]) -> Table:
    model, data, batch, max_length, dtype, threads = key
    parts = parts_of(steps)
    words = [str(word) for word in (model, data) if word]
    words += (
        [f"{batch} pairs"] * bool(batch)
        + [f"max_length {max_length}"] * bool(max_length)
        + [dtype, counted(threads, "thread")]
    )
    plans = [
        f"no plan for {step_title(of['implementation'])}: {plan}"
        for of in steps
        if isinstance(plan := of.get("planned"), str)
    ]
    return Table(
        title=f"one optimiser step by part, peak MiB: {', '.join(words)}",
        header=("", *parts, "peak of the process", "remark"),
        rows=tuple(row for of in steps for row in _step_rows(of, parts)),
        notes=once([*(f"{step_title(of['implementation'])}: {of['note']}" for of in steps if of.get("note")), *plans]),
        sources=sources_of(steps),
    )


def _step_rows(of: Found, parts: Sequence[str]) -> list[Row]:
    """A row's medians over the rounds: peaks within each part, what stays after it, and what was planned."""
    name = of["implementation"]
    words, ours = step_title(name), is_ours(name)
    if not of.is_measured:
        return [Row(cells=(words,), why=of.status, ours=ours)]
    peaks = (*(_middle(of, "parts", part) for part in parts), mebibytes(peak(of)), _remark(of))
    rows = [Row(cells=(words, *peaks), ours=ours)]
    if of.get("stays"):
        rows.append(
            Row(cells=("… what stays", *(_middle(of, "stays", part) for part in parts), NOTHING, ""), ours=ours)
        )
    plan = of.get("planned")
    if isinstance(plan, dict):
        # The plan has forward and backward in one, which is at its fullest in the backward pass.
        its = {**plan, "backward": plan.get("backward", plan.get("step"))}
        rows.append(Row(cells=("… planned", *(mebibytes(its.get(part)) for part in parts), NOTHING, ""), ours=ours))
    return rows


def _middle(of: Found, what: str, part: str) -> str:
    values = [record[what][part] for record in of.records if (record.get(what) or {}).get(part) is not None]
    return mebibytes(quantiles(values)["median"] if values else None)


def peak(of: Found) -> float | None:
    """MiB of the whole process."""
    values = [record["peak_rss_mb"] for record in of.records if record.get("peak_rss_mb") is not None]
    return quantiles(values)["median"] if values else None


def _remark(of: Found) -> str:
    return f"no ratio: {of.unquotable}" if of.unquotable else ""


# ---- for a page written by hand ----


def block(found: Sequence[Found]) -> tuple[str, Sequence[Found]]:
    """Markdown of both cases, and the records that it is from."""
    lines = []
    for table in map(trimmed, tables(found)):
        has_remark = table.header[-1] == "remark"
        header = [table.title, *table.header[1 : len(table.header) - has_remark]]
        rows = [
            [row.cells[0], *(["n/a" if row.why.startswith("n/a") else row.why.partition(":")[0]] * (len(header) - 1))]
            if row.why
            else list(row.cells[: len(header)])
            for row in table.rows
        ]
        lines += [markdown(header, rows), ""]
        said = [(row.cells[0], row.why or (row.cells[-1] if has_remark else "")) for row in table.rows]
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
        name = (title if of["case"] == VOCABULARY else step_title)(of["implementation"])
        if of["case"] == VOCABULARY and extra(of) is not None:
            words = settings_words(tuple(of.get(key) for key in SETTINGS))
            figures[("by vocabulary", name, f"{words}, V={of['vocabulary']}", "extra MiB")] = (extra(of) or 0.0, "MiB")
        if of["case"] == STEP and of.is_measured and peak(of) is not None:
            figures[("a step", name, "peak MiB")] = (peak(of) or 0.0, "MiB")
    return figures
