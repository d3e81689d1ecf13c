"""Do the Triton tile passes turn raw products into exponentials, sums and gradients as their definition says?

Run by `tests/reference/test_triton_kernels.py` in a process of its own, under Triton's interpreter. By hand, from the
root:

    TRITON_INTERPRET=1 python -m pytest tests/support/tile_pass_cases.py
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_engine.kernels import tile_pass as kernels
from dpo_engine.kernels.tile_pass import tile_backward, tile_pass
from dpo_engine.ops import tile_pass as twins
from support.interpreted import DEVICE, overflow_checked

# Half a unit in the last place; the interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
HEADS = [
    {},
    {"logit_scale": 0.25},
    {"softcap": 5.0},
    {"with_bias": True, "logit_scale": -1.5},
    {"with_bias": True, "logit_scale": 1.5, "softcap": 30.0},
]


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def head_of(columns: int, *, with_bias: bool = False, logit_scale: float = 1.0, softcap: float | None = None) -> dict:
    bias = normal(columns, seed=90) if with_bias else None
    return {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}


def logits_and_slope(
    tile: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    x = (tile.double() if bias is None else tile.double() + bias.double()) * logit_scale
    if softcap is None:
        return x, torch.ones_like(x)
    return softcap * torch.tanh(x / softcap), torch.cosh(x / softcap) ** -2


def defined_tile_pass(tile, labels, constants, sums, first_column, *, bias, logit_scale, softcap, margin):
    """`tile_pass` in float64, row by row: `(constants, sums, rescale, E)`."""
    z, slope = logits_and_slope(tile, bias, logit_scale, softcap)
    constants, sums, rescale = (
        constants.double(),
        sums.double(),
        torch.ones(len(labels), dtype=torch.float64, device=DEVICE),
    )
    weights = torch.zeros_like(z)
    for i, label in enumerate(labels.tolist()):
        others = [v for v in range(z.shape[1]) if v + first_column != label and z[i, v] != -math.inf]
        largest = max((z[i, v].item() for v in others), default=-math.inf)
        if largest > constants[i] + margin:
            rescale[i] = math.exp(constants[i].item() - largest)
            constants[i] = largest
        weights[i, others] = (z[i, others] - constants[i]).exp()
        sums[i] = sums[i] * rescale[i] + weights[i].sum()
    return constants, sums, rescale, weights * slope


def close(given: Tensor, want: Tensor, relative: float, absolute: float = 0.0) -> None:
    torch.testing.assert_close(given.double(), want.double(), rtol=relative, atol=absolute)


# The dtype only rounds what is stored: in 16 bits one head shows it, the others are slow.
DTYPES_AND_HEADS = [
    (dtype, head) if dtype == torch.float32 or head is HEADS[-1] else pytest.param(dtype, head, marks=pytest.mark.slow)
    for dtype in ROUNDING
    for head in HEADS
]


@pytest.mark.parametrize("dtype,head", DTYPES_AND_HEADS, ids=str)
@pytest.mark.parametrize("rows,columns", [(1, 1), (5, 257), (3, 2048), (2, 4100)])
def test_exponentials_and_sums_are_those_of_the_definition(
    rows: int, columns: int, dtype: torch.dtype, head: dict
) -> None:
    first = 1000
    tile, named = normal(rows, columns, seed=1, scale=4.0), head_of(columns, **head)
    edges = torch.tensor([first, first + columns - 1, first - 1, first + columns, first + columns // 2], device=DEVICE)
    labels = edges[:rows]
    constants, sums = normal(rows, seed=2), normal(rows, seed=3).abs()
    constants[-1] = -3.0
    out = torch.full((rows, columns), math.nan, dtype=dtype, device=DEVICE)
    want = defined_tile_pass(tile, labels, constants, sums, first, margin=6.0, **named)
    kept = tile.clone()
    rescale = tile_pass(tile, labels, constants, sums, first, margin=6.0, out=out, **named)
    assert torch.equal(tile, kept)
    # exp(z - c) has the rounding of z, |z| <= 40, beside its own.
    close(constants, want[0], 1e-6, 1e-6)
    close(sums, want[1], 2e-5)
    close(rescale, want[2], 2e-5)
    close(out, want[3], 2e-5 + ROUNDING[dtype], 1e-7 if dtype == torch.float16 else 1e-30)
    for i, label in enumerate(labels.tolist()):
        if first <= label < first + columns:
            assert out[i, label - first] == 0


def test_the_constant_moves_only_past_the_margin_and_says_by_what_factor() -> None:
    tile = torch.zeros(4, 40, device=DEVICE)
    tile[:, 7] = torch.tensor([9.9, 10.1, 50.0, 50.0])
    labels = torch.tensor([0, 0, 0, 7], device=DEVICE)  # the last row's peak is its own label
    constants, sums = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    rescale = tile_pass(tile, labels, constants, sums, 0, margin=10.0, out=None)
    assert constants.tolist() == pytest.approx([0.0, 10.1, 50.0, 0.0])
    assert rescale[0] == 1 and rescale[3] == 1
    close(rescale[1:3], torch.tensor([-10.1, -50.0]).exp(), 1e-5)
    close(sums[0], torch.tensor(1 + 38 + math.exp(9.9)), 1e-6)
    close(sums[1], torch.tensor(1 + 39 * math.exp(-10.1)), 1e-6)
    assert sums[3] == 1 + 39


def test_a_row_without_a_constant_forgets_what_it_summed_before() -> None:
    tile = normal(2, 50, seed=4)
    labels = torch.tensor([3, 99], device=DEVICE)
    constants, sums = torch.full((2,), -math.inf, device=DEVICE), torch.zeros(2, device=DEVICE)
    rescale = tile_pass(tile, labels, constants, sums, 0, margin=60.0, out=torch.empty_like(tile))
    assert rescale.tolist() == [0.0, 0.0]
    tile[0, 3] = -math.inf
    close(constants, tile.amax(1), 1e-7)
    close(constants + sums.log(), tile.logsumexp(1), 1e-6)


def test_a_tile_of_minus_infinity_changes_nothing() -> None:
    tile, bias = normal(2, 50, seed=5), torch.full((50,), -math.inf, device=DEVICE)
    labels = torch.tensor([3, 99], device=DEVICE)
    constants, sums = torch.tensor([-math.inf, 2.0], device=DEVICE), torch.tensor([0.0, 1.5], device=DEVICE)
    out = torch.full_like(tile, math.nan)
    rescale = tile_pass(tile, labels, constants, sums, 0, bias=bias, margin=60.0, out=out)
    assert constants.tolist() == [-math.inf, 2.0] and sums.tolist() == [0.0, 1.5] and rescale.tolist() == [1.0, 1.0]
    assert (out == 0).all()


def test_an_infinite_product_under_a_softcap_is_the_softcap() -> None:
    tile = torch.tensor([[-math.inf, 0.0, math.inf, 0.0]], device=DEVICE)
    constants, sums, out = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE), torch.empty_like(tile)
    tile_pass(tile, torch.tensor([3], device=DEVICE), constants, sums, 0, softcap=2.0, margin=60.0, out=out)
    close(sums, torch.tensor([math.exp(-2) + 1 + math.exp(2)]), 1e-6)
    assert out.tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_the_second_product_may_be_spared() -> None:
    tile, labels = normal(3, 70, seed=6), torch.tensor([1, 2, 3], device=DEVICE)
    results = []
    for out in (None, torch.empty_like(tile)):
        constants, sums = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
        tile_pass(tile, labels, constants, sums, 0, softcap=4.0, margin=60.0, out=out)
        results.append(sums)
    assert torch.equal(*results)


def test_in_place_and_strided_tiles_do_not_change_a_bit() -> None:
    tile, labels, named = (
        normal(4, 100, seed=7),
        torch.tensor([0, 20, 99, 500], device=DEVICE),
        head_of(100, with_bias=True, softcap=9.0),
    )
    wide = normal(8, 200, seed=8)
    wide[::2, 1::2] = tile
    wide_bias = normal(200, seed=9)
    wide_bias[::2] = named["bias"]
    row = normal(4, seed=10)

    def passes(tile: Tensor, out: Tensor, bias: Tensor) -> list[Tensor]:
        constants, sums = row.clone(), row.abs()
        rest = {**named, "bias": bias}
        rescale = tile_pass(tile, labels, constants, sums, 0, margin=1.0, out=out, **rest)
        return [constants, sums, rescale, out.clone()]

    def backward(tile: Tensor, out: Tensor, bias: Tensor) -> list[Tensor]:
        tile_backward(tile, labels, row, row + 1, row + 2, 0, out=out, **{**named, "bias": bias})
        return [out.clone()]

    for function in (passes, backward):
        plain = function(tile, torch.empty_like(tile), named["bias"])
        in_place = tile.clone()
        strided_out = normal(8, 200, seed=11)
        around = strided_out.clone()
        for results in (
            function(in_place, in_place, named["bias"]),
            function(wide[::2, 1::2], torch.empty_like(tile), wide_bias[::2]),
            function(tile.t().contiguous().t(), torch.empty_like(tile), named["bias"]),
            function(tile, strided_out[1::2, ::2], named["bias"]),
        ):
            assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))
        strided_out[1::2, ::2] = around[1::2, ::2]
        assert torch.equal(strided_out, around)  # nothing was written between the strides


def test_sums_are_taken_before_rounding_and_without_the_slope() -> None:
    """1000 exponentials that bfloat16 would all round to the same side, under a cap that would shrink them."""
    tile = torch.full((1, 1000), math.log(1 + 2**-9), device=DEVICE)
    for softcap in (None, 0.01):
        constants, sums = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
        out = torch.empty(1, 1000, dtype=torch.bfloat16, device=DEVICE)
        tile_pass(tile, torch.tensor([5000], device=DEVICE), constants, sums, 0, softcap=softcap, margin=60.0, out=out)
        z = logits_and_slope(tile, None, 1.0, softcap)[0]
        close(sums, z.exp().sum(1), 1e-6)


def test_a_nan_stays_in_its_row() -> None:
    tile, labels = normal(3, 40, seed=12), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    tile[1, 5] = math.nan
    constants, sums = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    tile_pass(tile, labels, constants, sums, 0, margin=60.0, out=None)
    assert sums.isnan().tolist() == [False, True, False]


def defined_moments(tile: Tensor, labels: Tensor, constants: Tensor, first_column: int, **head) -> Tensor:
    """The four moments of a whole row in float64, relative to the `constants` it ended with."""
    z = logits_and_slope(tile, **head)[0]
    moments = torch.zeros(4, len(labels), dtype=torch.float64, device=DEVICE)
    moments[0] = moments[3] = -math.inf
    for i, label in enumerate(labels.tolist()):
        others = [v for v in range(z.shape[1]) if v + first_column != label and z[i, v] != -math.inf]
        if others:
            away = z[i, others] - constants[i].double()
            moments[0, i] = z[i, others].max()
            moments[1, i] = (away.exp() * away).sum()
            moments[2, i] = (2 * away).exp().sum()
        if first_column <= label < first_column + z.shape[1]:
            moments[3, i] = z[i, label - first_column]
    return moments


def no_moments(rows: int) -> Tensor:
    return torch.tensor([[-math.inf], [0.0], [0.0], [-math.inf]], device=DEVICE).repeat(1, rows)


@pytest.mark.parametrize(
    "start,in_place,head",
    [("nothing", False, head) for head in HEADS]
    + [
        pytest.param("label", True, head, marks=[] if head in (HEADS[0], HEADS[-1]) else pytest.mark.slow)
        for head in HEADS
    ],
    ids=str,
)
def test_moments_of_slab_after_slab_are_those_of_the_whole_row(start: str, in_place: bool, head: dict) -> None:
    """Logits that rise from slab to slab, so that a constant that starts from nothing moves again and again."""
    rows, columns, first, slab = 6, 230, 50, 64
    tile, named = normal(rows, columns, seed=23, scale=2.0), head_of(columns, **head)
    rise = 1 if head.get("logit_scale", 1.0) > 0 else -1
    tile += rise * torch.linspace(0, 12, columns, device=DEVICE)
    tile[2] -= rise * 300.0  # far below its label's logit wherever there is no softcap: every exponential is 0
    labels = torch.tensor([50, 279, 113, 114, 49, 280], device=DEVICE)
    z = logits_and_slope(tile, **named)[0]
    constants = torch.full((rows,), -math.inf, device=DEVICE)
    if start == "label":
        constants[:4] = z.gather(1, (labels - first).clamp(0, columns - 1)[:, None]).squeeze(1).float()[:4]
        constants[2] += 300.0
    sums, plain_sums, plain_constants = torch.zeros(rows, device=DEVICE), torch.zeros(rows, device=DEVICE), None
    moments, plain_constants, moved = no_moments(rows), constants.clone(), 0
    for begin in range(0, columns, slab):
        part = tile[:, begin : begin + slab].clone()
        rest = {**named, "bias": None if named["bias"] is None else named["bias"][begin : begin + slab]}
        plain_out, out = torch.empty_like(part), part if in_place else torch.empty_like(part)
        common = dict(margin=1.5, **rest)
        plain = tile_pass(part, labels, plain_constants, plain_sums, first + begin, out=plain_out, **common)
        rescale = tile_pass(part, labels, constants, sums, first + begin, out=out, moments=moments, **common)
        moved += int(((rescale != 1) & (rescale != 0)).sum())
        assert torch.equal(rescale, plain) and torch.equal(out, plain_out)
    assert torch.equal(sums, plain_sums) and torch.equal(constants, plain_constants)
    assert moved > rows or head.get("logit_scale") == 0.25 or "softcap" in head
    want = defined_moments(tile, labels, constants, first, **named)
    close(moments[0], want[0], 1e-6, 1e-6)
    # Terms of both signs: what counts is the error beside the sum of their sizes, and z itself is rounded.
    others = torch.ones_like(z, dtype=torch.bool)
    others.scatter_(1, (labels - first).clamp(0, columns - 1)[:, None], False)
    others[4:] = True
    away = z - constants.double()[:, None]
    size = torch.where(others, away.exp() * (away.abs() + 0.1), 0.0).sum(1)
    assert ((moments[1].double() - want[1]).abs() <= 5e-5 * size + 1e-30).all()
    close(moments[2], want[2], 5e-5, 1e-30)
    close(moments[3], want[3], 1e-6, 1e-6)


def test_moments_of_columns_of_minus_infinity_are_not_nan() -> None:
    tile, labels = normal(3, 50, seed=24), torch.tensor([3, 99, 4], device=DEVICE)
    bias = torch.full((50,), -math.inf, device=DEVICE)
    constants, sums = torch.tensor([-math.inf, 2.0, 0.0], device=DEVICE), torch.zeros(3, device=DEVICE)
    moments = no_moments(3)
    tile_pass(tile, labels, constants, sums, 0, bias=bias, margin=20.0, out=None, moments=moments)
    assert torch.equal(moments, no_moments(3))
    bias[7] = 0.0
    tile_pass(tile, labels, constants, sums, 0, bias=bias, margin=20.0, out=None, moments=moments)
    close(moments, defined_moments(tile, labels, constants, 0, bias=bias, logit_scale=1.0, softcap=None), 1e-6)


def test_a_nan_reaches_the_moments_of_its_own_row_only() -> None:
    tile, labels = normal(3, 40, seed=12), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    tile[1, 5] = math.nan
    constants, sums, moments = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE), no_moments(3)
    tile_pass(tile, labels, constants, sums, 0, margin=20.0, out=None, moments=moments)
    assert moments[1:3].isnan().tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("start", ["label", "nothing", "rising"])
def test_slab_after_slab_gives_log_probs_and_gradients_of_the_definition(start: str, softcap: float | None) -> None:
    """The whole loop of the frozen head, in float32, with constants that never, once and always move."""
    n, vocabulary, depth, logit_scale, slab = 6, 90, 12, 1.5, 16
    hidden, weight = normal(n, depth, seed=13), normal(vocabulary, depth, seed=14)
    if start == "rising":
        weight *= torch.linspace(0.1, 6.0, vocabulary, device=DEVICE)[:, None]
    labels = torch.tensor([0, 15, 16, 40, 88, 89], device=DEVICE)
    exact = hidden.double().requires_grad_()
    z = logits_and_slope(exact @ weight.double().T, None, logit_scale, softcap)[0]
    want = z.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    (want_unit,) = torch.autograd.grad(want.sum(), exact)

    own, own_slope = logits_and_slope(hidden @ weight.T, None, logit_scale, softcap)
    z_label, slope_label = (t.gather(1, labels[:, None]).squeeze(1).float() for t in (own, own_slope))
    constants = z_label.clone() if start == "label" else torch.full_like(z_label, -math.inf)
    sums, weighted, moves = torch.zeros_like(z_label), torch.zeros_like(hidden), 0
    for first in range(0, vocabulary, slab):
        part = weight[first : first + slab]
        tile = hidden @ part.T
        out = torch.empty_like(tile)
        margin = 60.0 if start == "label" else 0.5
        rescale = tile_pass(
            tile, labels, constants, sums, first, logit_scale=logit_scale, softcap=softcap, margin=margin, out=out
        )
        moves += int((rescale != 1).sum())
        weighted = weighted * rescale[:, None] + out @ part
    assert (moves == 0) == (start == "label") and (start != "rising" or softcap or moves > 2 * n)
    t = (z_label - constants).exp()
    close(-(sums / t).log1p(), want.detach(), 1e-5, 1e-6)
    unit = logit_scale * ((sums * slope_label)[:, None] * weight[labels] - weighted) / (sums + t)[:, None]
    close(unit, want_unit, 1e-5, 1e-5)

    grad = torch.tensor([1.0, 0.0, -2.0, 0.5, 1e-3, -1.0], device=DEVICE)
    row_weights = grad * logit_scale / (sums + t)
    backward = torch.zeros_like(hidden)
    for first in range(0, vocabulary, slab):
        part = weight[first : first + slab]
        tile = hidden @ part.T
        tile_backward(
            tile, labels, constants, row_weights, row_weights * sums * slope_label, first,
            logit_scale=logit_scale, softcap=softcap, out=tile,
        )  # fmt: skip
        backward += tile @ part
    close(backward, want_unit * grad[:, None], 1e-5, 1e-5)
    assert (backward[1] == 0).all()


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_the_backward_tile_is_that_of_the_definition(dtype: torch.dtype, head: dict) -> None:
    rows, columns, first = 5, 2100, 300
    tile, named = normal(rows, columns, seed=15, scale=3.0), head_of(columns, **head)
    labels = torch.tensor([300, 299, 2399, 2400, 2348], device=DEVICE)
    constants, row_weights, label_weights = normal(rows, seed=16) + 8, normal(rows, seed=17), normal(rows, seed=18)
    row_weights[3] = 0.0
    out = torch.full((rows, columns), math.nan, dtype=dtype, device=DEVICE)
    tile_backward(tile, labels, constants, row_weights, label_weights, first, out=out, **named)
    z, slope = logits_and_slope(tile, **named)
    want = -row_weights.double()[:, None] * (z - constants.double()[:, None]).exp() * slope
    for i, label in enumerate(labels.tolist()):
        if first <= label < first + columns:
            want[i, label - first] = label_weights[i]
    close(out, want, 2e-5 + ROUNDING[dtype], 1e-7 if dtype == torch.float16 else 1e-30)


@pytest.mark.parametrize("name", ["tile_pass", "tile_backward"])
def test_the_plain_torch_twin_takes_the_same_arguments_and_gives_the_same_numbers(name: str) -> None:
    ours, twin = getattr(kernels, name), getattr(twins, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)
    tile, labels = normal(5, 130, seed=19, scale=5.0), torch.tensor([7, 99, 100, 229, 230], device=DEVICE)
    named = head_of(130, with_bias=True, logit_scale=1.2, softcap=20.0)
    results = []
    for function in (ours, twin):
        rows = [normal(5, seed=20), normal(5, seed=21).abs()]
        out = torch.empty_like(tile)
        if name == "tile_pass":
            rows[0][2], rows[1][2] = -math.inf, 0.0
            moments = no_moments(5)
            rows.append(function(tile.clone(), labels, *rows, 100, margin=5.0, out=out, moments=moments, **named))
            rows.append(moments)
        else:
            rows[0] += 10
            function(tile.clone(), labels, *rows, rows[1] + 1, 100, out=out, **named)
        results.append([*rows, out])
    for a, b in zip(*results, strict=True):
        close(a, b, 2e-5, 1e-30)


def test_a_tile_without_rows_is_nothing_to_do() -> None:
    empty, labels = torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    tile = torch.empty(0, 40, device=DEVICE)
    assert tile_pass(tile, labels, empty, empty, 0, margin=60.0, out=tile).shape == (0,)
    tile_backward(tile, labels, empty, empty, empty, 0, out=tile)


def test_what_does_not_fit_is_refused_with_one_line() -> None:
    tile, labels, row = (
        normal(4, 40, seed=22),
        torch.zeros(4, dtype=torch.int64, device=DEVICE),
        torch.zeros(4, device=DEVICE),
    )
    with pytest.raises(ValueError, match=r"tile_pass: tile is \(4, 40\) torch.bfloat16; expected \(R, C\) float32"):
        tile_pass(tile.bfloat16(), labels, row, row, 0, margin=60.0, out=None)
    with pytest.raises(ValueError, match=r"constants is \(4,\) torch.float64.*expected \(4,\) float32, contiguous"):
        tile_pass(tile, labels, row.double(), row, 0, margin=60.0, out=None)
    with pytest.raises(ValueError, match=r"sums is \(4,\) torch.float32, strides \(2,\)"):
        tile_pass(tile, labels, row, torch.zeros(8, device=DEVICE)[::2], 0, margin=60.0, out=None)
    with pytest.raises(ValueError, match=r"out is \(4, 39\); expected the tile's \(4, 40\)"):
        tile_backward(tile, labels, row, row, row, 0, out=tile[:, :39])
    with pytest.raises(ValueError, match=r"moments is \(4, 3\) torch.float32.*expected \(4, 4\) float32, contiguous"):
        tile_pass(tile, labels, row, row, 0, margin=20.0, out=None, moments=torch.zeros(4, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"bias \(39,\) do not fit"):
        tile_pass(tile, labels, row, row, 0, bias=tile[0, :39], margin=60.0, out=None)


@triton.jit
def _kernel_with_a_32_bit_address(pointer, stride):
    tl.load(pointer + (tl.program_id(0) + 2) * stride, mask=tl.program_id(0) < 0)


def test_the_check_for_overflow_finds_a_32_bit_address() -> None:
    with overflow_checked(), pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        _kernel_with_a_32_bit_address[(1,)](torch.zeros(1, device=DEVICE), 1 << 30)


@pytest.mark.parametrize("large", ["stride_tile_r", "stride_out_r", "stride_tile_c", "stride_out_c", "stride_bias"])
def test_addresses_past_two_to_the_31_are_computed_in_int64(large: str) -> None:
    """Rows or columns 2**30 elements apart, in no memory: only column 0 of row 0 is inside, but all are addressed."""
    names = ["stride_tile_r", "stride_tile_c", "stride_bias", "stride_out_r", "stride_out_c"]
    strides = [1 << 30 if name == large else 1 for name in names]
    floats, labels = torch.zeros(8, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)
    rows, columns = (3, 0) if large.endswith("_r") else (1, 1)
    flags = {"HAS_BIAS": True, "HAS_SOFTCAP": False, "BLOCK_C": 16}
    with overflow_checked():
        kernels._tile_pass_kernel[(rows,)](
            floats, floats, labels, floats.clone(), floats.clone(), floats.clone(), floats.clone(), floats.clone(),
            columns, 0, *strides, 1.0, 1.0, 60.0, HAS_OUT=True, HAS_MOMENTS=True, **flags,
        )  # fmt: skip
        kernels._tile_backward_kernel[(rows,)](
            floats, floats, labels, floats, floats, floats, floats.clone(), columns, 0, *strides, 1.0, 1.0, **flags
        )
