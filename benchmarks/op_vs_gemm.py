"""What does the operator cost beside the two matrix products it cannot do without?

    python benchmarks/op_vs_gemm.py                       N=2048, D=576, V=49152, float32 and bfloat16
    python benchmarks/op_vs_gemm.py --rows 512 --dtype float32 --rounds 3

Forward and backward of `linear_logps` with a frozen head, against bare GEMMs `hidden @ W.T` and `(N, V) @ W` into memory
that is there already, and against the plain definition, which builds the logits. All in one process, taking turns;
several sets of random inputs, never zeros. Errors are against float64 from the same rounded inputs. Memory is measured
in a fresh process for each path: the peak resident set (`VmHWM`, reset before the call) less what was resident before
the call and less the (N, D) gradient; on a GPU, the allocator's own peak.

On a CPU without bfloat16 instructions a bfloat16 GEMM is 10 to 80 times slower than a float32 one. There, what multiplies
in bfloat16 (the bare GEMMs and the definition) is measured at `--slow_rows` rows instead, the operator at both sizes,
and two float32 GEMMs stand beside: they are the floor of the operator, which multiplies in float32 on such a machine.
Nothing is scaled from one size to another.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    ROOT,
    Timing,
    describe_machine,
    last_json,
    reset_peak_rss,
    rss_mb,
    run_watched,
    table,
    time_alternating,
    write_results,
)
from torch import Tensor

sys.path.insert(0, str(ROOT))

from dpo_engine import linear_logps
from dpo_engine.ops.tiled import cpu_multiplies_bfloat16

ENGINE, DEFINITION, GEMMS, FLOAT32_GEMMS = "linear_logps", "definition", "two GEMMs", "two float32 GEMMs"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int
    vocabulary: int
    dtype: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def gemm_gflop(self) -> float:
        """Operations of the two products together."""
        return 4e-9 * self.rows * self.hidden * self.vocabulary


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D), frozen
    labels: Tensor  # (N,)
    upstream: Tensor  # (N,), a tenth of it zero


def make_inputs(shape: Shape, seed: int) -> Inputs:
    """Logits of standard deviation 4, as of a language model; upstream gradients that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    upstream = normal(shape.rows)
    upstream[::10] = 0
    weight = normal(shape.vocabulary, shape.hidden).mul_(4 / shape.hidden**0.5)
    labels = torch.randint(shape.vocabulary, (shape.rows,), generator=generator)
    hidden = normal(shape.rows, shape.hidden)
    return Inputs(
        hidden=hidden.to(shape.device, shape.torch_dtype),
        weight=weight.to(shape.device, shape.torch_dtype),
        labels=labels.to(shape.device),
        upstream=upstream.to(shape.device),
    )


# ---- the paths ----


def forward_backward(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    """`(logps (N,), d_hidden (N, D))` by one backend of the operator."""
    hidden = inputs.hidden.detach().requires_grad_()
    logps = linear_logps(hidden, inputs.weight, inputs.labels, backend=backend)
    (grad,) = torch.autograd.grad(logps, hidden, inputs.upstream.to(logps.dtype))
    return logps.detach(), grad


def bare_gemms(inputs: list[Inputs], dtype: torch.dtype) -> Callable[[int], object]:
    """`hidden @ W.T`, then its result times `W`: all memory is allocated here, before any clock runs."""
    copies = [(one.hidden.to(dtype), one.weight.to(dtype)) for one in inputs]
    hidden, weight = copies[0]
    logits = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
    product = torch.empty_like(hidden)

    def run(number: int) -> None:
        hidden, weight = copies[number % len(copies)]
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=product)

    return run


def errors(inputs: Inputs, backend: str) -> dict[str, float]:
    """Largest error of a log-prob (nats) and relative L2 error of the gradient, against float64 from the same inputs."""
    logps, grad = forward_backward(inputs, backend)
    worst, off, size = 0.0, 0.0, 0.0
    weight = inputs.weight.double()
    for rows in torch.arange(len(inputs.hidden), device=inputs.hidden.device).split(128):
        exact = Inputs(inputs.hidden[rows].double(), weight, inputs.labels[rows], inputs.upstream[rows].double())
        exact_logps, exact_grad = forward_backward(exact, "reference")
        worst = max(worst, float((logps[rows] - exact_logps).abs().max()))
        off += float((grad[rows].double() - exact_grad).square().sum())
        size += float(exact_grad.square().sum())
    return {"max_logp_error_nats": worst, "relative_grad_error": (off / size) ** 0.5}


# ---- memory, in a process of its own ----


def probe_memory(shape: Shape, backend: str) -> dict[str, float]:
    """MiB that one forward and backward takes at its peak, beyond inputs and the (N, D) gradient."""
    inputs = make_inputs(shape, seed=0)
    small = slice(0, 16)
    few = Inputs(inputs.hidden[small], inputs.weight[:256], inputs.labels[small] % 256, inputs.upstream[small])
    forward_backward(few, backend)  # code, threads and library state that any first call brings along
    gc.collect()
    if shape.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        forward_backward(inputs, backend)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        reset_peak_rss()
        before = rss_mb()
        forward_backward(inputs, backend)
        peak = rss_mb(peak=True)
    gradient = inputs.hidden.numel() * inputs.hidden.element_size() / 2**20
    return {"extra_mb": round(peak - before - gradient, 1), "gradient_mb": round(gradient, 1)}


def extra_memory(shape: Shape, backend: str, threads: int) -> dict[str, float]:
    """`probe_memory` in a fresh process."""
    asked = json.dumps({**asdict(shape), "backend": backend, "threads": threads})
    done = run_watched([sys.executable, str(Path(__file__).resolve()), "--probe_memory", asked])
    return last_json(done.stdout)


# ---- one shape ----


def measure(shape: Shape, args: argparse.Namespace, *, multiplies_dtype: bool) -> list[dict[str, Any]]:
    """Records of one shape. Without `multiplies_dtype`, what would multiply in a dtype this CPU lacks is left out."""
    inputs = [make_inputs(shape, seed) for seed in range(args.sets)]
    cases: dict[str, Callable[[int], object]] = {}
    if multiplies_dtype:
        cases[GEMMS] = bare_gemms(inputs, shape.torch_dtype)
    if shape.dtype != "float32":
        cases[FLOAT32_GEMMS] = bare_gemms(inputs, torch.float32)
    cases[ENGINE] = lambda number: forward_backward(inputs[number % len(inputs)], args.backend)
    if multiplies_dtype:
        cases[DEFINITION] = lambda number: forward_backward(inputs[number % len(inputs)], "reference")
    is_slow = shape.dtype == "bfloat16" and shape.device == "cpu" and not cpu_multiplies_bfloat16()
    rounds = args.slow_rounds if is_slow and multiplies_dtype else args.rounds
    timings = time_alternating(
        cases,
        rounds=rounds,
        synchronize=torch.cuda.synchronize if shape.device == "cuda" else lambda: None,
    )
    records = [_record(name, shape, timings, args) for name in cases]
    cases.clear()  # and the (N, V) memory of the bare GEMMs with them
    for record in records:
        backend = {ENGINE: args.backend, DEFINITION: "reference"}.get(record["case"])
        if backend:
            record |= errors(inputs[0], backend)
            record |= extra_memory(shape, backend, args.threads)
    return records


def _record(name: str, shape: Shape, timings: dict[str, Timing], args: argparse.Namespace) -> dict[str, Any]:
    timing = timings[name]
    record: dict[str, Any] = {
        "case": name,
        **asdict(shape),
        "threads": args.threads,
        "backend": args.backend if name == ENGINE else None,
        "rounds": len(timing.seconds),
        "input_sets": args.sets,
        "median_ms": round(1e3 * timing.median, 2),
        "p20_ms": round(1e3 * timing.p20, 2),
        "p80_ms": round(1e3 * timing.p80, 2),
        "gflop_per_s": round(shape.gemm_gflop / timing.median, 1),
    }
    for floor, key in ((GEMMS, "over_two_gemms"), (FLOAT32_GEMMS, "over_two_float32_gemms")):
        if floor in timings and floor != name:
            ratio = timing.over(timings[floor])
            record[key] = {"median": round(ratio.median, 3), "p20": round(ratio.p20, 3), "p80": round(ratio.p80, 3)}
    return record


def show(records: list[dict[str, Any]]) -> str:
    """The table a person reads."""

    def ratio(record: dict[str, Any], key: str) -> str:
        return f"{record[key]['median']:.2f}" if key in record else ("" if "GEMMs" in record["case"] else NOT_MEASURED)

    def number(record: dict[str, Any], key: str, form: str) -> str:
        return form.format(record[key]) if key in record else ""

    header = ["path", "N", "dtype", "median ms", "p20-p80", "/ 2 GEMMs", "/ 2 fp32 GEMMs", "GFLOP/s"]
    header += ["logp error", "grad error", "extra MiB"]
    rows = [
        (
            record["case"],
            str(record["rows"]),
            "float32" if record["case"] == FLOAT32_GEMMS else record["dtype"],
            f"{record['median_ms']:.1f}",
            f"{record['p20_ms']:.1f}-{record['p80_ms']:.1f}",
            ratio(record, "over_two_gemms"),
            ratio(record, "over_two_float32_gemms") if record["dtype"] != "float32" else "",
            f"{record['gflop_per_s']:.0f}",
            number(record, "max_logp_error_nats", "{:.1e}"),
            number(record, "relative_grad_error", "{:.1e}"),
            number(record, "extra_mb", "{:.1f}"),
        )
        for record in records
    ]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="N")
    parser.add_argument("--hidden", type=int, default=576, help="D")
    parser.add_argument("--vocabulary", type=int, default=49152, help="V")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--slow_rows", type=int, default=128, help="N where bfloat16 GEMMs have no instructions")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow_rounds", type=int, default=3, help="rounds where bfloat16 GEMMs have no instructions")
    parser.add_argument("--sets", type=int, default=3, help="sets of random inputs, taken in turn")
    parser.add_argument("--threads", type=int, default=describe_machine()["cores"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="backend of linear_logps")
    parser.add_argument("--no_save", action="store_true", help="print only")
    parser.add_argument("--probe_memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe_memory:
        asked = json.loads(args.probe_memory)
        torch.set_num_threads(asked.pop("threads"))
        backend = asked.pop("backend")
        print(json.dumps(probe_memory(Shape(**asked), backend)))
        return

    torch.set_num_threads(args.threads)
    machine = describe_machine(torch.cuda.get_device_name() if args.device == "cuda" else None)
    records: list[dict[str, Any]] = []
    for dtype in args.dtype:
        shape = Shape(args.rows, args.hidden, args.vocabulary, dtype, args.device)
        lacks_dtype = args.device == "cpu" and dtype == "bfloat16" and not cpu_multiplies_bfloat16()
        if lacks_dtype:
            records += measure(
                Shape(args.slow_rows, args.hidden, args.vocabulary, dtype, args.device), args, multiplies_dtype=True
            )
        records += measure(shape, args, multiplies_dtype=not lacks_dtype)
    print(
        f"D={args.hidden}, V={args.vocabulary}, frozen head, forward and backward, {args.threads} threads, {machine['cpu']}"
    )
    print(show(records))
    if any(record["rows"] == args.slow_rows for record in records):
        print(f"This CPU has no bfloat16 instructions: bfloat16 GEMMs were measured at N={args.slow_rows} only.")
    if not args.no_save:
        print(f"written to {write_results('op_vs_gemm', records, machine=machine)}")


if __name__ == "__main__":
    main()
