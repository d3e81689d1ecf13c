"""What does QLoRA-DPO of an 8B model take and give, by card and length? The table, from result files and the plan.

    python -m benchmarks.gpu.memory_table            Markdown; what was not measured says so

Peaks are of one run for each length and side (`memory.py`); a card of a size fits what its peak and a context stay below.
Speed is that of the card that measured, which the heading names. Predictions are the plan's, context and allocator included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from dpo_engine.memory.cards import read_card
from dpo_engine.memory.shapes import shipped_shape
from dpo_engine.memory.step import StepSettings, step_parts

CAPS, LENGTHS, CONTEXT_MB = (12, 16, 24), (1024, 2048, 4096, 8192), 600.0  # as in memory.py, which needs torch
Record = Mapping[str, Any]
NOT = "not measured"


def pair_tokens(length: int) -> int:
    return length // 4 + 2 * (length - length // 4)


def newest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of the newest result file of the part `memory`; none where nothing was measured."""
    files = sorted(folder.glob("*/*-gpu-memory*.jsonl"), key=lambda path: path.name)
    if not files:
        return []
    return [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines() if line.strip()]


def table(records: Sequence[Record]) -> str:
    """Markdown."""
    found = {
        (record["implementation"], record["length"]): record
        for record in records
        if record.get("status") == "measured"
        and "implementation" in record
        and not record.get("cap_gb")
        and not record.get("tiny")
    }
    capped = {
        (record["length"], record["cap_gb"]): record["status"] for record in records if record.get("cap_gb") is not None
    }
    cards = sorted({name for record in records if (name := _card(record))})
    speed = f" on {', '.join(cards)}" if cards else ""
    lines = [
        f"| card | tokens a row | planned GiB | engine: peak GiB | tokens/s{speed} | pairs/s "
        "| TRL 1.16: peak GiB | tokens/s | pairs/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cap in CAPS:
        for length in LENGTHS:
            lines.append(_row(cap, length, found, capped))
    return "\n".join(lines)


def _row(
    cap: int, length: int, found: Mapping[tuple[str, int], Record], capped: Mapping[tuple[int, float], str]
) -> str:
    parts = step_parts(shipped_shape("llama-3.1-8b"), StepSettings(), pair_tokens(length))
    planned = f"{parts.total / 2**30:.1f}" + ("" if parts.total <= read_card(f"{cap}GB").memory else ", does not fit")
    cells = [f"{cap} GB", str(length), planned]
    for side in ("engine", "trl"):
        record = found.get((side, length))
        cells += _cells(record, cap, capped.get((length, float(cap))) if side == "engine" else None)
    return f"| {' | '.join(cells)} |"


def _cells(record: Record | None, cap: int, under_cap: str | None) -> Iterable[str]:
    if record is None:
        return (NOT, NOT, NOT)
    needed = record["peak_mb"] + CONTEXT_MB
    peak = f"{record['peak_mb'] / 1024:.1f}"
    if needed > read_card(f"{cap}GB").memory / 2**20:
        return (f"{peak}: does not fit", "-", "-")
    peak += {None: "", "measured": ", trained within the cap"}.get(under_cap, f", under the cap: {under_cap}")
    return (peak, f"{record['tokens_per_s']:.0f}", f"{record['pairs_per_s']:.2f}")


def _card(record: Record) -> str | None:
    name = (record.get("machine") or {}).get("accelerator")
    return str(name) if name else None


if __name__ == "__main__":
    print(table(newest()))
