"""What do the records of the suite `scale` say? How cost grows: points, fitted slopes, and whether claims hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.results import Found, sources_of
from benchmarks.report.tables import NOTHING, Row, Table, markdown, number

CASES = {
    "rows": ("scored tokens", "linear_logps by N"),
    "hidden": ("hidden size", "linear_logps by D"),
    "vocabulary": ("vocabulary", "linear_logps by V"),
    "length": ("tokens of a sequence", "an optimiser step by length"),
    "shared_tokens": ("computed tokens", "an optimiser step by computed tokens"),
    "prompt_share": ("share of the prompt", "an optimiser step by the prompt's share"),
    "pairs": ("pairs", "an optimiser step by pairs"),
    "cache_rows": ("rows", "building the reference cache by rows"),
}
"""Case -> what x is, and what is measured."""
NAMES = {
    "engine_frozen": "frozen head",
    "engine_trainable": "trainable head",
    "engine_shared": "prompts shared",
    "engine_packed": "packed",
    "engine": "building",
    "engine_read": "reading",
}
"""Implementation -> what of the engine it is; other names stand as they are."""
Series = tuple[str, str]


def series(found: Sequence[Found]) -> dict[Series, tuple[list[Found], Found | None]]:
    """`(case, implementation)` -> its points in the order of x, and its fit."""
    groups: dict[Series, tuple[list[Found], list[Found]]] = {}
    for of in found:
        groups.setdefault((of["case"], of["implementation"]), ([], []))[of["kind"] == "fit"].append(of)
    cases, names = list(CASES), list(NAMES)

    def place(item: tuple[Series, Any]) -> tuple[Any, ...]:
        case, name = item[0]
        known = (cases.index(case) if case in cases else len(cases), names.index(name) if name in names else len(names))
        return (known[0], case, known[1], name)

    return {
        key: (sorted(points, key=lambda of: of.get("x") or 0), fits[-1] if fits else None)
        for key, (points, fits) in sorted(groups.items(), key=place)
    }


def value(of: Found) -> tuple[float, float, float, str] | None:
    """`(median, p20, p80, unit)` of a point; None where it was not measured."""
    if not of.is_measured:
        return None
    for unit in ("s", "ms"):
        if of.get(f"median_{unit}") is not None:
            middle = float(of[f"median_{unit}"])
            return middle, float(of.get(f"p20_{unit}", middle)), float(of.get(f"p80_{unit}", middle)), unit
    for name, unit in (("extra_mb", "MiB"), ("bytes", "bytes")):
        if of.get(name) is not None:
            middle = float(of[name])
            return middle, middle, middle, unit
    return None


def slope_words(fit: Found) -> str:
    """As `1.02 (0.98–1.06)`."""
    if not fit.is_measured or fit.get("slope") is None:
        return NOTHING
    if fit.get("slope_low") is None:
        return f"{fit['slope']:.2f}"
    return f"{fit['slope']:.2f} ({fit['slope_low']:.2f}–{fit['slope_high']:.2f})"


def holds_words(fit: Found) -> str:
    """Whether a claim holds, or why that cannot be told."""
    if not fit.get("claim"):
        return NOTHING
    if fit.unquotable:
        return f"cannot be told: {fit.unquotable}"
    return {True: "yes", False: "no"}.get(fit.get("holds"), "not measured")  # type: ignore[arg-type]


def tables(found: Sequence[Found]) -> list[Table]:
    """The fits in one table, then the points of each case. All of it is the engine's."""
    every = series(found)
    fits = [(key, fit) for key, (_, fit) in every.items() if fit is not None]
    made = []
    if fits:
        made.append(
            Table(
                title="slopes of log cost over log size, and what is claimed",
                header=("", "case", "range", "points", "slope", "claim", "holds"),
                rows=tuple(_fit_row(key, fit) for key, fit in fits),
                sources=sources_of([fit for _, fit in fits]),
            )
        )
    for case in dict.fromkeys(key[0] for key in every):
        of_case = [(key, points) for key, (points, _) in every.items() if key[0] == case and points]
        if of_case:
            rows = tuple(_point_row(key, of) for key, points in of_case for of in points)
            made.append(
                Table(
                    title=CASES.get(case, ("", case))[1],
                    header=("", CASES.get(case, ("x", ""))[0], "median", "p20–p80", "unit", "rounds", "remark"),
                    rows=rows,
                    sources=sources_of([of for _, points in of_case for of in points]),
                )
            )
    return made


def name_of(key: Series) -> str:
    return NAMES.get(key[1], key[1])


def range_words(fit: Found) -> str:
    """As `1,024–16,384`, of the sizes that the slope is taken over."""
    if fit.get("x_from") is None:
        return NOTHING
    over = fit.get("over", "x")
    low, high = sorted((fit["x_from"], fit["x_to"]))
    return f"{size_words(low)}–{size_words(high)}" + ("" if over == "x" else f", {over.replace('_', ' ')}")


def size_words(x: float) -> str:
    return f"{x:,.0f}" if float(x).is_integer() else f"{x:.3g}"


def claim_words(fit: Found) -> str:
    """What is claimed; in brackets what is only expected."""
    return str(fit.get("claim") or (f"({fit['says']})" if fit.get("says") else NOTHING))


def _fit_row(key: Series, fit: Found) -> Row:
    case, name = CASES.get(key[0], ("", key[0]))[1], name_of(key)
    if not fit.is_measured:
        return Row(cells=(f"{name}: {case}",), why=fit.status, ours=True)
    cells = (name, case, range_words(fit), _count(fit), slope_words(fit), claim_words(fit))
    return Row(cells=(*cells, holds_words(fit)), ours=True)


def _count(fit: Found) -> str:
    points = fit.get("points")
    return str(len(points)) if isinstance(points, (list, tuple)) else number(points, "d")


def _point_row(key: Series, of: Found) -> Row:
    found = value(of)
    if found is None:
        return Row(cells=(f"{name_of(key)}, {of.get('x')}",), why=of.status, ours=True)
    middle, low, high, unit = found
    said = "; ".join(
        ["not in the fit"] * (of.get("in_fit") is False)
        + ([f"not to be quoted: {of.unquotable}"] if of.unquotable else [])
    )
    cells = (name_of(key), size_words(of["x"]), f"{middle:.4g}", f"{low:.4g}–{high:.4g}", unit, str(of["rounds"]), said)
    return Row(cells=cells, ours=True)


# ---- for a page written by hand ----


def block(found: Sequence[Found]) -> tuple[str, Sequence[Found]]:
    """Markdown of the fits, and the records that it is from."""
    rows, used = [], []
    for key, (points, fit) in series(found).items():
        if fit is None:
            continue
        used += [*points, fit]
        case = CASES.get(key[0], ("", key[0]))[1]
        if not fit.is_measured:
            rows.append([case, name_of(key), NOTHING, fit.status, claim_words(fit), NOTHING])
            continue
        rows.append([case, name_of(key), range_words(fit), slope_words(fit), claim_words(fit), holds_words(fit)])
    header = ["cost", "", "range", "slope, log over log", "claim", "holds"]
    return markdown(header, rows), used


# ---- for a comparison of two runs ----


def ratios(found: Sequence[Found]) -> dict[tuple[str, ...], tuple[float, str]]:
    """`(case, implementation, what)` -> slopes that two runs may be compared by."""
    return {
        (CASES.get(key[0], ("", key[0]))[1], name_of(key), "slope"): (float(fit["slope"]), "slope")
        for key, (_, fit) in series(found).items()
        if fit is not None and fit.is_measured and not fit.unquotable and fit.get("slope") is not None
    }
