"""How does cost grow?

    python -m benchmarks.scale                                  every case; `cache_rows` alone takes minutes
    python -m benchmarks.scale --cases rows vocabulary --rounds 3
    python -m benchmarks.scale --smoke                          does it run? Seconds, and no slope that means anything

Cases are a table (`cases.py`): what is varied, over which values, what is held, what is claimed. All sizes of a case take turns
within a round; the slope is that of log time over log size (`fit.py` says what bends it). A record for each size ("point") and
one for each slope ("fit"); where something is claimed, the fit's record says whether it holds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.harness import Timing, add_suite_options, describe_machine, rounds_of, save, table
from benchmarks.scale.cases import CASES, Case
from benchmarks.scale.fit import fit
from benchmarks.scale.series import Point, Series
from benchmarks.smoke import WHY

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    import torch

    torch.set_num_threads(args.threads)
    machine = describe_machine()
    records: list[Record] = []
    try:
        for name in args.cases:
            print(f"{name}: {CASES[name].varies}", file=sys.stderr, flush=True)
            records += measure(CASES[name], rounds_of(args), args.threads, smoke=args.smoke)
    finally:  # what was measured before somebody lost patience is kept
        if records:
            print(show(records))
        save("scale", records, args, machine)
    return 0


def measure(case: Case, rounds: int, threads: int, *, smoke: bool) -> list[Record]:
    """The points of a case and a fit for each implementation."""
    values = case.smoke_values if smoke else case.values
    fixed = {**case.fixed, **(case.smoke_fixed if smoke else {})}
    rounds = min(rounds, case.most_rounds or rounds)
    module = importlib.import_module(f"benchmarks.scale.{case.module}")
    found = module.measure(case.name, values, fixed, rounds, 0.0 if smoke else case.fitted_from)
    common = {"case": case.name, "dtype": "float32", "threads": threads, "rounds": rounds}
    records = []
    for series in found:
        records += [point_record(common, series, point) for point in series.points]
        if series.fit_over is not None:
            records.append(fit_record(common, case, series))
    if smoke:
        records = [{**record, "unquotable": record["unquotable"] or WHY} for record in records]
    return records


def point_record(common: Record, series: Series, point: Point) -> Record:
    seen = {name: value for name, value in point.seen.items() if not isinstance(value, Timing)}
    return {
        **common,
        "implementation": series.implementation,
        "status": "measured",
        "kind": "point",
        "x": point.x,
        "median_s": point.timing.median,
        "p20_s": point.timing.p20,
        "p80_s": point.timing.p80,
        "in_fit": point.in_fit,
        "unquotable": point.wrong or series.disturbed or point.timing.why,
        **seen,
    }


def fit_record(common: Record, case: Case, series: Series) -> Record:
    """The slope of a series, and whether the case's claim holds of it."""
    points = [point for point in series.points if point.in_fit]
    over = series.fit_over or "x"
    sizes = [point.x if over == "x" else point.seen[over] for point in points]
    timings = [point.timing if series.fit_of is None else point.seen[series.fit_of] for point in points]
    fitted = fit(sizes, timings)
    record: Record = {
        **common,
        "implementation": series.implementation,
        "status": "measured",
        "kind": "fit",
        "over": over,
        "x_from": sizes[0],
        "x_to": sizes[-1],
        **asdict(fitted),
    }
    failed = next((point.wrong for point in points if point.wrong), None)
    claim = case.claim if case.claimed_of is None or series.implementation in case.claimed_of else None
    if claim is None:
        return record | {"says": case.says or None, "unquotable": failed or series.disturbed}
    return record | {
        "claim": claim.text,
        "holds": failed is None and claim.holds(sizes, timings),
        "claimed": claim.figure(sizes, [timing.median for timing in timings]),
        "unquotable": failed or series.disturbed or claim.untold(sizes, timings),
    }


def show(records: Sequence[Record]) -> str:
    """The points, then a line for each fit."""
    points = [
        (
            record["case"],
            record["implementation"],
            _size(record["x"]) + ("" if record["in_fit"] else " (not in fit)"),
            f"{record['median_s']:.4f}",
            f"{record['p20_s']:.4f}-{record['p80_s']:.4f}",
            record["unquotable"] or "",
        )
        for record in records
        if record["kind"] == "point"
    ]
    fits = [
        (
            record["case"],
            record["implementation"],
            f"{_size(record['x_from'])}-{_size(record['x_to'])}"
            + ("" if record["over"] == "x" else f" {record['over']}"),
            f"{record['slope']:.3f} ({record['slope_low']:.3f}-{record['slope_high']:.3f})",
            f"{record['slope_last']:.3f}",
            record.get("claim") or record.get("says") or "",
            "" if "claim" not in record else "yes" if record["holds"] else "NO",
            record["unquotable"] or "",
        )
        for record in records
        if record["kind"] == "fit"
    ]
    return "\n\n".join(
        [
            table(("case", "implementation", "x", "median s", "p20-p80", "not to be quoted"), points),
            table(("case", "implementation", "range", "slope", "last", "claim", "holds", "not to be quoted"), fits),
        ]
    )


def _size(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and value else f"{value:.2f}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    add_suite_options(made, rounds=5)
    return made


if __name__ == "__main__":
    sys.exit(main())
