"""What does each implementation of the operator cost beside the matrix products it cannot do without?

    python -m benchmarks.ops                                       every case, shape, dtype and implementation
    python -m benchmarks.ops --cases frozen --shapes 2048,576,49152 --dtype float32 --rounds 3
    python -m benchmarks.ops --only 'engine tiled' naive trl --no_save

Cases and floors: `cases.py`. Implementations: `implementations.py`. Errors stand beside the times (`errors.py`), and
so does memory (`memory.py`). All implementations of a case take turns in one process, in an order that is reversed every
other round; the floor is one of them, and ratios to it are taken round by round. Inputs are random, several sets in turn.

An implementation that cannot do a case reads "n/a: why", one that raises "failed: why", one whose call takes longer than
`--limit_s` "not measured: why". Nothing is scaled, and nothing is estimated in a figure's place.

A bfloat16 product on a CPU without bfloat16 instructions is 10 to 80 times slower than a float32 one. There, what multiplies in
bfloat16 (the floor and every peer) is measured at `--slow_rows` rows instead, the engine at both, and the same products in
float32 stand beside: they are the engine's floor, which multiplies in float32 on such a machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    RESULTS,
    Neighbours,
    Timing,
    describe_machine,
    exit_on_sigterm,
    first_calls,
    one_line,
    table,
    time_alternating,
    write_results,
)
from benchmarks.ops.cases import CASES, Case, Problem, Score, Shape, bare_gemms, call, make_problems
from benchmarks.ops.errors import Truth, errors, truth
from benchmarks.ops.implementations import IMPLEMENTATIONS, NotAvailable, peer_errors
from benchmarks.ops.memory import in_fresh_process, on_cuda
from benchmarks.ops.roofline import card_of, roofline

FLOOR, FLOAT32_FLOOR = "floor", "float32 floor"
SHAPES = {
    "cpu": [(2048, 576, 49152), (512, 2048, 128256)],
    "cuda": [
        (8192, 4096, 128256),
        (8192, 4096, 151936),
        (8192, 2304, 256000),
        (8192, 1024, 151936),
        (16384, 4096, 128256),
    ],
}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
ROUNDS = {"cpu": 4, "cuda": 15}
SMOKE = {"shapes": [(64, 64, 1000)], "dtype": ["float32"], "rounds": 2, "sets": 2, "no_memory": True, "slow_rows": 0}
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a case is measured, whatever its shape."""

    cases: tuple[str, ...]
    only: tuple[str, ...]
    rounds: int
    sets: int
    threads: int
    limit_s: float  # of one call
    until: float  # by `clock`: no case and no round starts after this; the cases of a shape share what is left
    with_errors: bool
    with_memory: bool
    clock: Callable[[], float] = time.perf_counter
    watch: bool = True  # whether rounds that others disturbed are taken again


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """An implementation that is there for a case, and its own form of each set of inputs."""

    score: Score
    problems: list[Problem]


def measure_shape(shape: Shape, settings: Settings, *, emulated: bool, slow: bool) -> Iterator[Record]:
    """Records of one shape, case by case.

    Args:
        emulated: this machine has no instructions for the dtype.
        slow: measure what multiplies in that dtype nevertheless.
    """
    problems: list[Problem] = []
    exact: Truth | None = None
    for number, name in enumerate(settings.cases):
        if settings.clock() > settings.until:
            reason = "not measured: the time that was given is used up"
            yield from (_record(shape, name, other, {"status": reason}) for other in (FLOOR, *settings.only))
            continue
        problems = problems or make_problems(shape, settings.sets)
        if settings.with_errors and exact is None:
            exact = truth(problems[0])
        begin = settings.clock()
        share = replace(settings, until=begin + (settings.until - begin) / (len(settings.cases) - number))
        yield from measure_case(CASES[name], shape, problems, exact, share, emulated=emulated, slow=slow)


def measure_case(
    case: Case,
    shape: Shape,
    problems: list[Problem],
    exact: Truth | None,
    settings: Settings,
    *,
    emulated: bool = False,
    slow: bool = True,
) -> list[Record]:
    """A record for the floor and one for every implementation, measured or not."""
    on_gpu = shape.device == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    entrants, found = enter(case, shape, problems, settings.only, emulated=emulated and not slow)
    runs: dict[str, Callable[[int], object]] = {}
    if slow or not emulated:
        runs[FLOOR] = bare_gemms(case, problems, shape.torch_dtype)
    if emulated:
        runs[FLOAT32_FLOOR] = bare_gemms(case, problems, torch.float32)
    firsts = dict(runs)
    for name, entrant in entrants.items():
        runs[name] = _turns(case, entrant)
        firsts[name] = _examined(case, entrant, problems[0], exact, found[name])
    _say(f"{case.name}, {shape}: first calls of {', '.join(runs)}")
    dropped = first_calls(
        firsts, limit_s=settings.limit_s, catch=peer_errors(), clock=settings.clock, synchronize=synchronize
    )
    for name, why in dropped.items():
        found.setdefault(name, {})["status"] = why
        del runs[name]
    _say(f"{case.name}, {shape}: {settings.rounds} rounds")
    neighbours = Neighbours(repeats=settings.rounds)
    timings = time_alternating(
        runs,
        rounds=settings.rounds,
        warmup=1 if on_gpu else 0,  # the first calls were one, but for clocks that rise
        until=settings.until,
        clock=settings.clock,
        synchronize=synchronize,
        neighbours=neighbours if settings.watch else None,
    )
    for name, timing in timings.items():
        figures = found.setdefault(name, {})
        figures.update(_figures(case, shape, timing, timings, name))
        reasons = (figures.get("errors", {}).get("wrong"), neighbours.why, figures.pop("noisy", None))
        figures["unquotable"] = next((why for why in reasons if why), None)
    runs.clear()
    firsts.clear()  # and with them the floor's (N, V) memory
    card = card_of(torch.cuda.get_device_name() if on_gpu else None)
    for name, entrant in entrants.items():
        if settings.with_memory and name in timings:
            _say(f"{case.name}, {shape}: memory of {name}")
            found[name]["memory"] = _memory(name, case, shape, entrant, settings)
    line = {"roofline": roofline(case, shape, card)} if card else {}
    common = {**line, "threads": settings.threads, "input_sets": len(problems)}
    common |= {"others_share": neighbours.shares, "rounds_repeated": neighbours.repeated}
    return [_record(shape, case.name, name, {**common, **figures}) for name, figures in _in_order(found)]


def enter(
    case: Case, shape: Shape, problems: list[Problem], only: Sequence[str], *, emulated: bool
) -> tuple[dict[str, Entrant], dict[str, Record]]:
    """Who takes part, and what is to be said of each, those who do not included."""
    entrants, found = {}, {}
    for name in only:
        entry = IMPLEMENTATIONS[name]
        found[name] = {"note": entry.note} if entry.note else {}
        try:
            score = entry.score(case, shape)
            if emulated and entry.multiplies_given_dtype:
                found[name]["status"] = f"not measured: multiplies in {shape.dtype}, which this CPU emulates"
                continue
            entrants[name] = Entrant(score=score, problems=[entry.adapt(problem) for problem in problems])
        except NotAvailable as why:
            found[name]["status"] = f"n/a: {why}"
        except peer_errors() as error:
            found[name]["status"] = f"failed: {one_line(error)}"
    return entrants, found


def _turns(case: Case, entrant: Entrant) -> Callable[[int], object]:
    return lambda number: call(case, entrant.score, entrant.problems[number % len(entrant.problems)])


def _examined(
    case: Case, entrant: Entrant, problem: Problem, exact: Truth | None, found: Record
) -> Callable[[int], object]:
    """The first call, whose answer is compared with the truth."""

    def run(_: int) -> None:
        answer = call(case, entrant.score, entrant.problems[0])
        if exact is not None:
            found["errors"] = errors(case, answer, entrant.problems[0], problem, exact)

    return run


def _figures(case: Case, shape: Shape, timing: Timing, timings: dict[str, Timing], name: str) -> Record:
    figures: Record = {
        "status": "measured",
        "rounds": len(timing.seconds),
        "median_ms": round(1e3 * timing.median, 3),
        "p20_ms": round(1e3 * timing.p20, 3),
        "p80_ms": round(1e3 * timing.p80, 3),
        "floor_gemms": len(case.gemms),
        "floor_gflop_per_s": round(len(case.gemms) * shape.gemm_flop / timing.median * 1e-9, 1),
    }
    for floor, key in ((FLOOR, "over_floor"), (FLOAT32_FLOOR, "over_float32_floor")):
        if floor in timings and floor != name:
            ratio = timing.over(timings[floor])
            figures[key] = {"median": round(ratio.median, 3), "p20": round(ratio.p20, 3), "p80": round(ratio.p80, 3)}
            if ratio.why:
                figures["noisy"] = ratio.why
    return figures


def _memory(name: str, case: Case, shape: Shape, entrant: Entrant, settings: Settings) -> Record:
    if shape.device == "cuda":
        return on_cuda(case, entrant.score, entrant.problems[0])
    try:
        return in_fresh_process(name, case, shape, settings.threads)
    except RuntimeError as error:
        return {"status": f"failed: {one_line(error)}"}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _in_order(found: dict[str, Record]) -> list[tuple[str, Record]]:
    """Floors first."""
    return sorted(found.items(), key=lambda item: item[0] not in (FLOOR, FLOAT32_FLOOR))


def _record(shape: Shape, case: str, name: str, figures: Record) -> Record:
    return {"case": case, "implementation": name, **asdict(shape), "rounds": 0, "unquotable": None, **figures}


# ---- what a person reads ----


def show(records: list[Record]) -> str:
    """A table for every case and shape."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = tuple(record[name] for name in ("case", "rows", "hidden", "vocabulary", "dtype"))
        groups.setdefault(key, []).append(record)
    return "\n\n".join(_group(group) for group in groups.values())


def _group(records: list[Record]) -> str:
    first = records[0]
    title = "{case}: N={rows}, D={hidden}, V={vocabulary}, {dtype}, {device}".format(**first)
    title += f"; floor: {len(CASES[first['case']].gemms)} GEMMs"
    lines = [title]
    if "roofline" in first:
        times = ", ".join(f"{k[:-3]} {v:.3f} ms" for k, v in first["roofline"].items() if k.endswith("_ms"))
        lines.append(f"roofline: {times}; bound by {first['roofline']['bound']}")
    header = ["implementation", "median ms", "p20-p80", "/ floor", "/ fp32 floor", "logp max", "/ bound"]
    header += ["loss", "d_hidden", "d_weight", "extra MiB"]
    rows = [_row(record) for record in records if record["status"] == "measured"]
    if rows:
        lines.append(table(header, rows))
    refused: dict[str, list[str]] = {}
    for record in records:
        if record.get("unquotable"):
            refused.setdefault(record["unquotable"], []).append(record["implementation"])
    lines += [f"no ratio for {', '.join(names)}: {why}" for why, names in refused.items()]
    others: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "measured":
            others.setdefault(record["status"], []).append(record["implementation"])
    lines += [f"{', '.join(names)}: {status}" for status, names in others.items()]
    lines += [f"{r['implementation']}: {r['note']}" for r in records if "note" in r and r["status"] == "measured"]
    return "\n".join(lines)


def _row(record: Record) -> tuple[str, ...]:
    found, memory = record.get("errors", {}), record.get("memory", {})

    def figure(value: Any, form: str) -> str:
        return format(value, form) if isinstance(value, float) else "" if value is None else str(value)

    def ratio(key: str) -> str:
        if key in record and record.get("unquotable"):
            return "-"
        return figure(record.get(key, {}).get("median"), ".2f")

    return (
        record["implementation"],
        f"{record['median_ms']:.1f}",
        f"{record['p20_ms']:.1f}-{record['p80_ms']:.1f}",
        *(ratio(key) for key in ("over_floor", "over_float32_floor")),
        figure(found.get("logp_max"), ".1e"),
        figure(found.get("logp_over_bound"), ".2g")
        + (" WRONG" if found.get("wrong") else " far" if found.get("far") else ""),
        figure(found.get("loss"), ".1e"),
        figure(found.get("d_hidden"), ".1e"),
        figure(found.get("d_weight"), ".1e"),
        figure(memory.get("extra_mb", "failed" if "status" in memory else None), ".1f"),
    )


# ---- the command ----


def parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected N,D,V such as 2048,576,49152")
    rows, hidden, vocabulary = map(int, parts)
    return rows, hidden, vocabulary


def parser() -> argparse.ArgumentParser:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    made.add_argument("--only", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    made.add_argument("--shapes", nargs="+", type=parse_shape, help="N,D,V; default: those of the device")
    made.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"])
    made.add_argument("--device", default=default_device, choices=["cpu", "cuda"])
    made.add_argument("--rounds", type=int, help="default: 4 on a CPU, 15 on a GPU")
    made.add_argument("--sets", type=int, default=3, help="sets of random inputs, taken in turn")
    made.add_argument("--slow_rows", type=int, default=16, help="N where the dtype is emulated; 0: leave that out")
    made.add_argument("--threads", type=int, default=describe_machine()["cores"])
    made.add_argument("--limit_s", type=float, default=120.0, help="seconds above which a call is not repeated")
    made.add_argument("--budget_s", type=float, default=float("inf"), help="seconds after which no case starts")
    made.add_argument("--no_errors", action="store_true")
    made.add_argument("--no_memory", action="store_true", help="spares a process for every figure")
    made.add_argument("--no_save", action="store_true", help="print only")
    made.add_argument(
        "--smoke", action="store_true", help="a tiny shape, without what compiles, in seconds; saved in --folder only"
    )
    made.add_argument("--folder", type=Path, help="of result files; default: benchmarks/results")
    made.add_argument("--records", type=Path, help="add each record to this file at once, and write no result file")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.smoke:
        for name, value in SMOKE.items():
            setattr(args, name, value)
        args.only = [name for name in args.only if not IMPLEMENTATIONS[name].compiles]
    torch.set_num_threads(args.threads)
    machine = describe_machine(torch.cuda.get_device_name() if args.device == "cuda" else None)
    settings = Settings(
        cases=tuple(args.cases),
        only=tuple(args.only),
        rounds=args.rounds or ROUNDS[args.device],
        sets=args.sets,
        threads=args.threads,
        limit_s=args.limit_s,
        until=time.perf_counter() + args.budget_s,
        with_errors=not args.no_errors,
        with_memory=not args.no_memory,
    )
    records: list[Record] = []
    try:
        with exit_on_sigterm():
            for shape, emulated, slow in runs(args, has_bfloat16=machine["cpu_bf16_instructions"]):
                for record in measure_shape(shape, settings, emulated=emulated, slow=slow):
                    records.append(record)
                    if args.records:
                        with args.records.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(record, allow_nan=False) + "\n")
    finally:  # what was measured before somebody lost patience is kept
        print(show(records))
        if records and not args.no_save and not args.records and (args.folder or not args.smoke):
            print(f"written to {write_results('ops', records, machine=machine, folder=args.folder or RESULTS)}")
    wrong = [r for r in records if r["implementation"].startswith("engine") and r.get("errors", {}).get("wrong")]
    return 1 if wrong else 0


def runs(args: argparse.Namespace, *, has_bfloat16: bool) -> Iterator[tuple[Shape, bool, bool]]:
    """`(shape, whether its dtype is emulated, whether what multiplies in it is measured nevertheless)`."""
    for rows, hidden, vocabulary in args.shapes or SHAPES[args.device]:
        for dtype in args.dtype or DTYPES[args.device]:
            shape = Shape(rows=rows, hidden=hidden, vocabulary=vocabulary, dtype=dtype, device=args.device)
            emulated = args.device == "cpu" and dtype == "bfloat16" and not has_bfloat16
            yield shape, emulated, not emulated
            if emulated and args.slow_rows:
                yield replace(shape, rows=args.slow_rows), True, True


if __name__ == "__main__":
    sys.exit(main())
