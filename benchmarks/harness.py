"""How is a figure taken and kept? Alternating timing, the peak memory of a process, and JSON lines that are never overwritten.

Nothing here imports torch, so that a benchmark's parent process stays small.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "liger-kernel",
    "cut-cross-entropy",
)
COMMIT_VARIABLE = "DPO_ENGINE_COMMIT"  # says which commit it is where the files came without their history
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "avx10_1", "bf16")  # x86, x86, x86, Arm


# ---- time ----


@dataclass(frozen=True)
class Timing:
    """Seconds of one case, a number a round, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return quantile(self.seconds, 0.5)

    @property
    def p20(self) -> float:
        return quantile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.seconds, 0.8)

    def over(self, floor: Timing) -> Timing:
        """This time as a multiple of `floor`, round by round: what slowed a whole round down cancels."""
        return Timing(tuple(mine / its for mine, its in zip(self.seconds, floor.seconds, strict=True)))


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile, linear between neighbours.

    Args:
        values: at least one number, in any order.
        q: in [0, 1].
    """
    ordered = sorted(values)
    below, part = divmod(q * (len(ordered) - 1), 1)
    low = ordered[int(below)]
    return low if part == 0 else low + part * (ordered[int(below) + 1] - low)


def time_alternating(
    cases: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    warmup: int = 1,
    until: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every case once a round, in an order that is reversed every other round.

    Args:
        cases: name -> function of the round's number, which picks its inputs by it. What it returns is dropped after the
            clock has stopped.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that are not kept.
        until: no round starts after this, by `clock`, unless none was timed yet.
        clock: seconds.
        synchronize: waits until the device has done what it was given.

    Returns:
        A `Timing` for each case, all of the same number of rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; expected at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-warmup, rounds):
        if number > 0 and clock() > until:
            break
        order = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in order:
            synchronize()
            begin = clock()
            kept = cases[name](max(number, 0))
            synchronize()
            end = clock()
            del kept
            if number >= 0:
                seconds[name].append(end - begin)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def first_calls(
    cases: Mapping[str, Callable[[int], object]],
    *,
    limit_s: float,
    catch: tuple[type[Exception], ...],
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, str]:
    """Call every case once, as the warm-up and to learn which of them can take part in the rounds.

    Args:
        limit_s: a case whose call took longer is not measured; nothing is put in its figure's place.
        catch: what a case may raise without stopping the others.

    Returns:
        Name -> why not, of those that cannot.
    """
    dropped = {}
    for name, run in cases.items():
        synchronize()
        begin = clock()
        try:
            run(0)
            synchronize()
        except catch as error:
            dropped[name] = f"failed: {one_line(error)}"
            continue
        seconds = clock() - begin
        if seconds > limit_s:
            dropped[name] = f"not measured: one call took {seconds:.0f} s"
    return dropped


def one_line(error: BaseException, width: int = 160) -> str:
    """What went wrong, on one line that is not too long for a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 3] + "..."


# ---- memory ----


def rss_mb(pid: int | str = "self", *, peak: bool = False) -> float:
    """Resident memory of a process in MiB, now or at its highest; 0 if it is gone. Linux only."""
    label = "VmHWM:" if peak else "VmRSS:"
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(rf"^{label}\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def reset_peak_rss() -> None:
    """Set this process's own peak (`VmHWM`) back to what it holds now. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A subprocess that ended well."""

    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: (
        float  # user and system time of all its threads: far below threads x seconds says that others were at work
    )
    peak_rss_mb: float  # of its own address space, as the kernel counted it


class OverLimit(RuntimeError):
    """A subprocess was stopped because it took too long."""


def run_watched(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    echo: bool = False,
    limit_s: float = float("inf"),
) -> Finished:
    """Run a process to its end and take its peak resident memory from outside.

    `VmHWM` is read every 20 ms until the process is gone; it only ever grows, so the last reading misses at most what
    came in the last 20 ms. (`getrusage` will not do: a child inherits the peak of the parent that started it.)

    Args:
        env: added to this process's environment.
        echo: pass the child's stderr through instead of keeping it.
        limit_s: seconds after which it is stopped.

    Raises:
        OverLimit: it was stopped.
        RuntimeError: it exited with another status than 0; the message ends with the last lines it wrote.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin, cpu_begin = time.perf_counter(), _children_cpu_seconds()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=out, stderr=None if echo else err
        )
        peak = 0.0
        with exit_on_sigterm():
            try:
                while process.poll() is None:
                    peak = max(peak, rss_mb(process.pid, peak=True))
                    time.sleep(0.02)
                    if time.perf_counter() - begin > limit_s:
                        raise OverLimit(f"took more than {limit_s:g} s")
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        seconds, cpu_seconds = time.perf_counter() - begin, _children_cpu_seconds() - cpu_begin
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
    if process.returncode != 0:
        last = "\n".join("".join(texts).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}:\n{last}")
    return Finished(stdout=texts[0], stderr=texts[1], seconds=seconds, cpu_seconds=cpu_seconds, peak_rss_mb=peak)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within it, SIGTERM raises SystemExit; by default it would end this process at once, and its child would run on."""
    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def last_json(stdout: str) -> dict[str, Any]:
    """The JSON object on the last line that is not blank."""
    lines = [line for line in stdout.splitlines() if line.strip()]
    if not lines:
        raise ValueError("nothing was printed; expected a JSON object on the last line")
    found = json.loads(lines[-1])
    if not isinstance(found, dict):
        raise ValueError(f"the last line is {lines[-1][:80]!r}; expected a JSON object")
    return found


# ---- what was it measured on, and where is it kept ----


def describe_machine(accelerator: str | None = None) -> dict[str, Any]:
    """What a figure needs beside it to mean anything.

    Args:
        accelerator: the GPU's name, where one was used: then its driver and clocks are part of the answer.
    """
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    flags = set(_cpuinfo_field(cpuinfo, "flags", "Features").split())
    return {
        "cpu": _cpuinfo_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_bf16_instructions": bool(flags.intersection(_BF16_FLAGS)),
        "cpu_vector": next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "unknown"),
        "accelerator": accelerator,
        "gpu": describe_gpu() if accelerator else None,
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def describe_gpu() -> dict[str, str] | None:
    """Driver, memory, clocks (MHz), power (W) and temperature of the first GPU as they are now; None where
    `nvidia-smi` does not answer.
    """
    asked = (
        "driver_version memory.total clocks.sm clocks.mem clocks.max.sm power.limit power.draw temperature.gpu".split()
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
    return dict(zip(asked, values, strict=False))


def _cpuinfo_field(cpuinfo: str, *names: str) -> str:
    for name in names:
        found = re.search(rf"^{name}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        if found:
            return found[1].strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this checkout, with `-dirty` where tracked files differ from it.

    Where the files lie outside a checkout: what the environment says in `DPO_ENGINE_COMMIT`, or `unknown`.
    """
    try:
        named = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    return named.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def write_results(
    what: str,
    records: Iterable[Mapping[str, Any]],
    *,
    machine: Mapping[str, Any],
    folder: Path = RESULTS,
    now: datetime | None = None,
) -> Path:
    """Write records as `<folder>/<machine>/<date>-<what>.jsonl`, or `-2`, `-3`, ... if that exists.

    Args:
        what: name of the benchmark.
        records: one JSON object a line; schema, benchmark, time, commit, command and machine are put before each.
        machine: what `describe_machine` gave.

    Returns:
        The file, which did not exist before.
    """
    now = now or datetime.now(timezone.utc)
    common = {
        "schema": SCHEMA,
        "benchmark": what,
        "time": now.isoformat(timespec="seconds"),
        "commit": commit(),
        # Names without the folders of whoever ran it.
        "command": " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv),
        "machine": dict(machine),
    }
    text = "".join(json.dumps({**common, **record}, allow_nan=False) + "\n" for record in records)
    place = folder / machine_name(machine)
    place.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = place / f"{now:%Y-%m-%d}-{what}{'' if number == 1 else f'-{number}'}.jsonl"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return path
        except FileExistsError:
            number += 1


def machine_name(machine: Mapping[str, Any]) -> str:
    """A folder's name: the GPU if one was used, else the CPU and its cores."""
    name = machine["accelerator"] or f"{machine['cpu']} {machine['cores']} cores {machine['cpu_vector']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- printing ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
