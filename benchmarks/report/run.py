"""What was measured on a machine? Its newest results as pictures and one page.

    dpo-engine bench report                                   this machine's results -> runs/bench/<machine>/index.html
    python -m benchmarks.report --results DIR --output DIR    the same, of other files

All result files of the machine are read; of each case the newest record counts. The page is one file that needs no other, the
pictures lie beside it as PNG. What `make gpu` left stands in it too, whichever card it is from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.report import gpu
from benchmarks.report.page import render, sections
from benchmarks.report.results import choose_machine, read_machine
from dpo_engine.errors import ConfigError, DataError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="holds a folder for each machine")
    parser.add_argument("--machine", help="whose results; default: this machine's, or the only one's")
    parser.add_argument("--output", type=Path, help="folder to write to; default: runs/bench/<machine>")
    args = parser.parse_args(arguments)
    try:
        machine = choose_machine(args.results, args.machine)
        page = write(args.results, machine, args.output or ROOT / "runs" / "bench" / machine)
    except (ConfigError, DataError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"written to {page}")
    return 0


def write(folder: Path, machine: str, output: Path) -> Path:
    """Write page and pictures of a machine's results into `output`; returns the page."""
    results = read_machine(folder, machine)
    made = sections(results, gpu.newest_parts(folder))
    output.mkdir(parents=True, exist_ok=True)
    for section in made:
        for picture in section.pictures:
            (output / f"{picture.name}.png").write_bytes(picture.png)
    page = output / "index.html"
    page.write_text(render(made, results), encoding="utf-8")
    return page


if __name__ == "__main__":
    sys.exit(main())
