"""Do the wrappers for pytest-benchmark collect every call, run, and refuse to time a wrong answer?"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from support.benchmark_scripts import load
from support.imports import ROOT

pytest.importorskip("pytest_benchmark")

regression = load("regression.test_ops")


def test_every_call_is_collected_and_one_runs() -> None:
    command = (
        "-m pytest benchmarks/regression -q -p no:xdist -p no:cacheprovider -o addopts= --benchmark-disable -k".split()
    )
    wanted = "frozen and tiled and float32"
    done = subprocess.run([sys.executable, *command, wanted], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [(passed, others)] = re.findall(r"(\d+) passed, (\d+) deselected", done.stdout)
    every = len(regression.CASES) * len(regression.IMPLEMENTATIONS) * len(regression.DTYPES)
    assert (int(passed), int(others)) == (1, every - 1)


@pytest.mark.parametrize("dtype", regression.DTYPES)
def test_a_wrong_answer_is_not_timed(dtype: str) -> None:
    fine = {"logp_over_bound": 0.1, "d_hidden": 1e-7, "d_weight": 1e-7, "loss": 1e-5}
    assert regression.wrong(fine, dtype) == []
    for name, value in (("logp_over_bound", 1e5), ("d_hidden", 0.1), ("d_weight", "nan"), ("loss", 1.0)):
        [line] = regression.wrong({**fine, name: value}, dtype)
        assert line.startswith(f"{name} is {value}")
