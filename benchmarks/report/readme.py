"""Which figures do README and docs show? Blocks between markers, written from the newest result files.

    dpo-engine bench readme                 write the blocks of README.md and docs/*.md anew
    dpo-engine bench readme --check         change nothing; exit status 1 and a diff where a page says something else
    git add benchmarks/results/...          first: of a checkout, files that git does not track are left out

A block stands between two lines, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; NAME is steps, ops, scale, memory, cache or gpu.
`<!-- bench:NAME machine=FOLDER -->` takes the results of that folder; otherwise those of the machine that was measured last count.
All else on a page is written by hand.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.report import cache, gpu, memory, ops, scale, steps
from benchmarks.report.results import Found, Results, Source, machines, read_machine, sources_of, tracked
from dpo_engine.errors import ConfigError, DataError

BLOCKS: dict[str, Callable[[Sequence[Found]], tuple[str, Sequence[Found]]]] = {
    "steps": steps.block,
    "ops": ops.block,
    "scale": scale.block,
    "memory": memory.block,
    "cache": cache.block,
}
"""Suite -> Markdown of its records, and those that it is from."""
GPU = "gpu"
NAMES = (*BLOCKS, GPU)
_MARKER = re.compile(r"<!-- (?P<end>/?)bench:(?P<name>[a-z]+)(?: machine=(?P<machine>[a-z0-9-]+))? -->")
_MEANT = re.compile(r"\s*<!--\s*/?\s*bench\b")

Block = Callable[[str, str | None], str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and docs/*.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is out of date")
    parser.add_argument("--results", type=Path, help="take all files of this folder; default: those that git tracks")
    args = parser.parse_args(arguments)
    try:
        figures = Figures(args.results) if args.results else published()
        changed = [
            (page, text, new)
            for page in args.pages or pages()
            if (new := with_figures(text := page.read_text(encoding="utf-8"), str(page), figures.block)) != text
        ]
    except (ConfigError, DataError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    for page, text, new in changed:
        if args.check:
            lines = difflib.unified_diff(
                text.splitlines(), new.splitlines(), f"{page}", f"{page}, from the results", "", ""
            )
            print("\n".join(line.rstrip("\n") for line in lines))
        else:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page}")
    if args.check and changed:
        print("run: dpo-engine bench readme", file=sys.stderr)
        return 1
    if not changed:
        print("every block is as the results have it")
    return 0


def pages(root: Path = ROOT) -> list[Path]:
    """Where blocks may stand."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def with_figures(text: str, page: str, block: Block) -> str:
    """The page with its blocks written anew.

    Args:
        page: its name, for messages.
        block: name and machine, or None -> what stands between the markers.

    Raises:
        DataError: a marker that is misspelt, is not closed, or names no block.
    """
    kept: list[str] = []
    open_at, name = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if not _MEANT.match(line):
            kept += [] if name else [line]
            continue
        marker = _MARKER.fullmatch(line)
        if marker is None:
            raise DataError(
                f"{page}:{number}: {line!r}; expected <!-- bench:NAME --> or <!-- /bench:NAME -->, alone on its line"
            )
        if marker["name"] not in NAMES:
            raise DataError(f"{page}:{number}: no block {marker['name']!r}; expected one of {', '.join(NAMES)}")
        if marker["end"]:
            if marker["name"] != name:
                raise DataError(
                    f"{page}:{number}: {line} closes what is not open; expected <!-- bench:{marker['name']} --> first"
                )
            kept += [line]
            name = ""
            continue
        if name:
            raise DataError(
                f"{page}:{number}: bench:{name} of line {open_at} is still open; expected <!-- /bench:{name} --> first"
            )
        open_at, name = number, marker["name"]
        kept += [line, block(name, marker["machine"])]
    if name:
        raise DataError(f"{page}:{open_at}: bench:{name} is not closed; expected <!-- /bench:{name} --> after it")
    return "\n".join(kept) + ("\n" if text.endswith("\n") else "")


class Figures:
    """The blocks of a folder of results."""

    def __init__(self, folder: Path, only: Sequence[Path] | None = None) -> None:
        """
        Args:
            folder: holds a folder for each machine.
            only: files that may be read; all of them if not given.
        """
        self.folder, self.only = folder, only
        self.results = {name: read_machine(folder, name, only=only) for name in machines(folder)}

    def block(self, name: str, machine: str | None = None) -> str:
        """What stands between the markers of `name`.

        Raises:
            ConfigError: there is no folder of that machine.
        """
        if name == GPU:
            text, sources = gpu.block(gpu.newest_parts(self.folder, self.only))
            return text + _provenance(sources)
        results = self._of(name, machine)
        if results is None:
            return f"Not measured. Run: `dpo-engine bench {name}`"
        text, used = BLOCKS[name](results.suites[name])
        return text + _provenance(sources_of(used))

    def _of(self, name: str, machine: str | None) -> Results | None:
        """Results of the machine that is meant; None where the suite was not measured."""
        if machine is not None and machine not in self.results:
            raise ConfigError(
                f"machine={machine}; expected one of {', '.join(self.results)}, the folders of {self.folder}"
            )
        there = [
            results for folder, results in self.results.items() if name in results.suites and machine in (None, folder)
        ]
        return max(there, key=lambda results: max(of.source.time for of in results.suites[name]), default=None)


def published(folder: Path = RESULTS) -> Figures:
    """Those of the files that git tracks, so that a run of your own changes no page; outside a checkout, of all files."""
    return Figures(folder, tracked(folder))


def _provenance(sources: Sequence[Source]) -> str:
    """The line that a block ends with."""
    said = [
        f"`benchmarks/results/{source.file}`, {source.date}, {source.machine_words}, commit {source.short_commit}"
        for source in sources
    ]
    return f"\n\n({'; '.join(said)})" if said else ""


if __name__ == "__main__":
    sys.exit(main())
