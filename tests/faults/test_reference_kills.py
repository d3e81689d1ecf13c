"""What is left of a reference cache whose writer is killed at a write, at a sync, anywhere? Everything that was committed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_engine.reference.files import entry_files
from support.reference_entries import SPACE, entries, store

COUNT, BATCH = 24, 8
WRITER = Path(__file__).parents[1] / "support" / "reference_entries.py"
CALLS = ("pwrite64", "fsync", "fdatasync", "rename", "unlink", "openat", "ftruncate", "write")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(WRITER.parents[1]), *sys.path]))}


def _writer(folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, str(WRITER), str(folder), str(COUNT), str(BATCH)]
    return subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=120)


def _can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True).returncode == 0


def _check(folder: Path, committed: int) -> None:
    """All that was committed is there, anything else is whole or absent, and the rest can be written."""
    found = store(folder).get(list(entries(COUNT)))
    known = entries(COUNT)
    assert all(known[address] == values for address, values in found.items())
    assert len(found) in (committed, committed + BATCH)  # the batch in flight may have arrived, but not in part
    assert list(found) == list(known)[: len(found)] or set(found) == set(list(known)[: len(found)])
    opened = store(folder)
    opened.put((address, values) for address, values in known.items() if address not in found)
    assert store(folder).get(list(known)) == known
    assert opened.bad == 0


needs_strace = pytest.mark.skipif(not _can_trace(), reason="needs strace and the right to trace a child")


@needs_strace
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_call_that_touches_the_folder_loses_at_most_the_batch_in_flight(
    tmp_path: Path, every: int
) -> None:
    trace = tmp_path / "trace"
    whole = tmp_path / "whole"
    (whole / SPACE).mkdir(parents=True)
    calls = ",".join(CALLS)
    done = _writer(whole, "strace", "-f", "-o", str(trace), "-e", f"trace={calls}", "-y")
    assert done.returncode == 0, done.stderr
    counts = dict.fromkeys(CALLS, 0)
    sites: list[tuple[str, int]] = []
    for line in trace.read_text(errors="replace").splitlines():
        if (match := re.match(r"\d+\s+(\w+)\(", line)) and match[1] in counts:
            counts[match[1]] += 1
            if SPACE in line:
                sites.append((match[1], counts[match[1]]))
    names = {name for name, _ in sites}
    assert {"pwrite64", "openat", "rename"} <= names and names & {"fsync", "fdatasync"}
    killed = 0
    for name, number in sites[::every]:
        folder = tmp_path / f"{name}-{number}"
        (folder / SPACE).mkdir(parents=True)
        inject = f"inject={name}:signal=SIGKILL:when={number}"
        done = _writer(folder, "strace", "-f", "-o", os.devnull, "-e", f"trace={calls}", "-e", inject)
        killed += done.returncode != 0
        committed = int(done.stdout.split()[-1]) if done.stdout.split() else 0
        _check(folder, committed)
        shutil.rmtree(folder)
    assert killed > 0.9 * len(sites[::every])


def test_a_kill_at_a_random_moment_loses_at_most_the_batch_in_flight(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / str(number)
        command = [sys.executable, str(WRITER), str(folder), "4000", str(BATCH)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
        assert child.stdout is not None
        for _ in range(10 + 17 * number):
            child.stdout.readline()
        time.sleep(0.001 * number)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.wait()
        committed = int(rest[-1]) if rest else BATCH * (10 + 17 * number)
        known = entries(committed + 2 * BATCH)
        found = store(folder).get(list(known))
        assert all(known[address] == values for address, values in found.items())
        assert len(found) in (committed, committed + BATCH)
        assert len(entry_files(folder / SPACE)) == 1
