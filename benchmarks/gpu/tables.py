"""What does a person read of `train.py`? A table for each data set, and whether the targets were met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import table
from benchmarks.steps.tables import disagreements

Record = Mapping[str, Any]
TIMES_BEST, TIMES_DEFAULT = 2.0, 3.0  # what the engine is to reach, in TRL's pairs/s


def show(records: Sequence[Record]) -> str:
    """A table for each kind of weights and lengths."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["weights"], record["lengths"]), []).append(record)
    return "\n\n".join(_group(group) for group in groups.values())


def _group(records: Sequence[Record]) -> str:
    first = records[0]
    title = (
        f"{first['weights']}, lengths of {first['lengths']}: {first['pairs']} pairs in steps of {first['pairs_per_step']} "
        f"(the first not timed), max_length {first['max_length']}, {first['dtype']}"
    )
    title += " (a trial on two small layers: says nothing about a card)" if first["tiny"] else ""
    wrong = disagreements(records)
    if wrong:
        return "\n".join([title, "no figures, for the rows do not agree:", *wrong])
    measured = [record for record in records if record["status"] == "measured"]
    header = ["", "pairs/s", "tokens/s", "of measured peak", "of published", "peak GiB", "reference s"]
    rows = [
        (
            record["implementation"],
            f"{record['pairs_per_s']:.2f}",
            f"{record['computed_tokens_per_s']:.0f}",
            f"{record['utilisation_of_measured']:.1%}",
            f"{record['utilisation_of_published']:.1%}" if record["utilisation_of_published"] else "-",
            f"{record['peak_mb'] / 1024:.1f}",
            f"{record['reference_s']:.1f}",
        )
        for record in measured
    ]
    lines = [title, *([table(header, rows)] if rows else [])]
    lines += [
        f"{record['implementation'] or 'all rows'}: {record['status']}" for record in records if record not in measured
    ]
    return "\n".join([*lines, *targets(measured)])


def targets(measured: Sequence[Record]) -> list[str]:
    """One line for each target of which both sides were measured."""
    by_row = {record["implementation"]: record for record in measured}
    ours = max((r for r in measured if r["side"] == "engine"), key=lambda r: r["pairs_per_s"], default=None)
    peer = max((r for r in measured if r["side"] == "trl"), key=lambda r: r["pairs_per_s"], default=None)
    default = by_row.get("trl_default")
    if ours is None or peer is None:
        return []

    def line(what: str, met: bool, found: str) -> str:
        return f"target {what}: {'met' if met else 'missed'} ({found})"

    best = ours["pairs_per_s"] / peer["pairs_per_s"]
    lines = [
        line(
            f"{TIMES_BEST:g} x TRL's best",
            best >= TIMES_BEST,
            f"{ours['implementation']} {best:.2f} x {peer['implementation']}",
        )
    ]
    if default is not None:
        times = ours["pairs_per_s"] / default["pairs_per_s"]
        lines.append(line(f"{TIMES_DEFAULT:g} x TRL's default", times >= TIMES_DEFAULT, f"{times:.2f} x"))
    share = ours["peak_mb"] / peer["peak_mb"]
    lines.append(line("lower peak memory than TRL's best", share < 1, f"{share:.2f} of it"))
    return lines
