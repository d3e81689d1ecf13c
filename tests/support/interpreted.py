"""Where do kernel cases run, and how does an address that overflows become an error there?

`DEVICE` is "cpu" under Triton's interpreter (TRITON_INTERPRET=1, which must be set before a kernel is imported) and
"cuda" on a machine with a GPU. Importing this module with neither skips the whole file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"


@contextmanager
def overflow_checked() -> Iterator[None]:
    """Within it, an int32 overflow in a kernel is an error instead of a wrong address; under the interpreter only."""
    if not INTERPRETED:
        pytest.skip("only the interpreter checks for overflow")
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    before = options.debug
    object.__setattr__(options, "debug", True)  # a frozen dataclass
    try:
        yield
    finally:
        object.__setattr__(options, "debug", before)
