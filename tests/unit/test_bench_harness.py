"""Can the benchmarks' figures be believed? The harness, with a clock that the tests wind themselves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from support.benchmark_scripts import load
from support.imports import ROOT

NOON = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)


harness = load("harness")


class Clock:
    """Time passes only when a case says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, seconds: Callable[[int], float]) -> Callable[[int], None]:
        def run(number: int) -> None:
            self.ran.append((name, number))
            self.now += seconds(number)

        return run


def test_every_round_is_timed_and_the_warm_up_is_not() -> None:
    clock = Clock()
    warm = iter([100.0, 1.0, 2.0, 3.0])
    timings = harness.time_alternating({"a": clock.case("a", lambda _: next(warm))}, rounds=3, warmup=1, clock=clock)
    assert timings["a"].seconds == (1.0, 2.0, 3.0)


def test_the_order_turns_round_every_other_round() -> None:
    clock = Clock()
    cases = {name: clock.case(name, lambda _: 1.0) for name in "abc"}
    harness.time_alternating(cases, rounds=4, warmup=0, clock=clock)
    assert "".join(name for name, _ in clock.ran) == "abccbaabccba"
    assert [number for _, number in clock.ran] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_work_that_the_device_still_owes_is_part_of_the_time() -> None:
    clock, owed = Clock(), [0.0]

    def launch(_: int) -> None:
        clock.now += 0.5
        owed[0] = 4.0

    def synchronize() -> None:
        clock.now += owed[0]
        owed[0] = 0.0

    timings = harness.time_alternating({"a": launch}, rounds=2, warmup=0, clock=clock, synchronize=synchronize)
    assert timings["a"].seconds == (4.5, 4.5)


def test_a_round_that_is_slow_for_all_does_not_move_the_ratio() -> None:
    clock = Clock()
    slow = {0: 1.0, 1: 10.0, 2: 1.0}
    cases = {
        "floor": clock.case("floor", lambda number: 2.0 * slow[number]),
        "ours": clock.case("ours", lambda number: 3.0 * slow[number]),
    }
    timings = harness.time_alternating(cases, rounds=3, warmup=0, clock=clock)
    assert timings["ours"].over(timings["floor"]).seconds == pytest.approx((1.5, 1.5, 1.5))
    assert timings["ours"].p80 > 3.0


def test_no_round_starts_after_its_time_but_one_is_always_timed() -> None:
    clock = Clock()
    cases = {"a": clock.case("a", lambda _: 10.0)}
    timings = harness.time_alternating(cases, rounds=9, warmup=1, until=25.0, clock=clock)
    assert timings["a"].seconds == (10.0, 10.0)
    timings = harness.time_alternating(cases, rounds=9, warmup=0, until=0.0, clock=clock)
    assert timings["a"].seconds == (10.0,)


def test_a_case_that_raises_or_takes_too_long_is_left_out_with_the_reason() -> None:
    clock = Clock()

    def broken(_: int) -> None:
        raise ValueError("no\nsuch thing")

    cases = {"quick": clock.case("quick", lambda _: 1.0), "slow": clock.case("slow", lambda _: 130.0), "broken": broken}
    dropped = harness.first_calls(cases, limit_s=60, catch=(ValueError,), clock=clock)
    assert dropped == {
        "slow": "not measured: one call took 130 s",
        "broken": "failed: ValueError: no such thing",
    }


def test_what_the_device_raises_later_is_the_fault_of_the_call_before() -> None:
    owed = [False]

    def launch(_: int) -> None:
        owed[0] = True

    def synchronize() -> None:
        if owed[0]:
            owed[0] = False
            raise RuntimeError("illegal address")

    cases = {"bad": launch, "good": lambda _: None}
    dropped = harness.first_calls(cases, limit_s=60, catch=(RuntimeError,), synchronize=synchronize)
    assert dropped == {"bad": "failed: RuntimeError: illegal address"}


def test_a_fault_that_nobody_expects_stops_the_benchmark() -> None:
    def broken(_: int) -> None:
        raise KeyError("a slip of ours")

    with pytest.raises(KeyError):
        harness.first_calls({"broken": broken}, limit_s=60, catch=(ValueError,))


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        harness.time_alternating({"a": lambda _: None}, rounds=0)


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([5.0], 0.8, 5.0), ([3.0, 1.0], 0.5, 2.0), ([4.0, 1.0, 3.0, 2.0, 5.0], 0.2, 1.8), ([2.0, 1.0], 1.0, 2.0)],
)
def test_quantiles_lie_between_neighbours(values: list[float], q: float, expected: float) -> None:
    assert harness.quantile(values, q) == pytest.approx(expected)


def test_an_older_result_is_never_overwritten(tmp_path: Path) -> None:
    machine = harness.describe_machine()
    written = [
        harness.write_results("speed", [{"run": number}], machine=machine, folder=tmp_path, now=NOON)
        for number in range(3)
    ]
    assert [path.name for path in written] == [
        "2026-11-21-speed.jsonl",
        "2026-11-21-speed-2.jsonl",
        "2026-11-21-speed-3.jsonl",
    ]
    assert [json.loads(path.read_text("utf-8"))["run"] for path in written] == [0, 1, 2]


def test_a_record_says_where_and_when_it_was_taken(tmp_path: Path) -> None:
    machine = harness.describe_machine("NVIDIA X100")
    path = harness.write_results("speed", [{"a": 1}, {"a": 2}], machine=machine, folder=tmp_path, now=NOON)
    first, second = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    assert path.parent.name == "nvidia-x100"
    assert (first["a"], second["a"]) == (1, 2)
    assert first["schema"] == harness.SCHEMA
    assert first["time"] == "2026-11-21T12:00:00+00:00"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", first["commit"])
    assert first["machine"]["cores"] >= 1
    assert first["machine"]["cpu_bf16_instructions"] in (True, False)
    assert first["machine"]["packages"]["torch"]


def test_a_gpu_comes_with_its_driver_and_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 143771, 345, 3201, 1980, 700.00, 76.12, 31'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    machine = harness.describe_machine("NVIDIA X100")
    assert machine["gpu"]["driver_version"] == "580.1"
    assert machine["gpu"]["clocks.max.sm"] == "1980"
    assert harness.describe_machine()["gpu"] is None
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert harness.describe_machine("NVIDIA X100")["gpu"] is None


def test_files_without_their_history_may_be_told_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(harness.machine.subprocess, "run", no_git)
    monkeypatch.delenv(harness.COMMIT_VARIABLE, raising=False)
    assert harness.commit() == "unknown"
    monkeypatch.setenv(harness.COMMIT_VARIABLE, "abc123")
    assert harness.commit() == "abc123"


def test_a_figure_that_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        harness.write_results("speed", [{"a": float("nan")}], machine=harness.describe_machine(), folder=tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_the_peak_is_of_the_child_and_not_of_its_parent() -> None:
    held = bytearray(200 << 20)
    held[::4096] = b"x" * len(held[::4096])  # resident in this process, whose peak a child would inherit from getrusage
    code = "import time; block = bytearray(64 << 20); block[::4096] = b'x' * len(block[::4096]); del block; time.sleep(0.2)"
    done = harness.run_watched([sys.executable, "-c", code])
    assert 64 < done.peak_rss_mb < 150
    assert held[0] == ord("x")


def test_a_child_that_computes_is_told_from_one_that_waits() -> None:
    waits = harness.run_watched([sys.executable, "-c", "import time; time.sleep(0.6)"])
    computes = harness.run_watched([sys.executable, "-c", "import time\nwhile time.process_time() < 0.6: pass"])
    assert waits.seconds > 0.6 > 0.4 > waits.cpu_seconds
    assert computes.cpu_seconds > 0.6


def test_a_reset_peak_forgets_what_was_freed_before() -> None:
    code = """
from benchmarks import harness
def touch(mib):
    block = bytearray(mib << 20)
    block[::4096] = b"x" * len(block[::4096])
touch(128)
before = harness.rss_mb(peak=True)
harness.reset_peak_rss()
base = harness.rss_mb()
touch(32)
print(before - base > 100, 30 < harness.rss_mb(peak=True) - base < 40)
"""
    done = harness.run_watched([sys.executable, "-c", code])
    assert done.stdout.split() == ["True", "True"]


def test_a_child_that_fails_stops_the_benchmark_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exited with 3.*no such pairs"):
        harness.run_watched([sys.executable, "-c", "import sys; print('no such pairs', file=sys.stderr); sys.exit(3)"])


def test_the_result_is_the_last_line_that_is_not_blank() -> None:
    assert harness.last_json('{"a": 0}\nwarning\n{"a": 1}\n\n') == {"a": 1}
    with pytest.raises(ValueError, match="expected a JSON object"):
        harness.last_json("[1]\n")
    with pytest.raises(ValueError, match="nothing was printed"):
        harness.last_json("\n")


def test_a_benchmark_that_is_terminated_leaves_no_child_behind(tmp_path: Path) -> None:
    child = tmp_path / "child"
    (tmp_path / "child.py").write_text(
        f"import os, time\nfrom pathlib import Path\nPath({str(child)!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        "import sys\nfrom benchmarks import harness\n"
        f"harness.run_watched([sys.executable, {str(tmp_path / 'child.py')!r}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        for _ in range(300):
            if child.exists() and child.read_text():
                break
            time.sleep(0.1)
        pid = int(child.read_text())
        parent.terminate()
        assert parent.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        parent.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# ---- others on the same machine ----


def reading(wall: float, busy: float, own: float, stolen: float = 0.0) -> Any:
    return harness.neighbours.Reading(wall=wall, busy=busy, own=own, stolen=stolen)


def neighbours(*readings: Any, **settings: Any) -> Any:
    left = iter(readings)
    return harness.Neighbours(read=lambda: next(left), **settings)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.neighbours.os, "sched_getaffinity", lambda _: {0, 1})


@pytest.mark.parametrize(
    ("end", "share"),
    [
        (reading(20.0, 120.0, 20.0), 0.0),  # all of it was our own
        (reading(20.0, 116.0, 10.0), 0.3),
        (reading(20.0, 110.0, 10.0, stolen=4.0), 0.2),
        (reading(10.1, 110.0, 0.0), 0.0),  # too short to tell
    ],
)
@pytest.mark.usefixtures("two_cores")
def test_what_others_had_of_the_cores_is_their_time_over_all_of_it(end: Any, share: float) -> None:
    its = neighbours(reading(10.0, 100.0, 0.0), end)
    its.start()
    assert its.share() == pytest.approx(share)


@pytest.mark.usefixtures("two_cores")
def test_a_disturbed_round_is_taken_again_and_not_kept() -> None:
    clock = Clock()
    spans = [(0.0, 0.0), (10.0, 18.0), (10.0, 10.0), (20.0, 12.0)]  # the first round is others' for the most part
    its = neighbours(*(reading(wall, busy, 0.0) for wall, busy in spans), repeats=1)
    taken: list[int] = []
    timings = harness.time_alternating(
        {"a": clock.case("a", lambda n: taken.append(n) or 1.0)}, rounds=1, warmup=0, clock=clock, neighbours=its
    )
    assert taken == [0, 0] and len(timings["a"].seconds) == 1
    assert its.repeated == 1 and its.shares == [0.1] and its.why is None


@pytest.mark.usefixtures("two_cores")
def test_where_others_do_not_stop_the_figure_is_kept_and_said_to_be_too_noisy() -> None:
    its = neighbours(*(reading(10.0 * n, 15.0 * n, 0.0) for n in range(9)), repeats=1)
    harness.time_alternating({"a": lambda _: None}, rounds=3, warmup=0, neighbours=its)
    assert its.shares == [0.75] * 3 and its.repeated == 1
    assert its.why == "too noisy to tell: others had up to 75% of the cores in 3 of 3 rounds"


def test_where_the_kernel_tells_nothing_nothing_is_refused() -> None:
    its = neighbours(None, None)
    its.start()
    assert its.keep() and its.why is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux only")
def test_a_busy_neighbour_is_seen_and_ones_own_work_is_not() -> None:
    code = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        its = harness.Neighbours()
        its.start()
        time.sleep(1.0)
        theirs = its.share()
        child.kill()
    assert theirs > 0.3 / len(os.sched_getaffinity(0))
    begin = its.read()
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        pass
    after = its.read()
    assert after.own - begin.own > 0.3  # what the loop used is known as its own


@pytest.mark.parametrize(
    ("rounds", "quotable"), [((1.0, 1.1, 1.05, 1.0, 1.1), True), ((1.0, 2.0, 1.5, 1.0, 2.0), False)]
)
def test_rounds_that_lie_too_far_apart_say_so(rounds: tuple[float, ...], quotable: bool) -> None:
    assert (harness.Timing(rounds).why is None) == quotable
