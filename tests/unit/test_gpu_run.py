"""Does `make gpu` keep to its time and tell what it found? With a timer and a runner that the tests wind themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from support.benchmark_scripts import load
from support.imports import ROOT

gpu = load("gpu.run")
SIX_MINUTES = 360.0
ON_CPU = {"DPO_ENGINE_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}


class Machine:
    """A clock, and a runner on which each step takes as long as the test says."""

    def __init__(self, takes: Callable[[str, float], float], status: Mapping[str, int] | None = None) -> None:
        self.now = 0.0
        self.takes = takes
        self.status = status or {}
        self.limits: dict[str, float] = {}

    def clock(self) -> float:
        return self.now

    def run(self, command: Sequence[str], limit_s: float, environment: Mapping[str, str]) -> object:
        name = command[0]
        self.limits[name] = limit_s
        needed = self.takes(name, limit_s)
        self.now += min(needed, limit_s)
        status = None if needed > limit_s else self.status.get(name, 0)
        return gpu.Ended(status=status, tail=(f"last words of {name}",))

    def part(self, steps: Sequence[object]) -> list[dict[str, object]]:
        return gpu.run_part(steps, run=self.run, environment={}, clock=self.clock, say=lambda line: None)


def steps(*names: str, weight: float = 1.0) -> list[object]:
    return [gpu.Step(name=n, command=lambda seconds, n=n: [n, f"{seconds:.0f}"], weight=weight) for n in names]


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_ends_within_six_minutes_even_if_every_step_hangs(part: str, tmp_path: Path) -> None:
    machine = Machine(lambda name, limit: 1e9)
    table = gpu.PARTS[part](gpu.Job(device="cuda", shapes=gpu.SHAPES, folder=tmp_path))
    outcomes = machine.part(table)
    assert len(outcomes) == len(table) >= 2
    assert {outcome["status"] for outcome in outcomes} <= {"timed out", "not run"}
    assert machine.now <= gpu.PART_S < SIX_MINUTES - 15


def test_every_kernels_cases_run_on_a_card_too() -> None:
    """Those whose tensors lie where the kernel runs."""
    files = (ROOT / "tests" / "support").glob("*_cases.py")
    able = {path.stem for path in files if "support.interpreted import DEVICE" in path.read_text("utf-8")}
    assert set(gpu.KERNEL_CASES) == able


def test_what_a_step_does_not_use_is_left_to_those_after_it() -> None:
    machine = Machine(lambda name, limit: 10.0)
    machine.part(steps("a", "b", "c"))
    assert machine.limits["a"] == pytest.approx(gpu.PART_S / 3)
    assert machine.limits["b"] == pytest.approx((gpu.PART_S - 10) / 2)
    assert machine.limits["c"] == pytest.approx(gpu.PART_S - 20)


def test_a_heavier_step_gets_a_larger_share() -> None:
    machine = Machine(lambda name, limit: 1.0)
    machine.part([*steps("a", weight=3.0), *steps("b")])
    assert machine.limits["a"] == pytest.approx(0.75 * gpu.PART_S)


def test_a_step_that_finds_no_time_is_not_run() -> None:
    machine = Machine(lambda name, limit: gpu.PART_S)
    outcomes = gpu.run_part(
        steps("a", "b"), run=machine.run, environment={}, budget_s=4.0, clock=machine.clock, say=lambda line: None
    )
    assert [outcome["status"] for outcome in outcomes] == ["not run", "not run"]
    assert machine.limits == {}


def test_how_a_step_ended_is_told_and_its_last_words_are_kept_if_it_went_wrong() -> None:
    machine = Machine(lambda name, limit: 1e9 if name == "hangs" else 2.0, {"fails": 1, "empty": 5, "killed": -9})
    outcomes = {str(o["step"]): o for o in machine.part(steps("passes", "fails", "empty", "killed", "hangs"))}
    statuses = {name: outcome["status"] for name, outcome in outcomes.items()}
    assert statuses == {
        "passes": "passed", "fails": "failed", "empty": "skipped", "killed": "failed", "hangs": "timed out",
    }  # fmt: skip
    assert outcomes["fails"]["tail"] == ["last words of fails"]
    assert "tail" not in outcomes["passes"]
    found = [*outcomes.values()]
    assert gpu.summary("ops", found, on_gpu=False) == "ops: fails failed; killed failed; hangs timed out"
    # A file in which nothing ran proves nothing on a card.
    assert "empty skipped" in gpu.summary("ops", found, on_gpu=True)
    assert gpu.went_wrong([outcomes["passes"]], on_gpu=True) == []


def test_a_process_past_its_limit_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = "import subprocess, sys, time; print('begun', flush=True); "
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    begin = time.monotonic()
    ended = gpu.run_process([sys.executable, "-c", code], 1.5, {})
    assert (ended.status, ended.tail) == (None, ("begun",))
    assert time.monotonic() - begin < 8
    time.sleep(3)
    assert not mark.exists()


def test_a_process_gets_the_environment_and_its_status_and_last_lines_come_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "import os, sys; [print(i) for i in range(50)]; print(os.environ['A_SETTING'], file=sys.stderr); sys.exit(3)"
    ended = gpu.run_process([sys.executable, "-u", "-c", code], 30, {"A_SETTING": "seen"})
    assert ended.status == 3
    assert ended.tail == (*(str(i) for i in range(21, 50)), "seen")
    assert capfd.readouterr().out.startswith("0\n1\n")


def test_tests_are_counted_and_those_that_failed_named(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "def test_off(): pytest.skip('no such card')\n@pytest.fixture\ndef broken(): 1 / 0\ndef test_error(broken): pass\n"
    )
    report = tmp_path / "a step.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path), f"--junitxml={report}", "-c", os.devnull]
    subprocess.run(command, capture_output=True, cwd=tmp_path)
    [record] = gpu.gathered("correctness", [{"step": "a step", "status": "failed"}], tmp_path)
    assert record["part"] == "correctness"
    assert record["tests"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert [name.rsplit("::")[-1] for name in record["failures"]] == ["test_bad", "test_error"]
    assert record["skipped_because"] == ["no such card"]
    assert "1 passed, 2 failed, 1 skipped" in gpu.summary("correctness", [record], on_gpu=True)


def test_what_was_measured_before_a_process_was_stopped_is_kept(tmp_path: Path) -> None:
    (tmp_path / "ops.jsonl").write_text('{"case": "frozen"}\n{"case": "tra')
    (tmp_path / "train.jsonl").write_text('{"implementation": "engine"}\n')
    records = gpu.gathered("ops", [{"step": "a shape", "status": "timed out"}], tmp_path)
    assert records == [
        {"part": "ops", "step": "a shape", "status": "timed out"},
        {"part": "ops", "case": "frozen"},
        {"part": "ops", "implementation": "engine"},
    ]


def test_results_are_kept_by_card_never_overwritten_and_copied_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    machine = {"accelerator": "NVIDIA X100"}
    first, second = (gpu.keep("ops", [{"run": i}], machine, tmp_path / "results") for i in range(2))
    assert first[0].parent.name == "nvidia-x100" and first[0] != second[0]
    for number, (path, copy) in enumerate((first, second)):
        assert copy.parent == tmp_path / "out"
        assert json.loads(path.read_text("utf-8")) == json.loads(copy.read_text("utf-8"))
        assert json.loads(path.read_text("utf-8"))["run"] == number


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_make_gpu_says_so_in_one_line_and_exits_with_2() -> None:
    done = subprocess.run(
        ["make", "--silent", "gpu", "PART=ops", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and done.stdout == ""
    assert len(lines) == 1 and "sees no CUDA device" in lines[0]


def test_make_gpu_installs_nothing() -> None:
    done = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "benchmarks.gpu" in done.stdout
    assert "pip" not in done.stdout and ".venv" not in done.stdout


def test_a_part_that_does_not_exist_is_refused_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["speed", "ops"]) == 2
    assert "no part speed; expected correctness or ops" in capsys.readouterr().err


def test_a_python_without_torch_or_pytest_is_refused_by_name() -> None:
    def answers(*failing: str) -> Callable[..., object]:
        def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
            failed = any(f"import {name}" in command[-1] or f"import json, {name}" in command[-1] for name in failing)
            return subprocess.CompletedProcess(command, int(failed), '"NVIDIA X100"\n', "No module named it")

        return run

    assert "No module named it" in (gpu.missing("cuda", answers("torch"))[1] or "")
    assert "pytest is not installed" in (gpu.missing("cuda", answers("pytest"))[1] or "")
    assert gpu.missing("cuda", answers()) == ("NVIDIA X100", None)


def test_the_operators_benchmark_runs_from_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    """The steps as a card would get them, on a tiny shape."""
    quick = ("--only", "engine tiled", "naive", "--dtype", "float32", "--rounds", "1", "--no_memory")
    job = gpu.Job(device="cpu", shapes=gpu.TINY_SHAPES, folder=tmp_path, rest=quick)
    outcomes = gpu.run_part(gpu.ops(job), run=gpu.run_process, environment=ON_CPU, budget_s=100)
    assert [outcome["status"] for outcome in outcomes] == ["passed"], outcomes
    step, *records = gpu.gathered("ops", outcomes, tmp_path)
    assert step["step"] == gpu.TINY_SHAPES[0]
    measured = {(r["case"], r["implementation"]) for r in records if r["status"] == "measured"}
    names = ("floor", "engine tiled", "naive")
    assert measured == {(case, name) for case in load("ops.cases").CASES for name in names}


def test_the_tests_for_a_card_pass_on_a_cpu(tmp_path: Path) -> None:
    """So that they are in order before a card sees them; compiling a model takes too long for every run of the suite."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-k", "not compiles"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ON_CPU}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
