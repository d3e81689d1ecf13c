"""What do all suites have in common? Their options, and where their records go."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import describe_machine
from benchmarks.harness.results import RESULTS, write_results


def add_suite_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """`--rounds`, `--threads`, `--smoke`, `--no_save` and `--folder`."""
    parser.add_argument("--rounds", type=int, help=f"timed rounds; default: {rounds}, and 2 with --smoke")
    parser.add_argument("--threads", type=int, default=describe_machine()["cores"], help="default: a thread a core")
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
