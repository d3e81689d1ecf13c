"""How fast does a Llama-3.1-8B-shaped model train with DPO on this card: the engine beside TRL, in one run?

    make gpu PART=train                                                both kinds of weights, in under six minutes
    make gpu PART=train GPU_ARGS='--lengths ultrafeedback --limit_s 90'        all of the time for one data set
    python -m benchmarks.gpu.train --weights nf4 --tiny                the same on two small layers, on a CPU

All rows train on the same random pairs (`pairs.py`), in the same order, in steps of as many pairs, on one model that is
built once (`model.py`). pairs/s is over the steps after the first; a reference that is precomputed stands beside. Rows must
start at ln 2 and at the same log-probs, or none of the group is printed. Peak memory is the allocator's, the model included.
Utilisation is model FLOPs (`steps/flops.py`) by the rate of a large product measured here, and by the datasheet's.

A row that does not fit its time reads "not measured", a package that is not there "n/a". Targets read "met" or "missed".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.model import WEIGHTS, llama_config, make_model
from benchmarks.gpu.pairs import LENGTHS, draw_pairs
from benchmarks.gpu.rows import ROWS, USUAL, Record, Settings, run_row
from benchmarks.gpu.tables import show
from benchmarks.ops.roofline import card_of
from benchmarks.steps.flops import gemm_tflops, model_flops
from benchmarks.steps.rows import missing_packages

LEAST_S = 5.0  # no row starts with less
TINY_SCALE = 8  # lengths are divided by it in a trial


def measure(
    groups: Sequence[str],
    rows: Sequence[str],
    run: Callable[[str, str, float], Record],
    *,
    limit_s: float,
    until: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Record]:
    """A record of every row of every group, in order; what finds no time is said to be not measured.

    Args:
        groups: names of `LENGTHS`.
        rows: names of `ROWS`.
        run: group, row and the time by `clock` at which it must be done -> its figures.
        limit_s: of one row.
        until: of all, by `clock`. A group gets its share of what is left.
    """
    for number, group in enumerate(groups):
        share = clock() + (until - clock()) / (len(groups) - number)
        for row in rows:
            left = min(share - clock(), limit_s)
            if left < LEAST_S:
                found: Record = {"status": "not measured: the time that was given is used up"}
            else:
                found = run(group, row, clock() + left)
            yield {"lengths": group, "implementation": row, **vars(ROWS[row]), **found}


def with_rates(record: Record, config: Any, pairs: list[Record], settings: Settings, peaks: Record) -> Record:
    """The record with tokens/s and utilisation beside pairs/s, of the timed pairs."""
    if record["status"] != "measured" or not record["pairs_per_s"]:
        return record
    timed, seconds = pairs[settings.step : settings.step * settings.steps], sum(record["step_seconds"])
    flops = model_flops(
        config, timed, trainable=record["trainable_parameters"], shared=record.get("layout") == "shared"
    )
    rates = {
        "computed_tokens_per_s": sum(record["step_tokens"][1:]) / seconds,
        "data_tokens_per_s": sum(len(ids) for pair in timed for ids in pair.values()) / seconds,
        "model_tflops_per_s": flops / seconds * 1e-12,
    }
    for name in ("measured", "published"):
        peak = peaks[f"{name}_peak_tflops"]
        rates[f"utilisation_of_{name}"] = rates["model_tflops_per_s"] / peak if peak else None
    return record | rates


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--weights", default="bf16", choices=list(WEIGHTS))
    made.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    made.add_argument("--rows", nargs="+", default=list(USUAL), choices=list(ROWS))
    made.add_argument("--step", type=int, default=16, help="pairs a step")
    made.add_argument("--steps", type=int, default=3, help="the first is not timed")
    made.add_argument("--max_length", type=int, default=1024)
    made.add_argument("--forest_tokens", type=int, help="max_tokens_per_forest of the engine; default: its own")
    made.add_argument("--limit_s", type=float, default=45.0, help="seconds of one row")
    made.add_argument("--budget_s", type=float, default=float("inf"), help="seconds of all rows")
    made.add_argument("--device", default=default_device, choices=["cuda", "cpu"])
    made.add_argument("--tiny", action="store_true", help="two small layers and short pairs, in float32 on a CPU")
    made.add_argument("--records", type=Path, help="add each record to this file at once")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.perf_counter()
    made = parser()
    args = made.parse_args(arguments)
    if args.steps < 2:
        made.error(f"--steps {args.steps}; expected at least 2, the first is not timed")
    settings = Settings(
        weights=args.weights,
        device=args.device,
        dtype=torch.bfloat16 if args.device == "cuda" else torch.float32,
        step=args.step,
        steps=args.steps,
        max_length=args.max_length // TINY_SCALE if args.tiny else args.max_length,
        forest_tokens=args.forest_tokens,
        limit_s=args.limit_s,
    )
    records: list[Record] = []
    for record in measured(settings, args.lengths, args.rows, tiny=args.tiny, until=begin + args.budget_s):
        records.append(record)
        if args.records:
            with args.records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
    print(show(records))
    return 1 if any(r["side"] == "engine" and r["status"].startswith("failed") for r in records) else 0


def measured(
    settings: Settings, lengths: Sequence[str], rows: Sequence[str], *, tiny: bool, until: float
) -> Iterator[Record]:
    """All records of one kind of weights, each as soon as it is there."""
    common = {
        "weights": settings.weights,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "pairs": settings.step * settings.steps,
        "pairs_per_step": settings.step,
        "max_length": settings.max_length,
        "tiny": tiny,
    }
    absent = missing_packages("bitsandbytes") if settings.weights == "nf4" else None
    if absent:
        for name in lengths:
            yield {**common, "lengths": name, "implementation": None, "side": None, "status": absent}
        return
    config = llama_config(tiny=tiny)
    pairs = {
        name: draw_pairs(
            LENGTHS[name],
            settings.step * settings.steps,
            vocabulary=config.vocab_size,
            max_length=settings.max_length,
            scale=1 / TINY_SCALE if tiny else 1.0,
        )
        for name in lengths
    }
    peaks = peak_rates(settings, tiny=tiny)
    _say(f"building the model, {settings.weights}")
    model = make_model(config, settings.weights, settings.device, settings.dtype)

    def run(group: str, row: str, row_until: float) -> Record:
        _say(f"{settings.weights}, {group}: {row}")
        return run_row(row, model, pairs[group], settings, row_until)

    for record in measure(lengths, rows, run, limit_s=settings.limit_s, until=until):
        yield {**common, **peaks, **with_rates(record, config, pairs[record["lengths"]], settings, peaks)}


def peak_rates(settings: Settings, *, tiny: bool) -> Record:
    """TFLOP/s of this device in the rows' dtype: of a large product, and by the datasheet where the card is known."""
    card = card_of(torch.cuda.get_device_name() if settings.device == "cuda" else None)
    return {
        "measured_peak_tflops": gemm_tflops(settings.device, settings.dtype, 128 if tiny else 8192),
        "published_peak_tflops": card.tflops if card else None,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
