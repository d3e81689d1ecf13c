"""Result files of a few made-up figures, of the form that the suites write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MACHINE = {
    "cpu": "Test CPU",
    "cores": 2,
    "cpu_vector": "avx2",
    "accelerator": None,
    "load_before": 0.1,
    "system": "Linux 6",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "trl": "1.16.0", "not-installed": None},
}
FOLDER = "test-cpu-2-cores-avx2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Record = dict[str, Any]


def write(folder: Path, benchmark: str, records: Sequence[Mapping[str, Any]], *, day: int = 24, run: int = 1) -> Path:
    """A result file of that day of November 2026, and which of the day's runs it is."""
    accelerator = next((record["accelerator"] for record in records if "accelerator" in record), None)
    common = {
        "schema": 1,
        "benchmark": benchmark,
        "time": f"2026-11-{day:02}T12:00:00+00:00",
        "commit": COMMIT,
        "command": f"run.py --suite {benchmark}",
        "machine": {**MACHINE, "accelerator": accelerator},
    }
    place = folder / (accelerator.lower().replace(" ", "-") if accelerator else FOLDER)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"2026-11-{day:02}-{benchmark}{'' if run == 1 else f'-{run}'}.jsonl"
    path.write_text("".join(json.dumps({**common, **record}) + "\n" for record in records), encoding="utf-8")
    return path


def of_ops(implementation: str, over: float | None, **more: Any) -> Record:
    """One of the operator at (64, 32, 1000); without `over` it is the floor."""
    ratio = {} if over is None else {"over_floor": {"median": over, "p20": 0.9 * over, "p80": 1.1 * over}}
    return {
        **{"case": "frozen", "implementation": implementation, "rows": 64, "hidden": 32, "vocabulary": 1000},
        **{"dtype": "float32", "device": "cpu", "threads": 2, "rounds": 5, "status": "measured", "unquotable": None},
        **{"median_ms": 10.0 * (over or 1), "p20_ms": 9.0, "p80_ms": 11.0, "floor_gemms": 2},
        **({"errors": {"logp_max": 5.1e-6, "logp_over_bound": 0.05, "far": False, "d_hidden": 4e-7}} if over else {}),
        **({"memory": {"extra_mb": 20.5}} if over else {}),
        **ratio,
        **more,
    }


def of_steps(implementation: str, rates: Sequence[float], *, case: str = "hh", **more: Any) -> list[Record]:
    """A record for each round, of steps of 4 pairs."""
    return [
        {
            **{"case": case, "implementation": implementation, "dtype": "float32", "threads": 2, "rounds": len(rates)},
            **{"status": "measured", "unquotable": None, "round": number, "batch": 4, "max_length": 512},
            **{"pairs_per_s": rate, "peak_rss_mb": 2048.0, "reference_s": 1.5, "step_tokens": [400, 440]},
            **more,
        }
        for number, rate in enumerate(rates)
    ]


def of_memory(implementation: str, extra: Mapping[int, float]) -> list[Record]:
    """A record for each vocabulary."""
    return [
        {
            **{"case": "vocabulary", "implementation": implementation, "dtype": "float32", "threads": 2, "rounds": 1},
            **{"status": "measured", "unquotable": None, "rows": 256, "hidden": 64, "vocabulary": size, "extra_mb": mb},
        }
        for size, mb in extra.items()
    ]


def of_scale(slope: float, *, holds: bool = True, **more: Any) -> list[Record]:
    """Three points by rows, and their fit."""
    common = {"case": "rows", "implementation": "engine_frozen", "dtype": "float32", "threads": 2, "rounds": 3}
    common |= {"status": "measured", "unquotable": None}
    points = [{"kind": "point", "x": x, "median_s": x**slope, "p20_s": x**slope, "p80_s": x**slope} for x in (1, 2, 4)]
    fit = {"kind": "fit", "over": "x", "x_from": 1, "x_to": 4, "slope": slope, "slope_low": slope - 0.01}
    fit |= {"slope_high": slope + 0.01, "points": 3, "claim": "linear: slope within 0.10 of 1", "holds": holds}
    return [{**common, **point} for point in points] + [{**common, **fit, **more}]


def of_cache() -> list[Record]:
    """One record of the part `build`."""
    return [
        {
            **{"case": "build", "implementation": "engine", "dtype": "float32", "threads": 2, "rounds": 3},
            **{"status": "measured", "unquotable": None, "ratio": 0.988, "forests": 19},
        }
    ]
