"""How much memory does one call take beyond its inputs and what it returns?

On a CPU: the peak resident set (`VmHWM`, reset before the call) of a fresh process, less what was resident before. On CUDA
the allocator's own peak, in the process that measures, after the library's workspaces are there. `extra_mb` takes the
returned tensors off the larger of the two peaks; what the engine keeps from forward to backward for a frozen head, (N, D),
counts as extra in backward, where the gradient is of that size too.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch

from benchmarks.harness import last_json, reset_peak_rss, rss_mb, run_watched
from benchmarks.ops.cases import CASES, Answer, Case, Problem, Score, Shape, backward, call, forward, make_problems
from benchmarks.ops.implementations import IMPLEMENTATIONS

MIB = 2**20


def in_fresh_process(
    name: str, case: Case, shape: Shape, threads: int, env: Mapping[str, str] | None = None
) -> dict[str, float]:
    """`probe` in a process of its own.

    Args:
        env: added to its environment.

    Raises:
        RuntimeError: the process failed.
    """
    asked = json.dumps({"name": name, "case": case.name, "shape": asdict(shape), "threads": threads})
    return last_json(run_watched([sys.executable, "-m", "benchmarks.ops.memory", asked], env=env).stdout)


def probe(name: str, case: Case, shape: Shape) -> dict[str, float]:
    """MiB of one call of an implementation, on a CPU."""
    entry = IMPLEMENTATIONS[name]
    score = entry.score(case, shape)
    [problem] = make_problems(shape, 1)
    given = entry.adapt(problem)
    small = replace(shape, rows=min(shape.rows, 32), vocabulary=min(shape.vocabulary, 512))
    # Code, threads and library state that any first call brings along; the compiler, where one is called for the shape.
    call(case, score, given if entry.compiles else entry.adapt(make_problems(small, 1)[0]))
    if entry.compiles:
        ctypes.CDLL(None).malloc_trim(0)  # or what that call freed would hide what the next one takes
    return phases(case, score, given, reset_peak_rss, lambda: rss_mb(), lambda: rss_mb(peak=True))


def on_cuda(case: Case, score: Score, problem: Problem) -> dict[str, float]:
    """MiB of one call on a GPU; it must have been called before."""
    torch.cuda.synchronize()
    return phases(
        case,
        score,
        problem,
        torch.cuda.reset_peak_memory_stats,
        lambda: torch.cuda.memory_allocated() / MIB,
        lambda: torch.cuda.max_memory_allocated() / MIB,
    )


def phases(
    case: Case,
    score: Score,
    problem: Problem,
    reset: Callable[[], object],
    now: Callable[[], float],
    peak: Callable[[], float],
) -> dict[str, float]:
    """Peaks of forward and backward, apart."""
    gc.collect()
    reset()
    before = now()
    pending = forward(case, score, problem)
    in_forward, kept = peak() - before, now() - before
    reset()
    answer: Answer = backward(pending)
    in_backward = peak() - before if pending.leaves else in_forward
    results = answer.nbytes / MIB
    return {
        "forward_mb": round(in_forward, 1),
        "kept_mb": round(kept, 1),
        "backward_mb": round(in_backward, 1),
        "results_mb": round(results, 1),
        "extra_mb": round(max(in_forward, in_backward) - results, 1),
    }


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    print(json.dumps(probe(asked["name"], CASES[asked["case"]], Shape(**asked["shape"]))))


if __name__ == "__main__":
    main()
