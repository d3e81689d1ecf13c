"""May the figures of several trainers stand side by side, and what do they come to? Agreement, ratios and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import Timing, quantile, table
from benchmarks.steps.rows import BASE

Record = Mapping[str, Any]
START = math.log(2)  # DPO's loss where policy and reference are one
# Of a sum of log-probs, relative; rounding of the model's own products in the dtype.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
LOSS_TOLERANCES = {"float32": 5e-4, "bfloat16": 1e-2, "float16": 5e-3}


def disagreements(records: Sequence[Record]) -> list[str]:
    """What keeps the measured records of one data set from being compared: one line each, none if all is well.

    Every row must start at ln 2, and with the same mean log-probs of the first step's completions. The first row is the
    measure of the others.
    """
    measured = [record for record in records if record["status"] == "measured"]
    lines = []
    for record in measured:
        first, tolerance = measured[0], TOLERANCES[record["dtype"]]
        if not abs(record["first_loss"] - START) <= LOSS_TOLERANCES[record["dtype"]]:
            lines.append(
                f"{record['implementation']} starts at loss {record['first_loss']:.5f}; expected ln 2 = {START:.5f}"
            )
        for key in ("first_chosen", "first_rejected"):
            if not abs(record[key] - first[key]) <= tolerance * max(1.0, abs(first[key])):
                lines.append(
                    f"{record['implementation']} has mean log-prob {key.removeprefix('first_')} {record[key]:.4f} "
                    "in the first step, "
                    f"{first['implementation']} has {first[key]:.4f}"
                )
        if record["trainable_parameters"] != first["trainable_parameters"]:
            lines.append(
                f"{record['implementation']} trains {record['trainable_parameters']} parameters, "
                f"{first['implementation']} {first['trainable_parameters']}"
            )
    return list(dict.fromkeys(lines))


def medians(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Row -> medians over its rounds, of the rows that were measured in every round."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["implementation"], []).append(record)
    keys = ("pairs_per_s", "peak_rss_mb", "reference_s")
    return {
        name: {key: quantile([record[key] or 0.0 for record in found], 0.5) for key in keys}
        for name, found in rows.items()
        if all(record["status"] == "measured" and record["pairs_per_s"] for record in found)
    }


def best(middle: Mapping[str, Mapping[str, float]]) -> str | None:
    """The fastest of TRL's own ways whose reference is known beforehand, or None where none was measured."""
    return max((name for name in BASE if name in middle), key=lambda name: middle[name]["pairs_per_s"], default=None)


def times_best(records: Sequence[Record]) -> dict[str, Timing]:
    """Row -> pairs/s as a multiple of TRL's best, over the rounds in which others disturbed neither; none, if there are none."""
    middle = medians(records)
    base = best(middle)
    if base is None:
        return {}
    speeds = {
        name: {
            record["round"]: record["pairs_per_s"]
            for record in records
            if record["implementation"] == name and not record.get("unquotable")
        }
        for name in middle
    }
    together = {name: [r for r in its if r in speeds[base]] for name, its in speeds.items()}
    return {
        name: Timing(tuple(speeds[name][r] / speeds[base][r] for r in rounds))
        for name, rounds in together.items()
        if rounds
    }


def unquotable(records: Sequence[Record]) -> dict[str, str]:
    """Row -> why no ratio of it is to be printed: there was no quiet round, or its rounds differ too much."""
    ratios = times_best(records)
    found: dict[str, str] = {}
    for name in medians(records):
        its = [record.get("unquotable") for record in records if record["implementation"] == name]
        why = (
            ratios[name].why if name in ratios else next((why for why in its if why), "no quiet round with TRL's best")
        )
        if why:
            found[name] = why
    return found


def speed_table(records: Sequence[Record], titles: Mapping[str, str]) -> str:
    """One data set: medians over the rounds, and as multiples of TRL's best of the same run."""
    middle, ratios = medians(records), times_best(records)
    base = best(middle)
    refused = unquotable(records) if base else {}
    first = {record["implementation"]: record for record in reversed(records)}
    header = [
        "",
        "pairs/s",
        "x TRL's best",
        "peak MiB",
        "of TRL's",
        "reference s",
        "tokens a pair",
        "of GEMM speed",
        "first loss",
    ]
    rows, lines = [], []
    for name, record in ((name, first[name]) for name in titles if name in first):
        if name not in middle:
            of_it = (r["status"] for r in records if r["implementation"] == name and r["status"] != "measured")
            lines.append(f"{titles[name]}: {next(of_it, 'not measured: one step, and the first is not timed')}")
            continue
        its = middle[name]
        quoted = name in ratios and name not in refused
        share = its["peak_rss_mb"] / middle[base]["peak_rss_mb"] if base and its["peak_rss_mb"] else None
        rows.append(
            (
                titles[name],
                f"{its['pairs_per_s']:.3f}",
                f"{ratios[name].median:.2f}" if quoted else "-",
                f"{its['peak_rss_mb']:.0f}" if its["peak_rss_mb"] else "-",
                f"{share:.2f}" if share else "-",
                f"{its['reference_s']:.1f}",
                f"{sum(record['step_tokens']) / record['pairs']:.0f}",
                f"{record['share_of_gemm_speed']:.0%}" if "share_of_gemm_speed" in record else "-",
                f"{record['first_loss']:.4f}",
            )
        )
    for why in dict.fromkeys(refused.values()):
        lines.append(f"no ratio for {'; '.join(titles[name] for name in refused if refused[name] == why)}: {why}")
    if base is not None:
        lines.append(f"TRL's best here: {titles[base]}")
    return "\n".join([*([table(header, rows)] if rows else []), *lines])


def token_table(records: Sequence[Record]) -> str:
    """Share of TRL's padded rectangles that each layout saves, by data set, from the batches that were trained on."""
    header = ["tokens computed", "TRL", "one by one", "padded", "saved", "packed", "saved", "shared", "saved"]
    rows = []
    for case in dict.fromkeys(record["case"] for record in records):
        tokens = {
            record["implementation"]: sum(record["step_tokens"])
            for record in records
            if record["case"] == case and record["status"] == "measured"
        }
        rectangle = next((tokens[name] for name in ("trl_best", "trl_default", "naive") if name in tokens), None)
        single = next((tokens[name] for name in ("trl_accumulated", "trl_compacted") if name in tokens), None)
        cells = [str(count) if count else "-" for count in (rectangle, single)]
        for names in (("engine_operator",), ("engine_packed",), ("engine_cached", "engine_shared")):
            mine = next((tokens[name] for name in names if name in tokens), None)
            cells.append(str(mine) if mine else "-")
            cells.append(f"{1 - mine / rectangle:.1%}" if mine and rectangle else "-")
        rows.append((case, *cells))
    return table(header, rows)
