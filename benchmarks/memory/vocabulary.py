"""What does one forward and backward of a frozen head take beyond inputs and results, by vocabulary?

A fresh process for each figure (`benchmarks.ops.memory`). What the result itself takes, (N,) log-probs and the (N, D) gradient,
is off; the weight is an input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import one_line
from benchmarks.ops.cases import CASES, Shape
from benchmarks.ops.implementations import IMPLEMENTATIONS, NotAvailable, peer_errors
from benchmarks.ops.memory import in_fresh_process

Record = dict[str, Any]
ROWS, HIDDEN = 1024, 256
VOCABULARIES = (8192, 32768, 65536, 131072, 262144)
SMOKE_ROWS, SMOKE_HIDDEN, SMOKE_VOCABULARIES = 64, 16, (4096, 16384)
CASE = CASES["frozen"]
SHARE, NOISE_MB = 0.10, 1.0
CLAIM = "independent of V: largest less smallest at most 10 % of the smallest and 1 MiB"
# glibc keeps what is freed, and counts it as resident, unless it was mapped by itself: so everything large is.
HONEST = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure(only: Sequence[str], threads: int, *, smoke: bool) -> list[Record]:
    """A record for every implementation and vocabulary, measured or not, then one for each implementation's growth."""
    rows, hidden = (SMOKE_ROWS, SMOKE_HIDDEN) if smoke else (ROWS, HIDDEN)
    records = []
    for vocabulary in SMOKE_VOCABULARIES if smoke else VOCABULARIES:
        shape = Shape(rows=rows, hidden=hidden, vocabulary=vocabulary, dtype="float32", device="cpu")
        for name in only:
            print(f"vocabulary {vocabulary}: {name}", file=sys.stderr, flush=True)
            common = {"case": "vocabulary", "implementation": name, "dtype": "float32", "threads": threads, "rounds": 1}
            size = {"rows": rows, "hidden": hidden, "vocabulary": vocabulary}
            records.append({**common, **size, "unquotable": None, **one(name, shape, threads)})
    return records + growth(records)


def one(name: str, shape: Shape, threads: int) -> Record:
    """What one call takes, or in `status` why that is not known."""
    try:
        IMPLEMENTATIONS[name].score(CASE, shape)
    except NotAvailable as why:
        return {"status": f"n/a: {why}"}
    except peer_errors() as error:
        return {"status": f"failed: {one_line(error)}"}
    try:
        return {"status": "measured", **in_fresh_process(name, CASE, shape, threads, {**HONEST, **_threads(threads)})}
    except RuntimeError as error:
        return {"status": f"failed: {str(error).splitlines()[-1][:160]}"}


def _threads(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)}


def growth(records: Sequence[Record]) -> list[Record]:
    """Of every implementation that was measured at two vocabularies or more: the smallest and the largest of its figures.

    The claim is the engine's. Of the others it is said how it stands with them, in `independent`.
    """
    by_name: dict[str, list[Record]] = {}
    for record in records:
        if record["case"] == "vocabulary" and record["status"] == "measured":
            by_name.setdefault(record["implementation"], []).append(record)
    found = []
    for name, its in by_name.items():
        if len(its) < 2:
            continue
        extra = [record["extra_mb"] for record in its]
        independent = max(extra) - min(extra) <= SHARE * min(extra) + NOISE_MB
        claim = {"claim": CLAIM, "holds": independent} if name.startswith("engine") else {}
        found.append(
            {
                "case": "independent_of_vocabulary",
                "implementation": name,
                "dtype": its[0]["dtype"],
                "threads": its[0]["threads"],
                "rounds": its[0]["rounds"],
                "status": "measured",
                "unquotable": None,
                "vocabulary_from": its[0]["vocabulary"],
                "vocabulary_to": its[-1]["vocabulary"],
                "smallest_mb": min(extra),
                "largest_mb": max(extra),
                "independent": independent,
                **claim,
            }
        )
    return found
