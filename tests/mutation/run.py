"""Do the tests see the faults that they are there for?

    python tests/mutation/run.py                     every mutant of `mutants.py`
    python tests/mutation/run.py --only softcap      those whose name holds a text
    python tests/mutation/run.py --jobs 2            two at a time

Each mutant goes into a temporary copy of the repository, where a few tests are run until the first failure. The same
tests are run once without a fault before: what fails then proves nothing. Exit status 1 if a mutant survived, if its
text no longer stands in the source, or if tests fail without one.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # pytest puts it there; run by hand nothing does

from mutation.mutant import Mutant  # noqa: E402
from mutation.mutants import MUTANTS  # noqa: E402

COPIED = ("dpo_engine", "kernels", "tests", "pyproject.toml")
LIMIT = 300.0
"""Seconds that the tests of one mutant may take; one that hangs is seen too."""
_ARGUMENTS = ("-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    mutant: Mutant
    killed_by: str | None
    """The test that failed; None where all passed."""
    problem: str | None = None
    """Why nothing was found out: the text is gone, or no test ran."""
    seconds: float = 0.0

    def __str__(self) -> str:
        found = self.problem or (f"killed by {self.killed_by}" if self.killed_by else "SURVIVED")
        return f"{self.seconds:5.1f} s  {self.mutant.fault}: {found}"

    @property
    def good(self) -> bool:
        return self.killed_by is not None


class Copy:
    """A copy of the repository in which tests run, and in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
            else:
                shutil.copy(source, folder / name)
        self._assert_imported()

    def run(self, tests: str, *, interpreted: bool) -> subprocess.CompletedProcess[str]:
        """pytest in the copy, stopping at the first failure."""
        command = [sys.executable, "-m", "pytest", *shlex.split(tests), *_ARGUMENTS]
        environment = self._environment()
        if interpreted:
            environment["TRITON_INTERPRET"] = "1"
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def try_out(self, mutant: Mutant) -> Outcome:
        path = self.folder / mutant.file
        source = path.read_text(encoding="utf-8")
        start = time.monotonic()
        try:
            path.write_text(mutant.applied(source), encoding="utf-8")
            run = self.run(mutant.tests, interpreted=mutant.interpreted)
        except LookupError as error:
            return Outcome(mutant=mutant, killed_by=None, problem=f"NOT APPLIED: {error}")
        except subprocess.TimeoutExpired:
            return Outcome(mutant=mutant, killed_by=f"the limit of {LIMIT:.0f} s", seconds=LIMIT)
        finally:
            path.write_text(source, encoding="utf-8")
        seconds = time.monotonic() - start
        if run.returncode == 0:
            return Outcome(mutant=mutant, killed_by=None, seconds=seconds)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", run.stdout, re.MULTILINE)
        if run.returncode != 1 or failed is None:
            return Outcome(
                mutant=mutant, killed_by=None, problem=f"NO TEST RAN:\n{run.stdout}{run.stderr}", seconds=seconds
            )
        return Outcome(mutant=mutant, killed_by=failed[1], seconds=seconds)

    def _environment(self) -> dict[str, str]:
        """The copy comes first on the path, before an editable install of the original."""
        paths = [str(self.folder), str(self.folder / "tests")]
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        rest = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
        return {**rest, **quiet, "PYTHONPATH": os.pathsep.join(paths)}

    def _assert_imported(self) -> None:
        code = "import dpo_engine, dpo_engine.kernels as k; print(dpo_engine.__file__, *k.__path__, sep='\\n')"
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        for line in run.stdout.splitlines():
            if not Path(line).resolve().is_relative_to(self.folder.resolve()):
                raise RuntimeError(f"the tests would run {line}; expected it in the copy {self.folder}")


def try_all(mutants: Sequence[Mutant], jobs: int, report: Callable[[object], None]) -> list[Outcome]:
    """What becomes of every mutant, in order; `report` gets a line as soon as there is one."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        idle: SimpleQueue[Copy] = SimpleQueue()
        for job in range(jobs):
            idle.put(Copy(Path(scratch) / str(job)))

        def in_a_copy(work: Callable[[Copy], Outcome | str | None]) -> Outcome | str | None:
            copy = idle.get()
            try:
                found = work(copy)
            finally:
                idle.put(copy)
            if found is not None:
                report(found)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            runs = sorted({(mutant.tests, mutant.interpreted) for mutant in mutants})
            broken = pool.map(lambda run: in_a_copy(lambda copy: _fails_anyway(copy, *run)), runs)
            if any(found is not None for found in broken):
                return [Outcome(mutant=mutant, killed_by=None, problem="tests fail without it") for mutant in mutants]
            report(f"{len(runs)} runs of tests pass without a fault")
            outcomes = pool.map(lambda mutant: in_a_copy(lambda copy: copy.try_out(mutant)), mutants)
            return [found for found in outcomes if isinstance(found, Outcome)]


def _fails_anyway(copy: Copy, tests: str, interpreted: bool) -> str | None:
    """What is wrong with a run of tests without any fault."""
    run = copy.run(tests, interpreted=interpreted)
    if run.returncode == 0 and " passed" in run.stdout:
        return None
    return f"without a fault: pytest {tests} exits with {run.returncode}:\n{run.stdout}{run.stderr}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose name or file holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default: 1)")
    given = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if given.only in mutant.fault or given.only in mutant.file]
    if not chosen:
        parser.error(f"--only {given.only!r}: no mutant's name or file holds it")
    outcomes = try_all(chosen, given.jobs, lambda found: print(found, flush=True))
    left = [outcome for outcome in outcomes if not outcome.good]
    print(f"{len(outcomes) - len(left)} of {len(outcomes)} mutants killed")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
