"""Where do kernel cases run, and how does an address that overflows become an error there?

`DEVICE` is "cpu" under Triton's interpreter (TRITON_INTERPRET=1, which must be set before a kernel is imported) and
"cuda" on a machine with a GPU. Importing this module with neither skips the whole file.

Under the interpreter, importing it also makes kernels faster: Triton goes through all of `triton.language` at every call of
a function within a kernel, `tl.max` included, to replace what it has replaced already. Here it does so once a launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = bool(triton.knobs.runtime.interpret)
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"


def _replace_once_a_launch() -> None:
    from triton import language
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def unless_replaced(function: Any) -> Any:
        languages = [seen for seen in function.__globals__.values() if seen is language or seen is language.core]
        if languages and all(seen.static_assert.__name__ == "_new_static_assert" for seen in languages):
            return interpreter._LangPatchScope()  # nothing to put back
        return replace(function)

    interpreter._patch_lang = unless_replaced


if INTERPRETED and hasattr(triton.runtime.interpreter, "_LangPatchScope"):
    _replace_once_a_launch()


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
