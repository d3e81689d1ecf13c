"""Does the engine hold on this card, and how fast is it there? Every check that needs a GPU, in parts of under six minutes.

    make gpu                          every part, with the Python that $(PYTHON) names
    make gpu PART=correctness         the kernels' and the operator's tests on the card
    make gpu PART=ops                 the operator beside bare GEMMs and peers: benchmarks/ops/run.py
    make gpu PART=memory              QLoRA by length, within 12, 16 and 24 GB: benchmarks/gpu/memory.py
    make gpu PART=train               a Llama-3.1-8B-shaped model trained beside TRL: benchmarks/gpu/train.py
    make gpu PART=ops GPU_ARGS='--shapes 8192,4096,128256'      all of the time for one shape

Nothing is installed or fetched: torch, triton and pytest must be there; a peer that is not reads "n/a". Each part ends within its
time: a step gets its share of what is left, and what did not fit reads "not run" or "not measured". Results are JSON lines under
results/<card>/, and copies in $OUT where that is set. Exit status 1 if a check failed or did not fit, 2 without a CUDA device.

`--device cpu` runs the same steps on tiny shapes, to see that the script itself is in order; nothing is kept then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.harness import RESULTS, ROOT, describe_gpu, describe_machine, write_results

PART_S = 340.0  # of the six minutes: the rest is for starting and writing
LEAST_S = 5.0  # no step starts with less
SHAPES = ("8192,4096,128256", "8192,4096,151936", "8192,2304,256000", "8192,1024,151936", "16384,4096,128256")
TINY_SHAPES = ("64,32,1000",)
ENDINGS = {
    0: "passed",
    None: "timed out",
    5: "skipped",
}  # 5: pytest ran nothing, as where a file is for the interpreter
KERNEL_CASES = ("lse_forward_cases", "tile_pass_cases", "exp_epilogue_cases")  # those that run on a card too
PROBE = "import json, torch; print(json.dumps(torch.cuda.get_device_name() if torch.cuda.is_available() else None))"

Command = Callable[[float], list[str]]  # the seconds that it is given -> what to run
Runner = Callable[[Sequence[str], float, Mapping[str, str]], "Ended"]


@dataclass(frozen=True, kw_only=True)
class Step:
    name: str
    command: Command
    weight: float = 1.0  # its share of the time that is left


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    status: int | None  # None: it was stopped at its limit
    tail: tuple[str, ...]  # the last lines that it wrote


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the parts are asked to run on, and where their steps leave what they found."""

    device: str
    shapes: tuple[str, ...]
    folder: Path  # empty at the start of a part
    rest: tuple[str, ...] = ()  # arguments handed on to ops/run.py or train.py


# ---- the parts: a table ----


def correctness(job: Job) -> list[Step]:
    """The operator on the card, then the cases of each kernel that the interpreter runs elsewhere."""
    steps = [Step(name=name, command=_pytest(job, f"tests/support/{name}.py", name)) for name in KERNEL_CASES]
    operator = sorted(path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    return [*(Step(name=n, command=_pytest(job, f"tests/gpu/{n}.py", n), weight=3.0) for n in operator), *steps]


def _pytest(job: Job, path: str, name: str) -> Command:
    command = [sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--junitxml={job.folder / name}.xml"]
    return lambda seconds: command


def ops(job: Job) -> list[Step]:
    """One process a shape, so that a peer that ruins the device takes no other shape along."""

    def command(shape: str) -> Command:
        run = [sys.executable, "-m", "benchmarks.ops", "--device", job.device, "--shapes", shape]
        run += ["--cases", "frozen", "no_gradient", "trainable", "preference_loss", "--limit_s", "60"]
        run += ["--records", str(job.folder / "ops.jsonl"), *job.rest]
        return lambda seconds: [*run, "--budget_s", f"{max(1.0, 0.8 * seconds):.0f}"]

    return [
        Step(name=shape, command=command(shape), weight=2.0 if i == 0 else 1.0) for i, shape in enumerate(job.shapes)
    ]


def train(job: Job) -> list[Step]:
    """One process for each kind of weights, since both models need the card's memory; one for what Liger's kernels buy."""

    def command(weights: str, *more: str) -> Command:
        run = [sys.executable, "-m", "benchmarks.gpu.train", "--device", job.device, "--weights", weights]
        run += [
            "--records",
            str(job.folder / "train.jsonl"),
            *(["--tiny"] if job.device == "cpu" else []),
            *job.rest,
            *more,
        ]
        return lambda seconds: [*run, "--budget_s", f"{max(1.0, 0.85 * seconds):.0f}"]

    liger = command("nf4", "--lengths", "ultrafeedback", "--rows", "engine", "engine_liger")
    steps = [Step(name=weights, command=command(weights)) for weights in ("bf16", "nf4")]
    return [*steps, Step(name="liger", command=liger, weight=0.5)]


def memory(job: Job) -> list[Step]:
    """Each length on the card as it is; then, in processes of their own, what must fit a smaller one."""
    run = [sys.executable, "-m", "benchmarks.gpu.memory", "--device", job.device]
    run += ["--records", str(job.folder / "memory.jsonl"), *(["--tiny"] if job.device == "cpu" else []), *job.rest]

    def command(more: Sequence[str]) -> Command:
        return lambda seconds: [*run, *more, "--budget_s", f"{max(1.0, 0.85 * seconds):.0f}"]

    caps = [Step(name=f"within {cap} GB", command=command(["--cap", cap])) for cap in ("12", "16", "24")]
    return [Step(name="lengths", command=command([]), weight=4.0), *caps]


PARTS: dict[str, Callable[[Job], list[Step]]] = {
    "correctness": correctness,
    "ops": ops,
    "train": train,
    "memory": memory,
}


# ---- running a part ----


def run_part(
    steps: Sequence[Step],
    *,
    run: Runner,
    environment: Mapping[str, str],
    budget_s: float = PART_S,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Run steps one after the other within `budget_s` seconds in all.

    Returns:
        For each step its name, `status` ("passed", "failed", "skipped", "timed out" or "not run"), seconds and limit;
        the last lines that it wrote too, unless all is well.
    """
    end = clock() + budget_s
    outcomes = []
    for number, step in enumerate(steps):
        left = end - clock()
        limit = left * step.weight / sum(other.weight for other in steps[number:])
        if limit < LEAST_S:
            outcomes.append({"step": step.name, "status": "not run", "seconds": 0.0, "limit_s": round(limit, 1)})
            say(f"{step.name}: not run, the time of the part is used up")
            continue
        begin = clock()
        ended = run(step.command(limit), limit, environment)
        status = ENDINGS.get(ended.status, "failed")
        outcome = {
            "step": step.name,
            "status": status,
            "seconds": round(clock() - begin, 1),
            "limit_s": round(limit, 1),
        }
        if status != "passed":
            outcome["tail"] = list(ended.tail)
        outcomes.append(outcome)
        say(f"{step.name}: {status} in {outcome['seconds']:.0f} s (of {limit:.0f})")
    return outcomes


def run_process(command: Sequence[str], limit_s: float, environment: Mapping[str, str]) -> Ended:
    """Run a process with its output shown as it comes; past its limit it is stopped with all that it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=30)

    def copy() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip("\n"))
            print(line, end="", flush=True)

    copier = threading.Thread(target=copy, daemon=True)
    copier.start()
    try:
        status: int | None = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    copier.join(timeout=5)
    return Ended(status=status, tail=tuple(tail))


# ---- what was found ----


def gathered(part: str, outcomes: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The records of a part: one for each step, with its tests counted, and all that its scripts left."""
    records = []
    for outcome in outcomes:
        report = folder / f"{outcome['step']}.xml"
        records.append({"part": part, **outcome, **(tests_of(report) if report.exists() else {})})
    for left in sorted(folder.glob("*.jsonl")):
        for line in left.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):  # a process that was stopped may have been writing
                records.append({"part": part, **json.loads(line)})
    return records


def tests_of(report: Path) -> dict[str, Any]:
    """Counts of a JUnit report, and the names of what failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed, reasons = [], set()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        for skipped in case.iter("skipped"):
            reasons.add(skipped.get("message", ""))
    return {"tests": counts, "failures": failed, "skipped_because": sorted(reasons)}


def keep(
    part: str, records: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], folder: Path = RESULTS
) -> list[Path]:
    """Write the records, and a copy to $OUT where that is set; returns both paths."""
    paths = [write_results(f"gpu-{part}", records, machine=machine, folder=folder)]
    if os.environ.get("OUT"):
        paths.append(Path(os.environ["OUT"]) / f"{paths[0].parent.name}-{paths[0].name}")
        shutil.copy(paths[0], paths[1])
    print(f"written to {' and '.join(map(str, paths))}")
    return paths


def went_wrong(records: Sequence[Mapping[str, Any]], *, on_gpu: bool) -> list[str]:
    """Steps that failed or did not fit; on a card also those in which nothing ran, since that proves nothing."""
    good = ("passed",) if on_gpu else ("passed", "skipped")
    return [f"{record['step']} {record['status']}" for record in records if record["status"] not in good]


def summary(part: str, records: Sequence[Mapping[str, Any]], *, on_gpu: bool) -> str:
    """One line for a part."""
    steps = [record for record in records if "step" in record]
    tests = [record["tests"] for record in steps if "tests" in record]
    counts = ", ".join(f"{sum(t[kind] for t in tests)} {kind}" for kind in ("passed", "failed", "skipped"))
    bad = went_wrong(steps, on_gpu=on_gpu)
    line = f"{part}: " + ("; ".join(bad) if bad else f"{len(steps)} steps, none failed")
    return f"{line}; tests: {counts}" if tests else line


# ---- the command ----


def missing(device: str, run: Callable[..., Any] = subprocess.run) -> tuple[str | None, str | None]:
    """`(the card's name, None)`, or `(None, what is missing)` in one line."""
    done = run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return None, f"{sys.executable} cannot ask torch for a GPU: {last}"
    name = json.loads(done.stdout.strip().splitlines()[-1])
    if device == "cuda" and name is None:
        return (
            None,
            f"torch of {sys.executable} sees no CUDA device; run this on a machine with an NVIDIA GPU and its driver",
        )
    for package in ("pytest", "triton"):
        if run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True).returncode:
            return None, f"{package} is not installed for {sys.executable}; this command installs nothing"
    return name, None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--shapes", nargs="+", help="N,D,V of the part ops")
    parser.add_argument("--part_s", type=float, default=PART_S, help="seconds for each part")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a trial of this script")
    args, rest = parser.parse_known_args(arguments)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        print(f"gpu: no part {', '.join(unknown)}; expected {' or '.join(PARTS)}", file=sys.stderr)
        return 2
    name, fault = missing(args.device)
    if fault:
        print(f"gpu: {fault}", file=sys.stderr)
        return 2
    on_gpu = args.device == "cuda"
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    environment |= {"PYTHONUNBUFFERED": "1", "DPO_ENGINE_TEST_DEVICE": args.device}
    machine = describe_machine(name if on_gpu else None)
    status = 0
    for part in args.parts:
        with tempfile.TemporaryDirectory(prefix="dpo-gpu-") as folder:
            shapes = tuple(args.shapes or (SHAPES if on_gpu else TINY_SHAPES))
            job = Job(device=args.device, shapes=shapes, folder=Path(folder), rest=tuple(rest))
            outcomes = run_part(PARTS[part](job), run=run_process, environment=environment, budget_s=args.part_s)
            records = gathered(part, outcomes, Path(folder))
        print(summary(part, records, on_gpu=on_gpu))
        if on_gpu:
            keep(part, records, {**machine, "gpu_after": describe_gpu()})
        if went_wrong(outcomes, on_gpu=on_gpu):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
