"""Do the seeded faults still fit the source, and do the tests see each of them?"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
from mutation.mutant import Mutant
from mutation.mutants import MUTANTS

from support.imports import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_mutant_stands_in_the_source_exactly_once(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    changed = mutant.applied(source)
    assert changed != source
    compile(changed, mutant.file, "exec")  # a fault of syntax would be seen by anything


def test_no_two_mutants_are_the_same() -> None:
    assert len({mutant.fault for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_the_tests_that_a_mutant_names_exist() -> None:
    for mutant in MUTANTS:
        files = [argument for argument in shlex.split(mutant.tests) if argument.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), mutant.fault


def test_a_mutant_whose_text_is_gone_says_so() -> None:
    mutant = Mutant(fault="a fault", file="x.py", old="b", new="c", tests="")
    assert mutant.applied("a b") == "a c"
    for source in ("a", "b b"):
        with pytest.raises(LookupError, match=r"a fault: its text stands \d times in x\.py; expected once"):
            mutant.applied(source)


@pytest.mark.slow
def test_every_mutant_is_killed() -> None:
    """A quarter of an hour on two cores."""
    pytest.importorskip("triton", reason="triton is not installed")
    jobs = max(1, (os.cpu_count() or 1))
    command = [sys.executable, "tests/mutation/run.py", "--jobs", str(min(jobs, 8))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
