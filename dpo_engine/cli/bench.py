"""`dpo-engine bench`: where are the benchmarks, and what do they say? They belong to a checkout, not to a wheel."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_engine.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def bench_command(arguments: Sequence[str]) -> int:
    """Hand `arguments` to the checkout's `benchmarks.bench`.

    Returns:
        Its exit status.

    Raises:
        ConfigError: this is no checkout.
    """
    root = checkout()
    sys.path.insert(0, str(root))
    return int(importlib.import_module("benchmarks.bench").main(arguments))


def checkout(package: Path = PACKAGE) -> Path:
    """The folder that holds the package and `benchmarks/`, or the working folder where that is a checkout.

    Raises:
        ConfigError: neither is.
    """
    for root in (package.parent, Path.cwd()):
        if (root / "benchmarks" / "bench.py").exists() and (root / "dpo_engine").is_dir():
            return root
    raise ConfigError(
        f"dpo-engine bench: {package.parent} has no benchmarks/; they come with the source, not with a wheel; "
        "clone the repository and run `make bench` there"
    )
