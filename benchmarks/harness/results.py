"""Where are figures kept? JSON lines, a file a run, none ever overwritten."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT, commit, machine_name

SCHEMA = 1
RESULTS = ROOT / "benchmarks" / "results"


def write_results(
    what: str,
    records: Iterable[Mapping[str, Any]],
    *,
    machine: Mapping[str, Any],
    folder: Path = RESULTS,
    now: datetime | None = None,
) -> Path:
    """Write records as `<folder>/<machine>/<date>-<what>.jsonl`, or `-2`, `-3`, ... if that exists.

    Args:
        what: name of the benchmark.
        records: one JSON object a line; schema, benchmark, time, commit, command and machine are put before each.
        machine: what `describe_machine` gave.

    Returns:
        The file, which did not exist before.
    """
    now = now or datetime.now(timezone.utc)
    common = {
        "schema": SCHEMA,
        "benchmark": what,
        "time": now.isoformat(timespec="seconds"),
        "commit": commit(),
        # Names without the folders of whoever ran it.
        "command": " ".join(Path(word).name if word.startswith("/") else word for word in sys.orig_argv),
        "machine": dict(machine),
    }
    text = "".join(json.dumps({**common, **record}, allow_nan=False) + "\n" for record in records)
    place = folder / machine_name(machine)
    place.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = place / f"{now:%Y-%m-%d}-{what}{'' if number == 1 else f'-{number}'}.jsonl"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return path
        except FileExistsError:
            number += 1
