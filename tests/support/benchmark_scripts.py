"""How does a test get at the modules of `benchmarks/`, which is not installed?"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from support.imports import ROOT


def load(name: str) -> ModuleType:
    """The module `benchmarks.<name>`."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # last, for its folder `kernels` is not the package of that name
    return importlib.import_module(f"benchmarks.{name}")
