"""Where do the tests in `tests/gpu` run, and how is a call watched there?

On a CUDA device; with DPO_ENGINE_TEST_DEVICE=cpu on the CPU instead, as a trial of the tests themselves: what only a card has
(graphs, its allocator) is replaced by the nearest thing. Importing this module without either skips the whole file.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from dpo_engine.errors import BackendError
from dpo_engine.ops import BACKENDS, linear_logps
from support.call_cost import PeakBytes

DEVICE = os.environ.get("DPO_ENGINE_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
if ON_CUDA and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

Result = TypeVar("Result")


def possible_backends() -> list[str]:
    """Backends but "auto" that run here; on CUDA that is all of them, and a refusal is for a test to report."""
    return [name for name in BACKENDS if name != "auto" and (ON_CUDA or _runs(name))]


def _runs(backend: str) -> bool:
    one = torch.ones(1, 16, device=DEVICE)
    try:
        linear_logps(one, one, torch.zeros(1, dtype=torch.int64, device=DEVICE), backend=backend)
    except BackendError:
        return False
    return True


def peak_bytes(call: Callable[[], Result]) -> tuple[int, Result]:
    """`(bytes at the peak of a call beyond what was there before, its result)`."""
    gc.collect()
    if not ON_CUDA:
        with PeakBytes() as seen:
            result = call()
        return seen.peak, result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def captured(call: Callable[[], Result]) -> tuple[Callable[[], object], Result]:
    """`(replay, static result)` of a call as a CUDA graph; on the CPU the call is made now and never again."""
    if not ON_CUDA:
        return lambda: None, call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
