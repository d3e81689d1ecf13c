"""How fast does the engine train beside TRL, on the same pairs, and in how much memory?

    python -m benchmarks.steps                                on the packaged pairs, SmolLM2-135M, LoRA r=16
    python -m benchmarks.steps --data_dir FOLDER              each known data set in FOLDER
    python -m benchmarks.steps --data pairs.jsonl --pairs 16 --only engine_cached trl_best --rounds 3

Rows, from the definition to the engine as it comes, one feature at a time, and TRL in four ways: `rows.py`. Every row is a fresh
process, the rows take turns, and their order is reversed every other round. All get the same token ids in the same order, and
both sides refuse to report where what they trained on was anything else. A data set's figures are printed and kept only if
all its rows start at ln 2 and at the same log-probs.

pairs/s is over the optimiser steps after the first, from the end of one to the end of the next. Where reference log-probs are
computed before the first step, that time stands beside. Memory is each process's peak resident set, read from outside. A row
that takes longer than `--limit_s` reads "not measured"; one that others disturbed gets no ratio.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, add_suite_options, describe_machine, rounds_of, save
from benchmarks.steps.flops import gemm_tflops, model_flops
from benchmarks.steps.rows import DATA_SETS, OTHER, ROWS, Job, Record, find_data, read_pairs, run_here, run_row
from benchmarks.steps.tables import disagreements, speed_table, token_table

PACKAGED = ROOT / "examples" / "concise_train.jsonl"
TITLES = {name: row.title for name, row in ROWS.items()}
SAME = ("batch", "max_length", "dtype", "learning_rate", "beta", "lora_r", "lora_alpha", "seed", "threads")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--data",
        "--data_dir",
        nargs="+",
        default=[str(PACKAGED)],
        help=f"files of pairs, or folders with {', '.join(DATA_SETS)}; default: the packaged pairs",
    )
    made.add_argument("--cases", nargs="+", help="of the data sets found, these only")
    made.add_argument("--model", default="smollm2")
    made.add_argument("--pairs", type=int, help="first so many usable pairs of each data set; default: by data set")
    made.add_argument("--steps", type=int, help="no more steps than this")
    made.add_argument("--batch", type=int, help="pairs a step; default: by data set")
    made.add_argument("--max_length", type=int, help="default: by data set")
    made.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    made.add_argument("--limit_s", type=float, default=1800.0, help="seconds after which a row is stopped")
    made.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    made.add_argument("--learning_rate", type=float, default=5e-6)
    made.add_argument("--beta", type=float, default=0.1)
    made.add_argument("--lora_r", type=int, default=16)
    made.add_argument("--lora_alpha", type=float, default=32.0)
    made.add_argument("--seed", type=int, default=42)
    add_suite_options(made, rounds=2)
    return made


def make_job(name: str, path: Path, model_path: str, dtype: str, args: argparse.Namespace) -> Job:
    """The pairs of one data set, in whole steps.

    Raises:
        ValueError: there are not enough for two steps; the first is not timed.
    """
    known = DATA_SETS.get(name, OTHER)
    batch = args.batch or known.batch
    pairs = args.pairs or known.pairs
    steps = min(pairs // batch, args.steps or pairs)
    if steps < 2:
        raise ValueError(f"{name}: {pairs} pairs in steps of {batch} make {steps} steps; expected at least 2")
    max_length = args.max_length or known.max_length
    return Job(
        case=name,
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
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def measure(job: Job, only: Sequence[str], rounds: int, limit_s: float, *, here: bool = False) -> list[Record]:
    """Every row once a round, in an order that turns round; a row that gave nothing is not tried again.

    Args:
        here: all in this process, one after the other.
    """
    settings: Record = {name: getattr(job, name) for name in SAME}
    settings |= {"case": job.case, "pairs": len(job.pairs), "steps": job.steps, "rounds": rounds}
    settings |= {"data_sha256": job.sha256, "published_data": job.sha256 == DATA_SETS.get(job.case, OTHER).sha256}
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(job.model_path)
    records: list[Record] = []
    given_up: set[str] = set()
    for number in range(rounds):
        rate = 1e3 * gemm_tflops("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, job.dtype), size=1024)
        for name in only if number % 2 == 0 else reversed(only):
            if name in given_up:
                continue
            print(f"{job.case}, round {number + 1}: {TITLES[name]}", file=sys.stderr, flush=True)
            record = run_here(name, job) if here else run_row(name, job, limit_s)
            if record["status"] != "measured":
                print(record.get("tail", record["status"]), file=sys.stderr, flush=True)
                given_up.add(name)
            else:
                record |= utilisation(model_config, job, record, rate)
            records.append({"round": number, **settings, **record})
    return records


def utilisation(model_config: Any, job: Job, record: Record, rate: float) -> Record:
    """The arithmetic that a row's layout cannot do without (`flops.py`), and which part of the bare products' speed that comes to.

    Args:
        rate: GFLOP/s of a bare product in this round.
    """
    shared = record.get("layout") == "shared"
    needed = 1e-9 * model_flops(model_config, job.pairs, trainable=record["trainable_parameters"], shared=shared)
    found = {"gemm_gflop_per_s": round(rate, 1), "gflop_a_pair": round(needed / len(job.pairs), 2)}
    if record["pairs_per_s"]:
        found["share_of_gemm_speed"] = round(found["gflop_a_pair"] * record["pairs_per_s"] / rate, 3)
    return found


def report(job: Job, records: Sequence[Record]) -> tuple[str, bool]:
    """What to print of one data set, and whether its rows may be compared."""
    title = (
        f"{job.case}: {len(job.pairs)} pairs, {job.steps} steps of {job.batch} (the first not timed), max_length "
        f"{job.max_length}, LoRA r={job.lora_r}, {job.dtype}, {job.threads} threads"
    )
    wrong = disagreements(records)
    if wrong:
        return "\n".join([title, "no figures, for the rows do not agree:", *wrong]), False
    return f"{title}\n{speed_table(records, TITLES)}", True


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    machine = describe_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    kept: list[dict[str, Any]] = []
    status = 0
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
        try:
            jobs = smoke_jobs(args, Path(folder)) if args.smoke else data_jobs(args)
        except ValueError as error:
            made.error(str(error))
        try:
            for job in jobs:
                records = measure(job, args.only, 1 if args.smoke else rounds_of(args), args.limit_s, here=args.smoke)
                text, agree = report(job, records)
                print(f"{text}\n", flush=True)
                kept += [{"model": Path(args.model).name, **record} for record in records] if agree else []
                status = status if agree else 1
        finally:  # what was measured before somebody lost patience is kept
            if any(record["status"] == "measured" for record in kept):
                print(token_table(kept))
                save("steps", kept, args, machine)
    return status


def data_jobs(args: argparse.Namespace) -> list[Job]:
    """A job for each data set.

    Raises:
        ValueError: a place holds none, or not enough pairs.
    """
    from dpo_engine.model.loading import resolve_dtype, resolve_model

    found = find_data(args.data)
    missing = [name for name in args.cases or [] if name not in found]
    if missing:
        raise ValueError(f"--cases {' '.join(missing)}: not among what was found: {', '.join(found)}")
    model_path = str(resolve_model(args.model, progress=lambda line: print(line, file=sys.stderr)))
    dtype = str(resolve_dtype(args.dtype)).removeprefix("torch.")
    return [
        make_job(name, path, model_path, dtype, args)
        for name, path in found.items()
        if not args.cases or name in args.cases
    ]


def smoke_jobs(args: argparse.Namespace, folder: Path) -> list[Job]:
    """Two steps of two pairs on a tiny random model."""
    from benchmarks.smoke import tiny_model, tiny_pairs

    args.model = "tiny"
    return [
        Job(
            case="tiny",
            model_path=str(tiny_model(folder)),
            pairs=tiny_pairs(4),
            dtype="float32",
            batch=2,
            max_length=64,
            learning_rate=args.learning_rate,
            beta=args.beta,
            lora_r=4,
            lora_alpha=8.0,
            seed=args.seed,
            threads=args.threads,
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
