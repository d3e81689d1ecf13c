"""Does `linear_logps` multiply and hold no more than it says: 2 GEMMs for a frozen head, a tile instead of N*V?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_logps, plan
from support.call_cost import PeakBytes, Products

N, D, V = 1040, 16, 9000  # two row tiles, five slabs; a multiple of 16 rows, so that nothing is padded
GEMM = 2 * N * D * V


def inputs(*, trains: str, n: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(hidden, weight, bias, labels)`; those of h, w, b take a gradient whose letter is in `trains`."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, D), (V, D), (V,))]
    hidden, weight, bias = (t.requires_grad_(name in trains) for name, t in zip("hwb", tensors, strict=True))
    return hidden, weight, bias, torch.randint(0, V, (n,), generator=generator)


@pytest.mark.parametrize(
    "trains,forward,backward",
    [
        ("", 1, 0),
        ("h", 2, 0),  # frozen head: both in forward
        ("hwb", 1, 3),  # the tile again, dH, dW
        ("hw", 1, 3),
        ("w", 1, 2),
        ("hb", 1, 2),
        ("b", 1, 1),
    ],
)
def test_gemms_are_as_many_as_promised(trains: str, forward: int, backward: int) -> None:
    hidden, weight, bias, labels = inputs(trains=trains)
    with Products() as seen:
        logps = linear_logps(hidden, weight, labels, bias=bias, backend="tiled")
    # One dot product a row, for the label's logit, is not a GEMM.
    assert forward <= seen.flops / GEMM < forward + 0.01
    assert logps.requires_grad == bool(trains)
    if trains:
        with Products() as seen:
            logps.backward(torch.randn(N))
        assert backward <= seen.flops / GEMM < backward + 0.01


def test_a_frozen_head_costs_one_gemm_under_no_grad_too() -> None:
    hidden, weight, bias, labels = inputs(trains="hwb")
    with torch.no_grad(), Products() as seen:
        logps = linear_logps(hidden, weight, labels, bias=bias, backend="tiled")
    assert 1 <= seen.flops / GEMM < 1.01
    assert not logps.requires_grad


@pytest.mark.parametrize("trains,total", [("", 1), ("h", 2), ("hwb", 4)])
def test_rows_that_are_not_scored_enter_no_gemm(trains: str, total: int) -> None:
    hidden, weight, bias, labels = inputs(trains=trains)
    scored = torch.arange(0, N, 5)[:208]
    kept = labels[scored]
    labels = labels.new_full((N,), -100).index_copy(0, scored, kept)
    with Products() as seen:
        logps = linear_logps(hidden, weight, labels, bias=bias, backend="tiled")
        if trains:
            logps.sum().backward()
    assert total <= seen.flops / (2 * 208 * D * V) < total + 0.01


@pytest.mark.parametrize("trains", ["", "h", "hwb"])
def test_nothing_to_score_multiplies_nothing(trains: str) -> None:
    hidden, weight, bias, labels = inputs(trains=trains)
    with Products() as seen:
        logps = linear_logps(hidden, weight, labels.fill_(-100), bias=bias, backend="tiled")
        if trains:
            logps.sum().backward()
    assert seen.flops == 0


def peak(trains: str, backend: str, dtype: torch.dtype = torch.float32, **head: float) -> int:
    """Bytes at the peak of a forward and backward at N=2048, D=16, V=9000, beyond the inputs."""
    hidden, weight, _, labels = inputs(trains=trains, n=2048, dtype=dtype)
    with PeakBytes() as seen:
        logps = linear_logps(hidden, weight, labels, backend=backend, **head)
        if trains:
            logps.backward(torch.ones_like(logps))
    return seen.peak


LOGITS = 2048 * V * 4
TILE = 1024 * 2048 * 4


def test_the_definition_holds_all_logits() -> None:
    """So that the tests below would see it if the tiled path did."""
    assert peak("h", "reference") > 2 * LOGITS


@pytest.mark.parametrize("trains", ["", "h", "hw"])
def test_peak_memory_is_a_tile(trains: str) -> None:
    results = 4 * (2048 + V) * D * 4 if trains else 0  # gradients and their float32 sums
    assert peak(trains, "tiled") < 1.2 * TILE + results < LOGITS / 4


def test_a_softcap_adds_its_slope() -> None:
    assert peak("h", "tiled", softcap=5.0) < 3.3 * TILE < LOGITS / 2


@pytest.mark.parametrize("trains", ["h", "hw"])
def test_bfloat16_adds_a_slab_at_most(trains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "cpu_multiplies_bfloat16", lambda: False)
    results = 4 * (2048 + V) * D * 4
    assert peak(trains, "tiled", torch.bfloat16) < 1.2 * TILE + 4096 * D * 4 + results


def test_a_float32_copy_of_the_weight_is_never_larger_than_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """At D=2048 a slab of 4096 columns would be 32 MiB; it is cut to 16."""
    monkeypatch.setattr(plan, "cpu_multiplies_bfloat16", lambda: False)
    hidden = torch.randn(16, 2048).bfloat16()
    weight = torch.zeros(6000, 2048, dtype=torch.bfloat16)
    with PeakBytes() as seen:
        linear_logps(hidden, weight, torch.arange(16), backend="tiled")
    assert seen.peak < 18 << 20
