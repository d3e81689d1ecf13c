"""How is a figure taken and kept? Alternating timing, the peak memory of a process, and JSON lines that are never overwritten.

Nothing here imports torch, so that a benchmark's parent process stays small.
"""

from benchmarks.harness.machine import (
    COMMIT_VARIABLE,
    PACKAGES,
    ROOT,
    commit,
    describe_gpu,
    describe_machine,
    machine_name,
)
from benchmarks.harness.neighbours import Neighbours
from benchmarks.harness.process import (
    Finished,
    OverLimit,
    exit_on_sigterm,
    last_json,
    reset_peak_rss,
    rss_mb,
    run_watched,
)
from benchmarks.harness.results import RESULTS, SCHEMA, write_results
from benchmarks.harness.suite import add_suite_options, rounds_of, save
from benchmarks.harness.tables import table
from benchmarks.harness.timing import SPREAD, Timing, first_calls, one_line, quantile, time_alternating

__all__ = [
    "COMMIT_VARIABLE",
    "PACKAGES",
    "RESULTS",
    "ROOT",
    "SCHEMA",
    "SPREAD",
    "Finished",
    "Neighbours",
    "OverLimit",
    "Timing",
    "add_suite_options",
    "commit",
    "describe_gpu",
    "describe_machine",
    "exit_on_sigterm",
    "first_calls",
    "last_json",
    "machine_name",
    "one_line",
    "quantile",
    "reset_peak_rss",
    "rounds_of",
    "rss_mb",
    "run_watched",
    "save",
    "table",
    "time_alternating",
    "write_results",
]
