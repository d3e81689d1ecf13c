"""What was measured, and which of it is the newest? Result files become records, each with the file that it is from.

    results = read_machine(RESULTS, "amd-epyc-2-cores-avx2")
    results.suites["ops"]          # the newest `Found` of every key

A key is all that says *what* was measured: case, implementation, shape, dtype, threads. Of records with one key those of the newest
file count, even where they say "not measured" and older ones had a figure. Rounds of one key in one file stay together, and what
is compared round by round must come from one file.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import describe_machine, machine_name
from dpo_engine.errors import ConfigError, DataError

Record = Mapping[str, Any]

SUITES = ("ops", "steps", "memory", "cache", "scale")
EVERY_RECORD = ("case", "implementation", "dtype", "status", "threads", "rounds", "unquotable")
"""Fields of every measured record of a suite. A file with one that lacks any is of an older form, and is passed over."""
WHO = ("case", "implementation", "status")
KEY = (
    *("case", "implementation", "kind", "dtype", "device", "threads", "model", "rows", "hidden", "vocabulary"),
    *("batch", "max_length", "optim", "data", "layout", "beta", "x"),
)
GPU_PREFIX = "gpu-"
COMMON = ("schema", "benchmark", "time", "commit", "command", "machine")


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The run that a record is from: one file."""

    file: str
    """As a page names it: `<machine>/<file>`."""
    benchmark: str
    time: str
    commit: str
    command: str
    machine: Record

    @property
    def date(self) -> str:
        """As `21 November 2026`."""
        when = datetime.fromisoformat(self.time)
        return f"{when.day} {when:%B %Y}"

    @property
    def short_commit(self) -> str:
        name, dirty, _ = self.commit.partition("-dirty")
        return name[:10] + dirty

    @property
    def machine_words(self) -> str:
        """As `AMD EPYC, 2 cores, avx2`."""
        machine = self.machine
        if machine.get("accelerator"):
            return str(machine["accelerator"])
        return f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_vector']}"

    @property
    def versions(self) -> str:
        """As `Python 3.11.7, torch 2.13.0, ...`, of what was installed."""
        packages = self.machine.get("packages", {})
        return ", ".join(
            [
                f"Python {self.machine['python']}",
                *(f"{name} {version}" for name, version in packages.items() if version),
            ]
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The newest records of one key: one of them, or one for every round."""

    records: tuple[Record, ...]
    source: Source

    def __getitem__(self, name: str) -> Any:
        """A field that is the same in every round."""
        return self.records[0][name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.records[0].get(name, default)

    @property
    def status(self) -> str:
        """ "measured" if every round was, else why not."""
        return next((str(record["status"]) for record in self.records if record["status"] != "measured"), "measured")

    @property
    def is_measured(self) -> bool:
        return self.status == "measured"

    @property
    def unquotable(self) -> str | None:
        """Why no ratio of it is to be printed; None if one may be, be it of some of its rounds only."""
        reasons = [record.get("unquotable") for record in self.records]
        return str(reasons[0]) if all(reasons) else None

    @property
    def wrong(self) -> str | None:
        """What of its answer no rounding explains; None if it is right."""
        return next((str(why) for record in self.records if (why := (record.get("errors") or {}).get("wrong"))), None)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that a machine's files say."""

    machine: str
    """The folder's name."""
    suites: Mapping[str, Sequence[Found]]
    passed_over: tuple[str, ...]
    """Files that were not used, and why."""


def read_machine(folder: Path, machine: str, *, only: Iterable[Path] | None = None) -> Results:
    """The newest records of one machine.

    Args:
        folder: holds a folder for each machine.
        only: files that may be read; all of them if not given.

    Raises:
        DataError: a file that is no result file.
    """
    allowed = None if only is None else {path.resolve() for path in only}
    files = [path for path in (folder / machine).glob("*.jsonl") if allowed is None or path.resolve() in allowed]
    return newest(files, machine)


def newest(files: Iterable[Path], machine: str = "") -> Results:
    """The newest records of every key among these files."""
    read = sorted((read_file(path) for path in files), key=age)
    suites: dict[str, dict[tuple[Any, ...], Found]] = {name: {} for name in SUITES}
    passed_over = []
    for _, _, source, records in read:
        if source.benchmark not in suites:
            if not source.benchmark.startswith(GPU_PREFIX):
                passed_over.append(f"{source.file}: of the benchmark {source.benchmark}, which is no suite")
            continue
        missing = missing_fields(records)
        if missing:
            passed_over.append(f"{source.file}: of an older form, without {', '.join(missing)}")
            continue
        suites[source.benchmark].update(grouped(records, source))
    found = {name: list(of.values()) for name, of in suites.items() if of}
    return Results(machine=machine, suites=found, passed_over=tuple(passed_over))


def missing_fields(records: Sequence[Record]) -> list[str]:
    """What the records of a suite should have and do not; of what was not measured, only who and why is asked."""
    found = {
        name: any(name not in record for record in records if record.get("status") == "measured" or name in WHO)
        for name in EVERY_RECORD
    }
    return [name for name, is_missing in found.items() if is_missing]


def grouped(records: Sequence[Record], source: Source) -> dict[tuple[Any, ...], Found]:
    """Key -> what one file says of it."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key_of(record), []).append(record)
    return {key: Found(records=tuple(of), source=source) for key, of in groups.items()}


def key_of(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in KEY)


def read_file(path: Path) -> tuple[str, int, Source, list[Record]]:
    """`(time, number of the day's run, source, records)` of a result file.

    Raises:
        DataError: it is empty, or a line is not a record.
    """
    records: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}; expected a JSON object; leave the file out") from error
        if not isinstance(record, dict) or any(name not in record for name in COMMON):
            raise DataError(f"{path}:{number}: expected an object with {', '.join(COMMON)}; leave the file out")
        records.append(record)
    if not records:
        raise DataError(f"{path}: is empty; expected a JSON object a line; leave the file out")
    first = records[0]
    source = Source(
        file=f"{path.resolve().parent.name}/{path.name}",
        **{name: first[name] for name in ("benchmark", "time", "commit", "command", "machine")},
    )
    return first["time"], _number(path), source, records


def age(read: tuple[str, int, Source, list[Record]]) -> tuple[str, int, str]:
    """Sorts what `read_file` gave, the newest last."""
    time, number, source, _ = read
    return time, number, source.file


def _number(path: Path) -> int:
    """Which of its day's runs a file is: `2026-11-21-ops-12.jsonl` is the 12th."""
    ending = re.search(r"-(\d+)\.jsonl$", path.name)
    return int(ending[1]) if ending else 1


def machines(folder: Path) -> list[str]:
    """Folders that hold results of a suite, GPUs' folders of `make gpu` alone left out."""
    return sorted({path.parent.name for path in folder.glob("*/*.jsonl") if f"-{GPU_PREFIX}" not in path.name})


def choose_machine(folder: Path, wanted: str | None = None) -> str:
    """The machine whose results are meant: as asked for, this one, or the only one.

    Raises:
        ConfigError: none, or several, and none of them is this machine.
    """
    there = machines(folder)
    if wanted is not None:
        if wanted not in there:
            raise ConfigError(
                f"machine={wanted!r}; expected one of {', '.join(there) or 'none'}, the folders of {folder}"
            )
        return wanted
    here = machine_name(describe_machine())
    if here in there:
        return here
    if len(there) != 1:
        raise ConfigError(
            f"results={folder} holds results of {', '.join(there) or 'no machine'}, and this one is {here}; "
            + ("name one with --machine" if there else "run: dpo-engine bench")
        )
    return there[0]


def tracked(folder: Path) -> list[Path] | None:
    """Result files under `folder` that git tracks (`git add` is enough); None where there is no checkout."""
    command = ["git", "ls-files", "-z", "--", "*.jsonl"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [folder / name for name in done.stdout.split("\0") if name]


def sources_of(found: Iterable[Found]) -> tuple[Source, ...]:
    """The files that these are from, each once, the newest first."""
    every = {of.source.file: of.source for of in found}
    return tuple(sorted(every.values(), key=lambda source: (source.time, source.file), reverse=True))
