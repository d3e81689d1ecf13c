"""How is a process run, watched and stopped, and how much memory did it take at most?"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT


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
    cwd: Path = ROOT,
    echo: bool = False,
    limit_s: float = float("inf"),
) -> Finished:
    """Run a process to its end and take its peak resident memory from outside.

    `VmHWM` is read every 20 ms until the process is gone; it only ever grows, so the last reading misses at most what
    came in the last 20 ms. (`getrusage` will not do: a child inherits the peak of the parent that started it.)

    Args:
        env: added to this process's environment.
        cwd: of the process; `python -m benchmarks...` is found from the checkout.
        echo: pass the child's stderr through instead of keeping it.
        limit_s: seconds after which it is stopped.

    Raises:
        OverLimit: it was stopped.
        RuntimeError: it exited with another status than 0; the message ends with the last lines it wrote.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin, cpu_begin = time.perf_counter(), _children_cpu_seconds()
        process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **(env or {})}, stdout=out, stderr=None if echo else err
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
