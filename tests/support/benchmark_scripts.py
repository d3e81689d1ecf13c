"""How does a test get at the scripts in `benchmarks/`, which are no package?"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from support.imports import ROOT


def load(name: str) -> ModuleType:
    """The module of `benchmarks/<name>.py`, under the name by which the scripts import each other."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)
