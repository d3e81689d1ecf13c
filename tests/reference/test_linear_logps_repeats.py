"""Do the same inputs give the same bits, forward and backward, every time?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_logps
from support.head_distributions import normal, random_labels, upstream

N, D, V = 530, 16, 4500
ALL = ("entropy", "log_sum_squares", "is_top1")
PATHS = ("no gradient", "frozen", "trainable", "LoRA")


def results(path: str, backend: str) -> list[Tensor]:
    """Log-probs, extras and every gradient, of inputs that are made anew: their addresses differ from call to call."""
    tensors = [normal(*shape, seed=seed) for seed, shape in enumerate(((N, D), (V, D), (V,), (N, 4), (V, 4)))]
    trained = {"no gradient": "", "frozen": "0", "trainable": "012", "LoRA": "034"}[path]
    hidden, weight, bias, *lora = (t.requires_grad_(str(i) in trained) for i, t in enumerate(tensors))
    labels = random_labels(N, V)
    labels[::5] = -100
    logps, extras = linear_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        softcap=6.0,
        backend=backend,
        extras=ALL,
        lora=lora if path == "LoRA" else None,
    )
    if trained:
        logps.backward(upstream(N))
    return [logps.detach(), *extras, *(t.grad for t in tensors if t.grad is not None)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Two numbers of threads need not agree with each other: a product is cut into other pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_the_same_call_gives_the_same_bits_every_time(backend: str, path: str, threads: int) -> None:
    first, again = (results(path, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_where_torch_is_told_to_be_deterministic_nothing_is_refused_or_changed(backend: str, path: str) -> None:
    """It raises for an operation that has no deterministic form, and fills new memory with NaN."""
    usual = results(path, backend)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        strict = results(path, backend)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(usual, strict, strict=True))
