"""Do two runs agree? Ratios of one beside ratios of the other; times are not compared, since machines differ from day to day.

    dpo-engine bench compare A.jsonl B.jsonl [--tolerance 0.15]      files, or folders of one machine
    dpo-engine bench compare --published       A: this machine's files that git tracks; B: those it does not

Compared are times over the floor, multiples of TRL's best, slopes, and MiB beyond inputs and results. Ratios differ by B / A - 1,
slopes by B - A; MiB by their difference over A, or over 32 MiB where A is less, since a few MiB of a process are chance. What may
not be quoted is not compared. Exit status 1 if any differs by more than the tolerance, 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import RESULTS, table
from benchmarks.report import cache, memory, ops, scale, steps
from benchmarks.report.results import Found, Results, choose_machine, newest, tracked
from dpo_engine.errors import ConfigError, DataError

TOLERANCE = 0.15
LEAST_MB = 32.0
Key = tuple[str, ...]
Figure = tuple[float, str]

RATIOS: Mapping[str, Callable[[Sequence[Found]], dict[Key, Figure]]] = {
    "ops": ops.ratios,
    "steps": steps.ratios,
    "memory": memory.ratios,
    "cache": cache.ratios,
    "scale": scale.ratios,
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A figure of both runs."""

    key: Key
    a: float
    b: float
    kind: str
    """ "ratio", "slope" or "MiB"."""

    @property
    def size(self) -> float:
        if self.kind == "slope":
            return self.b - self.a
        if self.kind == "MiB":
            return (self.b - self.a) / max(self.a, LEAST_MB)
        return self.b / self.a - 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="A B", help="result files, or folders of them")
    parser.add_argument("--published", action="store_true", help="what was measured here beside what is committed")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"default: {TOLERANCE:g}")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="with --published: holds a folder for each machine"
    )
    parser.add_argument("--machine", help="with --published: whose folder; default: this machine's, or the only one's")
    args = parser.parse_args(arguments)
    if args.published == bool(args.runs) or len(args.runs) not in (0, 2):
        parser.error("expected two runs, A and B, or --published")
    try:
        a, b = published(args.results, args.machine) if args.published else map(run_of, args.runs)
        first, second = figures(a), figures(b)
    except (ConfigError, DataError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    found = differences(first, second)
    for name, mine, theirs in (("A", first, second), ("B", second, first)):
        alone = sorted(set(mine) - set(theirs))
        if alone:
            print(f"only in {name}:")
            print("\n".join(f"  {'; '.join(key)}: {mine[key][0]:.4g}" for key in alone))
    if not found:
        print("compare: nothing is in both runs that may be quoted of both", file=sys.stderr)
        return 2
    print(show(found, args.tolerance))
    return 1 if any(over(difference, args.tolerance) for difference in found) else 0


def run_of(path: Path) -> Results:
    """The newest records of a file, or of a machine's folder.

    Raises:
        ConfigError: there is no such file.
        DataError: it holds no record of a suite.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; expected a result file, or a folder of them")
    results = newest(path.glob("*.jsonl") if path.is_dir() else [path], path.name)
    if not results.suites:
        why = "; ".join(results.passed_over) or "no records"
        raise DataError(f"{path}: {why}; expected records of {', '.join(RATIOS)}")
    return results


def published(folder: Path, machine: str | None) -> tuple[Results, Results]:
    """`(what git tracks, what it does not)` of a machine.

    Raises:
        ConfigError: there is no checkout, or one of the two is missing.
    """
    name = choose_machine(folder, machine)
    known = tracked(folder)
    if known is None:
        raise ConfigError(
            f"{folder} is in no git checkout, so nothing is known to be published; name two files instead"
        )
    names = {path.resolve() for path in known}
    files = list((folder / name).glob("*.jsonl"))
    committed = newest([path for path in files if path.resolve() in names], name)
    local = newest([path for path in files if path.resolve() not in names], name)
    if not committed.suites or not local.suites:
        missing = "committed" if not committed.suites else "new"
        raise ConfigError(f"{folder / name} holds no {missing} results; expected both; measure with: dpo-engine bench")
    return committed, local


def figures(results: Results) -> dict[Key, Figure]:
    """Suite, case, ... -> a figure and its kind."""
    return {
        (suite, *key): figure for suite, found in results.suites.items() for key, figure in RATIOS[suite](found).items()
    }


def differences(first: Mapping[Key, Figure], second: Mapping[Key, Figure]) -> list[Difference]:
    """What is in both, the largest difference first."""
    both = [
        Difference(key=key, a=first[key][0], b=second[key][0], kind=first[key][1]) for key in first if key in second
    ]
    return sorted(both, key=lambda difference: -abs(difference.size))


def over(difference: Difference, tolerance: float) -> bool:
    return not abs(difference.size) <= tolerance


def show(found: Sequence[Difference], tolerance: float) -> str:
    """A table, and how many differ."""
    rows = [
        (
            "; ".join(one.key),
            f"{one.a:.4g}",
            f"{one.b:.4g}",
            f"{one.size:+.3f}" if one.kind == "slope" else f"{one.size:+.1%}",
            "over" if over(one, tolerance) else "",
        )
        for one in found
    ]
    many = sum(over(one, tolerance) for one in found)
    said = f"{many} of {len(found)} figures differ by more than {tolerance:g}"
    return f"{table(('figure', 'A', 'B', 'difference', ''), rows)}\n{said}"


if __name__ == "__main__":
    sys.exit(main())
