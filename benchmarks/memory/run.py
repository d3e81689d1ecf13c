"""How much memory does it take?

    python -m benchmarks.memory                                    both cases, every implementation
    python -m benchmarks.memory --cases vocabulary --only 'engine tiled' naive
    python -m benchmarks.memory --cases step --only engine_naive engine_shared --no_save
    python -m benchmarks.memory --smoke                            does it run? Tiny shapes, one implementation a case

vocabulary   MiB of one forward and backward of a frozen head beyond inputs and results, by vocabulary (`vocabulary.py`), and
             whether it is independent of that
step         a whole optimiser step of a real model by part: the peak within each, and what stays of it (`phases.py`, `step.py`)

Every figure is of a fresh process. Linux, on a CPU; `make gpu PART=memory` is of a card.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import smoke
from benchmarks.harness import add_suite_options, describe_machine, quantile, rounds_of, save, table
from benchmarks.memory import step, vocabulary
from benchmarks.ops.implementations import IMPLEMENTATIONS

Record = dict[str, Any]
CASES = ("vocabulary", "step")
EVERYBODY = (*IMPLEMENTATIONS, *step.ROWS)
SMOKE_ONLY = {"vocabulary": ("engine tiled",), "step": ("engine_shared",)}


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    records: list[Record] = []
    try:
        for name in args.cases:
            own = {"vocabulary": IMPLEMENTATIONS, "step": step.ROWS}[name]
            usual = SMOKE_ONLY[name] if args.smoke else tuple(own)
            only = [entry for entry in own if entry in (args.only or usual)]
            if only:
                records += measure(name, only, args)
    finally:  # what was measured before somebody lost patience is kept
        if args.smoke:
            records = [{**record, "unquotable": record["unquotable"] or smoke.WHY} for record in records]
        if records:
            print(show(records))
        save("memory", records, args, describe_machine())
    return 0


def measure(name: str, only: Sequence[str], args: argparse.Namespace) -> list[Record]:
    if name == "vocabulary":
        return vocabulary.measure(only, args.threads, smoke=args.smoke)
    if args.smoke:
        with tempfile.TemporaryDirectory(prefix="dpo-memory-") as folder:
            return step.measure(step.smoke_job(Path(folder), args.threads), only, args.rounds or 1, args.limit_s)
    sizes = {"pairs": args.pairs, "batch": args.batch, "max_length": args.max_length}
    job = step.real_job(args.model, args.data, **sizes, threads=args.threads)
    return step.measure(job, only, rounds_of(args), args.limit_s)


# ---- what a person reads ----


def show(records: Sequence[Record]) -> str:
    found = [_vocabularies(records), _growths(records), _steps(records), _others(records)]
    return "\n\n".join(text for text in found if text)


def _vocabularies(records: Sequence[Record]) -> str:
    """Extra MiB by implementation and vocabulary."""
    measured = [r for r in records if r["case"] == "vocabulary" and r["status"] == "measured"]
    if not measured:
        return ""
    sizes = sorted({record["vocabulary"] for record in measured})
    extra = {(record["implementation"], record["vocabulary"]): record["extra_mb"] for record in measured}
    names = dict.fromkeys(record["implementation"] for record in measured)
    rows = [(name, *(_mb(extra.get((name, size))) for size in sizes)) for name in names]
    first = measured[0]
    title = f"extra MiB of a frozen head's forward and backward, N={first['rows']}, D={first['hidden']}, by V"
    return f"{title}\n{table(('implementation', *(f'{size:,}' for size in sizes)), rows)}"


def _growths(records: Sequence[Record]) -> str:
    rows = [
        (
            record["implementation"],
            f"{record['smallest_mb']:.1f}-{record['largest_mb']:.1f}",
            "yes" if record["independent"] else "no",
            record.get("claim", ""),
            "" if "claim" not in record else "yes" if record["holds"] else "NO",
        )
        for record in records
        if record["case"] == "independent_of_vocabulary"
    ]
    return table(("implementation", "MiB", "independent of V", "claim", "holds"), rows) if rows else ""


def _steps(records: Sequence[Record]) -> str:
    """Medians over the rounds: the peak of each part, in brackets what stays; below it what was planned."""
    measured = [r for r in records if r["case"] == "step" and r["status"] == "measured"]
    if not measured:
        return ""
    parts = list(measured[0]["parts"])
    rows = []
    for name in dict.fromkeys(record["implementation"] for record in measured):
        its = [record for record in measured if record["implementation"] == name]
        cells = [
            f"{quantile([r['parts'][part] for r in its], 0.5):.0f} ({quantile([r['stays'][part] for r in its], 0.5):.0f})"
            for part in parts
        ]
        peak = f"{quantile([record['peak_rss_mb'] for record in its], 0.5):.0f}"
        rows.append((name, *cells, peak, str(its[0]["largest_forward_tokens"])))
        plan = its[0]["planned"]
        if not isinstance(plan, str):
            named = {**plan, "forward": None, "backward": plan["step"]}
            rows.append(("  planned", *(_mb(named.get(part)) for part in parts), "", ""))
    first = measured[0]
    title = (
        f"one optimiser step, {first['model']}, {first['data']}, {first['batch']} pairs, LoRA r={first['lora_r']}: peak MiB of "
        "each part (what stays)"
    )
    return f"{title}\n{table(('', *parts, 'peak of the process', 'tokens of a forward'), rows)}"


def _others(records: Sequence[Record]) -> str:
    """Why what was not measured was not."""
    lines: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "measured":
            lines.setdefault(record["status"], []).append(record["implementation"])
    return "\n".join(f"{', '.join(dict.fromkeys(names))}: {status}" for status, names in lines.items())


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--only", nargs="+", choices=EVERYBODY, metavar="IMPLEMENTATION")
    made.add_argument("--model", default="smollm2", help="of the case step")
    made.add_argument("--data", type=Path, default=step.DATA, help="pairs of the case step")
    made.add_argument("--pairs", type=int, default=16, help="of the case step: so many, in steps of --batch")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--max_length", type=int, default=512)
    made.add_argument(
        "--limit_s", type=float, default=900.0, help="seconds after which a row of the case step is stopped"
    )
    add_suite_options(made, rounds=1)
    return made


if __name__ == "__main__":
    sys.exit(main())
