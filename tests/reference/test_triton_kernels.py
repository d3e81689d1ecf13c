"""Do the Triton kernels compute what their definitions say, without a GPU?

Triton decides when a kernel is imported whether it is interpreted or compiled, and the same process compiles kernels in
`tests/unit/test_triton_aot.py`. So the cases live in `tests/support/*_cases.py`, which pytest does not collect by name,
and these files run in a process of their own with TRITON_INTERPRET=1. A failure here shows that process's own report.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_agree_with_float64_under_the_interpreter(which: str) -> None:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",  # blocks are tiny: threads would only wait for each other
    }
    cases = [f"tests/support/{name}_cases.py" for name in ("lse_forward", "tile_pass", "exp_epilogue")]
    command = [sys.executable, "-m", "pytest", *cases, "-q", "-p", "no:cacheprovider", "-m", which]
    # The interpreter is numpy, which warns of infinities that the cases are about.
    command += ["-W", "ignore::RuntimeWarning"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if run.returncode:
        pytest.fail(f"TRITON_INTERPRET=1 {' '.join(command)}\n{run.stdout}\n{run.stderr}", pytrace=False)
    # A file whose every case is skipped passes too, and proves nothing.
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout
