"""What the page says of the matrix: the table in docs/trl.md, from the newest result file.

Between the two markers stands what `make integrations` found; a test holds the page to the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, quantile
from benchmarks.integrations.releases import RECIPES, RELEASES

PAGE = ROOT / "docs" / "trl.md"
BEGIN, END = "<!-- integrations: begin -->", "<!-- integrations: end -->"
NOT = "not measured"
Record = Mapping[str, Any]


def newest(folder: Path = RESULTS) -> tuple[str, list[dict[str, Any]]]:
    """Name and records of the newest result file that holds every release of TRL; ("", []) where there is none."""
    for file in sorted(folder.glob("*/*-integrations*.jsonl"), key=_order, reverse=True):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if {record["release"] for record in records} >= set(RELEASES) - set(RECIPES):
            return f"{file.parent.name}/{file.name}", records
    return "", []


def text(name: str, records: Sequence[Record]) -> str:
    """Markdown: a row a release."""
    lines = [
        f"From `benchmarks/results/{name}`:",
        "",
        "| TRL | transformers | trainers that did the same | seconds a step: before | after | ratio "
        "| peak memory: before | after | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for release in dict.fromkeys(record["release"] for record in records if record["kind"] != "recipe"):
        lines.append(_row(release, [record for record in records if record["release"] == release]))
    lines += ["", *_what_was_measured(records)]
    return "\n".join(lines)


def write_page(page: Path = PAGE) -> Path:
    """Put the table between the markers of `page`."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks {BEGIN} or {END}; put both there, each on a line of its own")
    page.write_text(f"{before}{BEGIN}\n{text(*newest())}\n{END}{after}", encoding="utf-8")
    return page


def _row(release: str, records: Sequence[Record]) -> str:
    held = [record for record in records if record["kind"] == "equality"]
    equal = [record["case"] for record in held if record["status"] == "equal"]
    other = [f"{record['case']} {record['status']}" for record in held if record["status"] != "equal"]
    same = f"{len(equal)} of {len(held)}" + (f" ({', '.join(other)})" if other else "")
    cost = [record for record in records if record["kind"] == "cost" and record["status"] == "measured"]
    versions = cost[0]["packages"]["transformers"] if cost else NOT
    seconds = [_seconds(cost, side) for side in ("without", "with")]
    memory = [_memory(cost, side) for side in ("without", "with")]
    cells = [release, versions, same, *_cells(seconds, "{:.2f}"), *_cells(memory, "{:.0f} MB")]
    return f"| {' | '.join(cells)} |"


def _cells(pair: Sequence[float | None], form: str) -> list[str]:
    before, after = pair
    if before is None or after is None:
        return [NOT] * 3
    return [form.format(before), form.format(after), f"{after / before:.2f}"]


def _seconds(cost: Sequence[Record], side: str) -> float | None:
    seconds = [second for record in cost if record["side"] == side for second in record["step_seconds"]]
    return quantile(seconds, 0.5) if seconds else None


def _memory(cost: Sequence[Record], side: str) -> float | None:
    peaks = [record["peak_mb"] for record in cost if record["side"] == side]
    return quantile(peaks, 0.5) if peaks else None


def _what_was_measured(records: Sequence[Record]) -> list[str]:
    cost = [record for record in records if record["kind"] == "cost" and record["status"] == "measured"]
    lines = []
    if held := [record for record in records if record["kind"] == "equality"]:
        lines.append(
            f"Same: {held[0]['steps']} steps of a tiny random model in float32, losses, every metric that the trainer logs, "
            "and the first step's gradients, within the bounds that `benchmarks/integrations/compare.py` lists."
        )
    if cost:
        first = cost[0]
        machine = first["machine"]
        where = machine["accelerator"] or f"{machine['cores']} cores of {machine['cpu']}, no GPU"
        rounds = 1 + max(record["round"] for record in cost)
        lines.append(
            f"Time and memory: TRL's `DPOTrainer`, {first['model']}, float32, LoRA r=16, {first['batch']} pairs a step, "
            f"`max_length` {first['max_length']}, no checkpointing, {first['steps']} steps of which the first is not timed, "
            f"{rounds} round{'s' if rounds > 1 else ''} in turn, each run a process of its own (its whole peak, Python and weights "
            f"included), on {where}, {first['time'][:10]}."
        )
    return lines


def _order(path: Path) -> tuple[str, int]:
    date, _, rest = path.stem.partition("-integrations")
    return date, int(rest[1:]) if rest[1:].isdecimal() else 1
