"""Are the Triton backends of `linear_logps` right without a GPU?

As in `test_triton_kernels.py`, the cases run in a process of their own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from support.imports import ROOT


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_agrees_with_float64_under_the_interpreter(which: str) -> None:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",  # blocks are tiny: threads would only wait for each other
    }
    command = [sys.executable, "-m", "pytest", "tests/support/linear_logps_triton_cases.py", "-q", "-m", which]
    # The interpreter is numpy, which warns of infinities that the cases are about.
    command += ["-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if run.returncode:
        pytest.fail(f"TRITON_INTERPRET=1 {' '.join(command)}\n{run.stdout}\n{run.stderr}", pytrace=False)
    # A file whose every case is skipped passes too, and proves nothing.
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout
