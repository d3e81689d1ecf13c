"""How fast does the engine train beside TRL, on the same pairs, and in how much memory?

    python -m benchmarks.steps --data FOLDER                  each known data set in FOLDER, SmolLM2-135M, LoRA r=16
    python -m benchmarks.steps --data pairs.jsonl --pairs 16 --only engine_shared trl --rounds 3

Rows: the engine padded, packed, and packed with shared prompts; TRL at its best setting, and TRL with compaction of scored rows
forced (`train_rows.py`). Every row is a fresh process, the rows take turns, and their order is reversed every other round.
All get the same token ids in the same order, and both sides refuse to report where what they trained on was anything else.
A data set's figures are printed and kept only if all its rows start at ln 2 and at the same log-probs.

pairs/s is over the optimiser steps after the first, from the end of one to the end of the next. Reference log-probs are
computed once before the first step, on both sides, and stand beside. Memory is each process's peak resident set, read from
outside. A row that takes longer than `--limit_s` reads "not measured".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import describe_machine, write_results
from benchmarks.steps.rows import DATA_SETS, OTHER, ROWS, Job, Record, find_data, read_pairs, run_row
from benchmarks.steps.tables import disagreements, speed_table, token_table

TITLES = {name: row.title for name, row in ROWS.items()}
SAME = ("batch", "max_length", "dtype", "learning_rate", "beta", "lora_r", "lora_alpha", "seed", "threads")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--data", nargs="+", required=True, help=f"files of pairs, or folders with {', '.join(DATA_SETS)}"
    )
    made.add_argument("--model", default="smollm2")
    made.add_argument("--pairs", type=int, default=40, help="first so many usable pairs of each data set")
    made.add_argument("--steps", type=int, help="no more steps than this")
    made.add_argument("--batch", type=int, help="pairs a step; default: by data set")
    made.add_argument("--max_length", type=int, help="default: by data set")
    made.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    made.add_argument("--rounds", type=int, default=1, help="over all rows of a data set; tables show medians")
    made.add_argument("--limit_s", type=float, default=1800.0, help="seconds after which a row is stopped")
    made.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    made.add_argument("--learning_rate", type=float, default=5e-6)
    made.add_argument("--beta", type=float, default=0.1)
    made.add_argument("--lora_r", type=int, default=16)
    made.add_argument("--lora_alpha", type=float, default=32.0)
    made.add_argument("--seed", type=int, default=42)
    made.add_argument("--threads", type=int, default=describe_machine()["cores"])
    made.add_argument("--no_save", action="store_true", help="print only")
    return made


def make_job(name: str, path: Path, model_path: str, dtype: str, args: argparse.Namespace) -> Job:
    """The pairs of one data set, in whole steps.

    Raises:
        ValueError: there are not enough for two steps; the first is not timed.
    """
    known = DATA_SETS.get(name, OTHER)
    batch = args.batch or known.batch
    steps = min(args.pairs // batch, args.steps or args.pairs)
    if steps < 2:
        raise ValueError(f"{name}: {args.pairs} pairs in steps of {batch} make {steps} steps; expected at least 2")
    max_length = args.max_length or known.max_length
    return Job(
        data=name,
        model_path=model_path,
        pairs=read_pairs(path, model_path, max_length, steps * batch),
        dtype=dtype,
        batch=batch,
        max_length=max_length,
        learning_rate=args.learning_rate,
        beta=args.beta,
        lora_r=args.lora_r,
        lora_alpha=args.lora_alpha,
        seed=args.seed,
        threads=args.threads,
    )


def measure(job: Job, only: Sequence[str], rounds: int, limit_s: float) -> list[Record]:
    """Every row once a round, in an order that turns round; a row that gave nothing is not tried again."""
    settings: Record = {name: getattr(job, name) for name in SAME}
    settings |= {"data": job.data, "pairs": len(job.pairs), "steps": job.steps}
    records: list[Record] = []
    given_up: set[str] = set()
    for number in range(rounds):
        for name in only if number % 2 == 0 else reversed(only):
            if name in given_up:
                continue
            print(f"{job.data}, round {number + 1}: {TITLES[name]}", file=sys.stderr, flush=True)
            record = run_row(name, job, limit_s)
            if record["status"] != "measured":
                print(record.get("tail", record["status"]), file=sys.stderr, flush=True)
                given_up.add(name)
            records.append({"round": number, **settings, **record})
    return records


def report(job: Job, records: Sequence[Record]) -> tuple[str, bool]:
    """What to print of one data set, and whether its rows may be compared."""
    title = (
        f"{job.data}: {len(job.pairs)} pairs, {job.steps} steps of {job.batch} (the first not timed), max_length "
        f"{job.max_length}, LoRA r={job.lora_r}, {job.dtype}, {job.threads} threads"
    )
    wrong = disagreements(records)
    if wrong:
        return "\n".join([title, "no figures, for the rows do not agree:", *wrong]), False
    return f"{title}\n{speed_table(records, TITLES)}", True


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    import torch

    from dpo_engine.model.loading import resolve_dtype, resolve_model

    machine = describe_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    dtype = str(resolve_dtype(args.dtype)).removeprefix("torch.")
    kept: list[dict[str, Any]] = []
    status = 0
    try:
        found = find_data(args.data)
        model_path = str(resolve_model(args.model, progress=lambda line: print(line, file=sys.stderr)))
        jobs = [make_job(name, path, model_path, dtype, args) for name, path in found.items()]
    except ValueError as error:
        made.error(str(error))
    try:
        for job in jobs:
            records = measure(job, args.only, args.rounds, args.limit_s)
            text, agree = report(job, records)
            print(f"{text}\n", flush=True)
            if agree:
                kept += [{"model": Path(args.model).name, **record} for record in records]
            else:
                status = 1
    finally:  # what was measured before somebody lost patience is kept
        if any(record["status"] == "measured" for record in kept):
            print(token_table(kept))
            if not args.no_save:
                print(f"written to {write_results('train', kept, machine=machine)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
