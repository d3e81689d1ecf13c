"""How much memory does QLoRA-DPO of an 8B model take by length, beside TRL and beside the plan, and what fits 12, 16 and 24 GB?

    make gpu PART=memory                                        all of it, in under six minutes
    python -m benchmarks.gpu.memory --lengths 1024 --tiny       the same on two small layers, on a CPU
    python -m benchmarks.gpu.memory_table                           the table, from the newest result files

A Llama-3.1-8B-shaped model with random weights in NF4 (speed does not depend on values), LoRA on all linear layers, gradient
checkpointing and `paged_adamw_8bit` on both sides; pairs whose prompt is a quarter of the length and whose completions fill it. The
engine computes a pair at a time in one forest, TRL at its smallest micro-batch, one pair. Peak memory is the allocator's.

With `--cap 12` the process may take that many GB of a larger card (`set_per_process_memory_fraction`), so that a big card stands
in for a small one: the longest of `--lengths` that the records before it say fits is trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.model import llama_config, make_model
from benchmarks.gpu.pairs import FIRST_ID
from benchmarks.gpu.rows import Record, Settings, run_row
from benchmarks.steps.rows import missing_packages
from dpo_engine.memory.cards import read_card
from dpo_engine.memory.shapes import ModelShape, read_shape
from dpo_engine.memory.step import MIB, StepSettings, step_parts

LENGTHS = (1024, 2048, 4096, 8192)
CAPS = (12, 16, 24)  # GB
ROWS = {"engine": "engine", "trl": "trl_precomputed"}  # names here -> rows of rows.py
STEP, STEPS = 4, 3
CONTEXT_MB = 600.0  # beside the allocator, as the plan takes it
LEAST_S = 10.0
MOST_OFF = 0.05  # of the plan from the peak
TINY_SCALE = 32


def pairs_of(length: int, count: int, vocabulary: int) -> list[Record]:
    """Pairs that fill `length`: a quarter prompt, the rest in each completion."""
    draw = torch.Generator().manual_seed(length)

    def ids(number: int) -> list[int]:
        found: list[int] = torch.randint(FIRST_ID, vocabulary, (number,), generator=draw).tolist()
        return found

    prompt = length // 4
    return [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(length - prompt), "rejected_ids": ids(length - prompt)}
        for _ in range(count)
    ]


def pair_tokens(length: int) -> int:
    """Tokens of such a pair in a forest."""
    prompt = length // 4
    return prompt + 2 * (length - prompt)


def planned_mb(shape: ModelShape, length: int, device: str) -> float:
    """What the plan says an allocator gives out for a pair of that length."""
    compute = "bfloat16" if device == "cuda" else "float32"
    parts = step_parts(shape, StepSettings(compute=compute, device=device), pair_tokens(length))
    return (parts.allocated - parts.optimiser) / MIB  # a paged optimiser's state is not the allocator's


def measured(
    lengths: Sequence[int], rows: Sequence[str], *, device: str, tiny: bool, limit_s: float, until: float
) -> Iterator[Record]:
    """A record for each length and side, as soon as it is there; the engine's first, and the shortest."""
    config = llama_config(tiny=tiny)
    shape = read_shape(config.to_dict(), "llama-3.1-8b")
    absent = missing_packages("bitsandbytes")
    model = None if absent else make_model(config, "nf4", device, _dtype(device))
    for length in lengths:
        pairs = pairs_of(length, STEP * STEPS, config.vocab_size)
        settings = Settings(
            weights="nf4",
            device=device,
            dtype=_dtype(device),
            step=STEP,
            steps=STEPS,
            max_length=length,
            forest_tokens=pair_tokens(length),
            limit_s=limit_s,
            optim="paged_adamw_8bit",
            micro=1,
        )
        for row in rows:
            left = min(limit_s, until - time.perf_counter())
            found: Record
            if model is None:
                found = {"status": str(absent)}
            elif left < LEAST_S:
                found = {"status": "not measured: the time that was given is used up"}
            else:
                print(f"{row} at {length}", file=sys.stderr, flush=True)
                found = run_row(ROWS[row], model, pairs, settings, time.perf_counter() + left)
            record = {
                "implementation": row,
                "length": length,
                "pair_tokens": pair_tokens(length),
                "tiny": tiny,
                **found,
            }
            if row == "engine":
                record["planned_mb"] = round(planned_mb(shape, length, device), 1)
            if record["status"] == "measured" and record["step_seconds"]:
                record["tokens_per_s"] = sum(record["step_tokens"][1:]) / sum(record["step_seconds"])
            yield record


def longest_that_fits(records: Sequence[Record], cap: float, lengths: Sequence[int]) -> int | None:
    """The longest length at which the engine, as measured, stays within `cap` GB; None where nothing says so."""
    fitting = [
        record["length"]
        for record in records
        if record.get("implementation") == "engine" and record.get("status") == "measured" and not record.get("cap_gb")
        if record["length"] in lengths and needs_mb(record) <= read_card(f"{cap:g}GB").memory / MIB
    ]
    return max(fitting, default=None)


def needs_mb(record: Record) -> float:
    """MiB of a card that a measured row needs: what its allocator gave out, and the context."""
    return float(record["peak_mb"]) + CONTEXT_MB


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    made.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    made.add_argument("--cap", type=float, help="GB that this process may take of the card")
    made.add_argument("--limit_s", type=float, default=60.0, help="seconds of one row")
    made.add_argument("--budget_s", type=float, default=float("inf"), help="seconds of all rows")
    made.add_argument("--device", default=default_device, choices=["cuda", "cpu"])
    made.add_argument("--tiny", action="store_true", help="two small layers and short pairs, in float32 on a CPU")
    made.add_argument(
        "--records", type=Path, help="add each record to this file at once; what it holds decides with --cap"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.perf_counter()
    args = parser().parse_args(arguments)
    lengths = [length // TINY_SCALE if args.tiny else length for length in args.lengths]
    rows, more = list(args.rows), {}
    if args.cap:
        before = _read(args.records)
        longest = longest_that_fits(before, args.cap, lengths)
        if longest is None:
            print(f"cap {args.cap:g} GB: not run, no length is known to fit", file=sys.stderr)
            return 0
        lengths, rows, more = [longest], ["engine"], {"cap_gb": args.cap}
        if args.device == "cuda":
            total = torch.cuda.mem_get_info()[1]
            given = read_card(f"{args.cap:g}GB").memory - CONTEXT_MB * MIB  # the fraction is of the allocator alone
            torch.cuda.set_per_process_memory_fraction(min(1.0, given / total))
    failed = False
    for found in measured(
        lengths, rows, device=args.device, tiny=args.tiny, limit_s=args.limit_s, until=begin + args.budget_s
    ):
        record = {**found, **more}
        failed |= record["implementation"] == "engine" and record["status"].startswith("failed")
        print(_line(record), flush=True)
        if args.records:
            with args.records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
    return 1 if failed else 0


def _read(records: Path | None) -> list[Record]:
    if records is None or not records.exists():
        return []
    return [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _line(record: Record) -> str:
    name = f"{record['implementation']} at {record['length']}" + (
        f", {record['cap_gb']:g} GB" if record.get("cap_gb") else ""
    )
    if record["status"] != "measured":
        return f"{name}: {record['status']}"
    planned: Any = record.get("planned_mb")
    beside = ""
    if planned and not record["tiny"]:
        off = planned / record["peak_mb"] - 1
        met = "met" if abs(off) <= MOST_OFF else "missed"
        beside = f", planned {planned:.0f} ({off:+.1%}; target {MOST_OFF:.0%}: {met})"
    return f"{name}: {record['peak_mb']:.0f} MiB{beside}, {record['pairs_per_s']:.2f} pairs/s"


if __name__ == "__main__":
    sys.exit(main())
