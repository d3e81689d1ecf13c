"""What do all suites have in common? Their options, where their records go, and when a time is too noisy to be quoted."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import describe_machine
from benchmarks.harness.results import RESULTS, write_results
from benchmarks.harness.timing import Timing

NOISY = 0.25  # of the median: a wider stretch from p20 to p80 says more of the machine than of the code


def add_suite_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """`--rounds`, `--threads`, `--smoke`, `--no_save` and `--folder`."""
    parser.add_argument("--rounds", type=int, help=f"timed rounds; default: {rounds}, and 2 with --smoke")
    parser.add_argument("--threads", type=int, default=describe_machine()["cores"])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds in all: does it run? Not saved")
    parser.add_argument("--no_save", action="store_true", help="print only")
    parser.add_argument("--folder", type=Path, help="where the result file goes; default: benchmarks/results")
    parser.set_defaults(usual_rounds=rounds)


def rounds_of(args: argparse.Namespace) -> int:
    """As asked for, else the suite's own."""
    return args.rounds if args.rounds is not None else 2 if args.smoke else args.usual_rounds


def save(
    suite: str, records: Iterable[Mapping[str, Any]], args: argparse.Namespace, machine: Mapping[str, Any]
) -> Path | None:
    """Write the records and say where; of a `--smoke` run only into a folder that was named."""
    records = list(records)
    if not records or args.no_save or (args.smoke and args.folder is None):
        return None
    path = write_results(suite, records, machine=machine, folder=args.folder or RESULTS)
    print(f"written to {path}")
    return path


def too_noisy(timing: Timing) -> str | None:
    """Why a ratio of this time is not to be printed; None where nothing is against it."""
    if len(timing.seconds) < 2:
        return "one round: how noisy it was is not known"
    spread = (timing.p80 - timing.p20) / timing.median
    return f"noisy: p20 to p80 is {spread:.0%} of the median" if spread > NOISY else None
