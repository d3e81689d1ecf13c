"""What do the records of the suite `ops` say? The operator beside bare matrix products: time, error, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.names import is_ours, order, title
from benchmarks.report.results import Found, sources_of
from benchmarks.report.tables import NOTHING, Row, Table, counted, markdown, mebibytes, number, once, short, spread

CASES = {
    "no_gradient": "no gradient",
    "frozen": "frozen head",
    "trainable": "trainable head",
    "preference_loss": "preference loss",
}
FLOORS = ("floor", "float32 floor")
SHAPE = ("rows", "hidden", "vocabulary", "dtype", "device", "threads")


def tables(found: Sequence[Found]) -> list[Table]:
    """A table for each shape and case."""
    return [_table(case, of) for shape in shapes(found) for case, of in by_case(found, shape).items() if any(of)]


def shapes(found: Sequence[Found]) -> list[tuple[Any, ...]]:
    """Shapes that were asked for, each once: float32 first, and of one dtype the smallest head with the most rows."""
    every = {tuple(of[name] for name in SHAPE) for of in found}
    return sorted(every, key=lambda shape: (shape[4], shape[3] != "float32", shape[1] * shape[2], -shape[0], shape[5]))


def by_case(found: Sequence[Found], shape: tuple[Any, ...]) -> dict[str, list[Found]]:
    """Case -> what there is of it at a shape, floors first."""
    cases: dict[str, list[Found]] = {name: [] for name in CASES}
    for of in found:
        if tuple(of[name] for name in SHAPE) == shape:
            cases.setdefault(of["case"], []).append(of)
    return {name: sorted(of, key=lambda one: order(one["implementation"])) for name, of in cases.items() if of}


def shape_words(shape: tuple[Any, ...]) -> str:
    rows, hidden, vocabulary, dtype, device, threads = shape
    return f"N={rows}, D={hidden}, V={vocabulary}, {dtype}, {device}, {counted(threads, 'thread')}"


def over_floor(of: Found) -> tuple[Mapping[str, float] | None, str]:
    """Its time as a multiple of the floor's, and of which floor: that of its dtype, or where this has none, of float32."""
    for key, floor in (("over_floor", "floor"), ("over_float32_floor", "float32 floor")):
        if of.get(key):
            return of[key], floor
    return None, "floor"


def products(found: Sequence[Found]) -> str:
    """How many matrix products the floor of a case is, as words."""
    count = next((of.get("floor_gemms") for of in found if of.get("floor_gemms")), None)
    return "" if count is None else f"{count} product{'s' if count > 1 else ''}"


def _table(case: str, found: Sequence[Found]) -> Table:
    shape = tuple(found[0][name] for name in SHAPE)
    header = ("", "median ms", "p20–p80", "× floor", "log-prob error", "of bound", "loss error", "d_hidden", "d_weight")
    header += ("extra MiB", "remark")
    rows = [_row(of) for of in found if not of.status.startswith("n/a")]
    absent: dict[str, list[str]] = {}
    for of in found:
        if of.status.startswith("n/a"):
            absent.setdefault(of.status, []).append(title(of["implementation"]))
    rows += [Row(cells=("; ".join(names),), why=why) for why, names in absent.items()]
    notes = [f"{title(of['implementation'])}: {of['note']}" for of in found if of.get("note") and of.is_measured]
    if any(of.is_measured and over_floor(of)[1] != "floor" and over_floor(of)[0] for of in found):
        notes.append(
            "Here bfloat16 is emulated: where its floor was not measured, ratios are to the same products in float32."
        )
    floor = products(found)
    return Table(
        title=f"{CASES.get(case, case)}: {shape_words(shape)}" + (f"; floor: {floor}" if floor else ""),
        header=header,
        rows=tuple(rows),
        notes=once(notes),
        sources=sources_of(found),
    )


def _row(of: Found) -> Row:
    name = of["implementation"]
    if not of.is_measured:
        return Row(cells=(title(name),), why=of.status, ours=is_ours(name))
    errors, memory = of.get("errors") or {}, of.get("memory") or {}
    ratio = NOTHING if name in FLOORS or of.unquotable or of.wrong else spread(over_floor(of)[0], ".2f")
    cells = (
        title(name),
        number(of["median_ms"], ",.1f"),
        f"{of['p20_ms']:,.1f}–{of['p80_ms']:,.1f}",
        ratio,
        number(errors.get("logp_max"), ".1e"),
        number(errors.get("logp_over_bound"), ".2g"),
        number(errors.get("loss"), ".1e"),
        number(errors.get("d_hidden"), ".1e"),
        number(errors.get("d_weight"), ".1e"),
        mebibytes(memory.get("extra_mb", memory.get("status"))),
        remark(of),
    )
    return Row(cells=cells, ours=is_ours(name), wrong=of.wrong is not None)


def remark(of: Found) -> str:
    """What is to be known before a time is believed."""
    said, errors = [], of.get("errors") or {}
    if of.wrong:
        said.append(f"wrong, whatever its time: {of.wrong}")
    elif errors.get("far"):
        said.append(
            f"far from float64: {number(errors.get('logp_over_bound'), '.3g')} times the bound of the numeric standard"
        )
    if of.unquotable and of.unquotable != of.wrong:
        said.append(f"no ratio: {of.unquotable}")
    return "; ".join(said)


# ---- for a page written by hand ----


def block(found: Sequence[Found]) -> tuple[str, Sequence[Found]]:
    """Markdown of the first shape, cases beside each other, and the records that it is from."""
    shape = shapes(found)[0]
    cases = by_case(found, shape)
    used = [of for every in cases.values() for of in every]
    names = sorted({of["implementation"] for of in used} - set(FLOORS), key=order)
    by_name = {
        name: {case: of for case, every in cases.items() for of in every if of["implementation"] == name}
        for name in names
    }
    there = [name for name in names if any(of.is_measured for of in by_name[name].values())]
    header = [f"× the bare matrix products, {shape_words(shape)}"]
    header += [f"{CASES.get(case, case)}{_of(products(every))}" for case, every in cases.items()]
    header += ["largest log-prob error (nats)", "MiB beyond results"]
    rows = [
        [title(name), *(_cell(by_name[name].get(case)) for case in cases), _error(by_name[name]), _extra(by_name[name])]
        for name in there
    ]
    lines = [markdown(header, rows), ""]
    marked = [
        f"{title(of['implementation'])}, {CASES.get(of['case'], of['case'])}: {remark(of)}"
        for of in used
        if of.is_measured and remark(of)
    ]
    reasons: dict[str, list[str]] = {}
    for name in names:
        if name not in there:
            reasons.setdefault(next(iter(by_name[name].values())).status, []).append(title(name))
    absent = [f"{'; '.join(every)} ({short(why, 80)})" for why, every in reasons.items()]
    lines += [f"{line}." for line in marked]
    lines += [f"Not in the table: {', '.join(absent)}."] if absent else []
    return "\n".join(lines).rstrip("\n"), used


def _of(words: str) -> str:
    return f" (of {words})" if words else ""


def _cell(of: Found | None) -> str:
    if of is None:
        return "not measured"
    if not of.is_measured:
        return of.status.partition(":")[0]
    if of.wrong:
        return "wrong"
    if of.unquotable:
        return "not quoted"
    ratio = over_floor(of)[0]
    return number(ratio["median"], ".2f") if ratio else NOTHING


def _error(cases: Mapping[str, Found]) -> str:
    errors = [(of.get("errors") or {}).get("logp_max") for of in cases.values() if of.is_measured]
    words = [error for error in errors if isinstance(error, str)]  # not finite
    numbers = [error for error in errors if isinstance(error, (int, float))]
    return words[0] if words else number(max(numbers), ".1e") if numbers else NOTHING


def _extra(cases: Mapping[str, Found]) -> str:
    found = [(of.get("memory") or {}).get("extra_mb") for of in cases.values() if of.is_measured]
    numbers = [value for value in found if isinstance(value, (int, float))]
    if not numbers:
        return "not measured"
    low, high = mebibytes(min(numbers)), mebibytes(max(numbers))
    return low if low == high else f"{low}–{high}"


# ---- for a comparison of two runs ----


def ratios(found: Sequence[Found]) -> dict[tuple[str, ...], tuple[float, str]]:
    """`(case, implementation, shape, what)` -> a figure that two runs may be compared by, and its kind."""
    figures = {}
    for of in found:
        name = (
            CASES.get(of["case"], of["case"]),
            title(of["implementation"]),
            shape_words(tuple(of[n] for n in SHAPE)),
        )
        if not of.is_measured or of["implementation"] in FLOORS:
            continue
        ratio, floor = over_floor(of)
        if ratio and not of.unquotable and not of.wrong:
            figures[(*name, f"× {floor}")] = (ratio["median"], "ratio")
        extra = (of.get("memory") or {}).get("extra_mb")
        if isinstance(extra, (int, float)):
            figures[(*name, "extra MiB")] = (extra, "MiB")
    return figures
