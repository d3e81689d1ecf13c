"""dpo-engine bench: run suites, list them, or look at their results.

    dpo-engine bench                               every suite, one after the other (steps on the packaged pairs)
    dpo-engine bench ops memory                    these only
    dpo-engine bench steps --data_dir FOLDER       whole training steps on the known data sets in FOLDER, beside TRL
    dpo-engine bench ops --shapes 2048,576,49152   one suite takes options of its own: dpo-engine bench ops --help
    dpo-engine bench --smoke                       that everything works, at tiny sizes, in less than a minute
    dpo-engine bench list                          suites, their cases and who is measured
    dpo-engine bench report | readme | compare     pictures and a page; README's figures; two runs side by side

Each run adds a file benchmarks/results/<machine>/<date>-<suite>.jsonl and overwrites none. Measure on a quiet machine: rounds
that others disturbed are taken again, and where they go on, no ratio is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.harness import ROOT, exit_on_sigterm, table
from benchmarks.suites import SUITES, VERBS

USAGE = 2
Main = Callable[[Sequence[str] | None], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or the first that was not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] and words[0] in VERBS:
        return _main_of(VERBS[words[0]])(words[1:])
    if words == ["list"]:
        print(listing())
        return 0
    chosen = []
    while words and not words[0].startswith("-"):
        chosen.append(words.pop(0))
    unknown = [name for name in chosen if name not in SUITES]
    if unknown:
        names = ", ".join((*SUITES, "list", *VERBS))
        print(f"error: dpo-engine bench {' '.join(unknown)}: expected suites or a verb out of {names}", file=sys.stderr)
        return USAGE
    if len(chosen) != 1 and any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    return run(chosen or list(SUITES), words)


def run(names: Sequence[str], options: Sequence[str]) -> int:
    """Suites in processes of their own. Options that not all of them know may be given to a single one only."""
    options, data = _taken("--data_dir", [_absolute(word) for word in options])
    data = data or os.environ.get("DATA_DIR") or None
    strange = [word for word in options if word.startswith("--") and word.split("=")[0] not in COMMON]
    if len(names) > 1 and strange:
        known = ", ".join(sorted(COMMON))
        print(f"error: {strange[0]} belongs to one suite; name it alone, or use {known}", file=sys.stderr)
        return USAGE
    status = 0
    for name in names:
        suite = SUITES[name]
        mine = [*options, *(["--data_dir", str(Path(data).resolve())] if suite.takes_data and data else [])]
        if len(names) > 1:
            print(f"== {name}: {suite.question}", flush=True)
        begin = time.perf_counter()
        with exit_on_sigterm():
            if "--smoke" in options:  # no figure is kept, and importing torch takes longer than the suite
                found = _main_of(suite.module)(mine)
            else:
                found = subprocess.run([sys.executable, "-m", suite.module, *mine], cwd=ROOT, check=False).returncode
        if len(names) > 1:
            print(
                f"== {name}: {'done' if found == 0 else f'exit status {found}'}, {time.perf_counter() - begin:.0f} s\n"
            )
        status = status or found
    return status


COMMON = frozenset(("--smoke", "--no_save", "--folder", "--threads", "--rounds", "--data_dir"))


def listing() -> str:
    """The table of suites."""
    rows = []
    for name, suite in SUITES.items():
        cases, implementations = suite.entries()
        rows.append((name, f"{len(cases)} x {len(implementations)}"))
    lines = [table(("suite", "cases x implementations"), rows)]
    for name, suite in SUITES.items():
        cases, implementations = suite.entries()
        lines.append(f"\n{name}: {suite.question}")
        lines.append(f"  cases:            {', '.join(cases)}")
        lines.append(f"  implementations:  {', '.join(implementations)}")
        lines.append(f"  dtypes:           {suite.dtypes}")
    return "\n".join(lines)


def _main_of(name: str) -> Main:
    """`main` of a module, or of the module `run` in a package."""
    place = f"{name}.run" if (ROOT / name.replace(".", "/")).is_dir() else name
    main_of: Main = import_module(place).main
    return main_of


def _absolute(word: str) -> str:
    """A path that is there, so that it is found from the checkout too."""
    name, sign, value = word.partition("=")
    if name.startswith("--"):
        return f"{name}{sign}{_absolute(value)}" if sign else word
    return str(Path(word).resolve()) if os.sep in word and Path(word).exists() else word


def _taken(name: str, words: Sequence[str]) -> tuple[list[str], str | None]:
    """`words` without an option, and its value."""
    left, value, rest = [], None, iter(words)
    for word in rest:
        if word == name:
            value = next(rest, None)
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            left.append(word)
    return left, value
