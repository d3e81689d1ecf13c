"""May the figures of several trainers stand side by side, and what do they come to? Agreement, ratios and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import quantile, table

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
            lines.append(f"{record['row']} starts at loss {record['first_loss']:.5f}; expected ln 2 = {START:.5f}")
        for key in ("first_chosen", "first_rejected"):
            if not abs(record[key] - first[key]) <= tolerance * max(1.0, abs(first[key])):
                lines.append(
                    f"{record['row']} has mean log-prob {key.removeprefix('first_')} {record[key]:.4f} in the first step, "
                    f"{first['row']} has {first[key]:.4f}"
                )
        if record["trainable_parameters"] != first["trainable_parameters"]:
            lines.append(
                f"{record['row']} trains {record['trainable_parameters']} parameters, "
                f"{first['row']} {first['trainable_parameters']}"
            )
    return list(dict.fromkeys(lines))


def medians(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Row -> medians over its rounds, of the rows that were measured in every round."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record)
    keys = ("pairs_per_s", "peak_rss_mb", "reference_s")
    return {
        name: {key: quantile([record[key] for record in found], 0.5) for key in keys}
        for name, found in rows.items()
        if all(record["status"] == "measured" and record["pairs_per_s"] for record in found)
    }


def best(middle: Mapping[str, Mapping[str, float]], prefix: str = "trl") -> str | None:
    """The fastest row of a side, or None where none was measured."""
    names = [name for name in middle if name.startswith(prefix)]
    return max(names, key=lambda name: middle[name]["pairs_per_s"], default=None)


def speed_table(records: Sequence[Record], titles: Mapping[str, str]) -> str:
    """One data set: medians over the rounds, and as multiples of TRL's fastest row of the same run."""
    middle = medians(records)
    base = middle.get(best(middle) or "")
    first = {record["row"]: record for record in reversed(records)}
    header = [
        "",
        "pairs/s",
        "x TRL's best",
        "peak MiB",
        "of TRL's",
        "reference s",
        "tokens a pair",
        "first loss",
        "chosen",
    ]
    rows, lines = [], []
    for name, record in ((name, first[name]) for name in titles if name in first):
        if name not in middle:
            why = next(
                (r["status"] for r in records if r["row"] == name and r["status"] != "measured"),
                "not measured: one step, and the first is not timed",
            )
            lines.append(f"{titles[name]}: {why}")
            continue
        its = middle[name]
        rows.append(
            (
                titles[name],
                f"{its['pairs_per_s']:.3f}",
                f"{its['pairs_per_s'] / base['pairs_per_s']:.2f}" if base else "-",
                f"{its['peak_rss_mb']:.0f}",
                f"{its['peak_rss_mb'] / base['peak_rss_mb']:.2f}" if base else "-",
                f"{its['reference_s']:.1f}",
                f"{sum(record['step_tokens']) / record['pairs']:.0f}",
                f"{record['first_loss']:.4f}",
                f"{record['first_chosen']:.3f}",
            )
        )
    return "\n".join([*([table(header, rows)] if rows else []), *lines])


def token_table(records: Sequence[Record]) -> str:
    """Share of TRL's padded rectangles that each layout saves, by data set, from the batches that were trained on."""
    header = ["tokens computed", "TRL", "padded", "saved", "packed", "saved", "shared", "saved"]
    rows = []
    for data in dict.fromkeys(record["data"] for record in records):
        tokens = {
            record["row"]: sum(record["step_tokens"])
            for record in records
            if record["data"] == data and record["status"] == "measured"
        }
        rectangle = tokens.get("trl", tokens.get("trl_compacted"))
        cells = [str(rectangle) if rectangle else "-"]
        for name in ("engine_padded", "engine_packed", "engine_shared"):
            mine = tokens.get(name)
            cells.append(str(mine) if mine else "-")
            cells.append(f"{1 - mine / rectangle:.1%}" if mine and rectangle else "-")
        rows.append((data, *cells))
    return table(header, rows)
