"""Does one GEMM with exponentials for an epilogue do what a product and `tile_pass` do after each other?

Run by `tests/reference/test_triton_kernels.py` in a process of its own, under Triton's interpreter. By hand, from the
root:

    TRITON_INTERPRET=1 python -m pytest tests/support/exp_epilogue_cases.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_engine.kernels import exp_epilogue, product
from dpo_engine.kernels.exp_epilogue import product_and_pass
from dpo_engine.kernels.tile_pass import tile_pass
from dpo_engine.kernels.tiles import Tiles
from support.interpreted import DEVICE, INTERPRETED, overflow_checked
from support.row_bound import logits_in_float64, row_bound

# Half a unit in the last place; the interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
POINTERS = Tiles(rows=16, columns=32, depth=32, warps=4, stages=1)
DESCRIPTORS = Tiles(rows=16, columns=32, depth=16, warps=4, stages=1, descriptors=True)
HEADS = [
    {},
    {"logit_scale": 0.25},
    {"softcap": 5.0},
    {"with_bias": True, "logit_scale": -1.5},
    {"with_bias": True, "logit_scale": 1.5, "softcap": 30.0},
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is slow under the interpreter, and a program of two has several blocks to redo."""
    monkeypatch.setattr(exp_epilogue, "_REDO_PROGRAMS", 2)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).to(DEVICE)


def exact(*shape: int, seed: int) -> Tensor:
    """Small multiples of 1/8: every order of summing their products gives the same bits."""
    return normal(*shape, seed=seed).mul(8).round().clamp(-16, 16) / 8


def head_of(columns: int, *, with_bias: bool = False, logit_scale: float = 1.0, softcap: float | None = None) -> dict:
    bias = exact(columns, seed=90) if with_bias else None
    return {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}


def close(given: Tensor, want: Tensor, relative: float, absolute: float = 0.0) -> None:
    torch.testing.assert_close(given.double(), want.double(), rtol=relative, atol=absolute)


def both_ways(
    rows: Tensor, slab: Tensor, labels: Tensor, constants: Tensor, sums: Tensor, first: int, **named: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """`(constants, sums, rescale, E)` of the fused kernel, and of the product in float32 followed by `tile_pass`."""
    tiles = named.pop("tiles", None)
    results = []
    for fused in (True, False):
        state = [constants.clone(), sums.clone()]
        out = torch.full((rows.shape[0], slab.shape[0]), math.nan, dtype=rows.dtype, device=DEVICE)
        if fused:
            rescale = product_and_pass(rows, slab, labels, *state, first, out=out, tiles=tiles, **named)
        else:
            rescale = tile_pass(rows.float() @ slab.float().T, labels, *state, first, out=out, **named)
        results.append([*state, rescale, out])
    return results[0], results[1]


DTYPES_AND_HEADS = [(torch.float32, head) for head in HEADS]
DTYPES_AND_HEADS += [(dtype, HEADS[-1]) for dtype in ROUNDING if dtype.itemsize == 2]


@pytest.mark.parametrize("tiles", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(
    "n,columns,depth,dtype,head",
    [
        # Every head where blocks are cut off on every side, and every shape with the head that has everything.
        pytest.param(*shape, *given, marks=[] if shape[0] == 5 or given[1] is HEADS[-1] else pytest.mark.slow)
        for shape in ((1, 1, 8), (5, 97, 40), (18, 40, 16))
        for given in DTYPES_AND_HEADS
    ],
    ids=str,
)
def test_it_gives_what_a_product_and_a_tile_pass_give(
    n: int, columns: int, depth: int, dtype: torch.dtype, head: dict, tiles: Tiles
) -> None:
    """Rows whose constant stays, moves and comes into being, in blocks that are cut off on every side."""
    first, rows, slab = 1000, exact(n, depth, seed=1).to(dtype), exact(columns, depth, seed=2).to(dtype)
    edges = torch.tensor([first, first + columns - 1, first - 1, first + columns, first + columns // 2], device=DEVICE)
    labels = edges.repeat(-(-n // 5))[:n]
    constants, sums = normal(n, seed=3), normal(n, seed=4).abs()
    constants[-1] = -3.0
    constants[n // 2], sums[n // 2] = -math.inf, 0.0
    ours, want = both_ways(
        rows, slab, labels, constants, sums, first, margin=6.0, tiles=tiles, **head_of(columns, **head)
    )
    assert n == 1 or (want[2] != 1).any()
    close(ours[0], want[0], 1e-6)
    close(ours[1], want[1], 1e-5)
    close(ours[2], want[2], 1e-5)
    close(ours[3], want[3], 1e-5 + ROUNDING[dtype], 1e-7 if dtype == torch.float16 else 1e-30)
    for i, label in enumerate(labels.tolist()):
        if first <= label < first + columns:
            assert ours[3][i, label - first] == 0


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize(
    "start,tiles",
    [
        ("label", POINTERS),
        ("nothing", POINTERS),
        ("rising", POINTERS),
        ("rising", DESCRIPTORS),
        ("confident", DESCRIPTORS),
        ("hopeless", POINTERS),
        ("huge", POINTERS),
    ],
    ids=lambda value: value if isinstance(value, str) else "descriptors" if value.descriptors else "pointers",
)
def test_slab_after_slab_gives_log_probs_and_gradients_of_the_definition(
    start: str, softcap: float | None, tiles: Tiles
) -> None:
    """The whole loop of the frozen head in float32: constants that never, once, late and always move."""
    n, vocabulary, depth, logit_scale, slab = 18, 130, 16, 1.5, 40
    hidden, weight = normal(n, depth, seed=13), normal(vocabulary, depth, seed=14)
    labels = torch.arange(n, device=DEVICE) * 7
    if start == "rising":
        weight += torch.linspace(0, 8, vocabulary, device=DEVICE)[:, None] * hidden[3].sign()
    if start == "confident":
        hidden = weight[labels] * 2.5
    if start == "hopeless":
        weight[-1] = 60 * hidden[5] / hidden[5].square().sum()  # one row's peak, in the last slab
        weight[labels[5]] = -weight[-1]
    if start == "huge":
        logit_scale = 200.0
    exact_hidden = hidden.double().requires_grad_()
    z = logits_in_float64(exact_hidden, weight, None, logit_scale, softcap)
    # The label's own exponential kept apart: exp(-27) loses digits beside 1.
    others = z.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    want = -torch.nn.functional.softplus(others - z.gather(1, labels[:, None]).squeeze(1), threshold=500)
    (want_unit,) = torch.autograd.grad(want.sum(), exact_hidden)

    x = logit_scale * (hidden * weight[labels]).sum(1)
    z_label = x if softcap is None else softcap * torch.tanh(x / softcap)
    slope_label = torch.ones_like(x) if softcap is None else torch.cosh(x / softcap) ** -2
    constants = torch.full_like(z_label, -math.inf) if start in ("nothing", "rising") else z_label.clone()
    margin = 0.5 if start in ("nothing", "rising") else 60.0
    sums, weighted, moves = torch.zeros_like(z_label), torch.zeros_like(hidden), []
    for first in range(0, vocabulary, slab):
        part = weight[first : first + slab]
        out = torch.full((n, part.shape[0]), math.nan, device=DEVICE)
        rescale = product_and_pass(
            hidden, part, labels, constants, sums, first,
            logit_scale=logit_scale, softcap=softcap, margin=margin, out=out, tiles=tiles,
        )  # fmt: skip
        moves.append((rescale != 1).sum().item())
        weighted = weighted * rescale[:, None] + out @ part
    if start in ("label", "confident") or (softcap and start in ("hopeless", "huge")):
        assert sum(moves) == 0
    elif start == "hopeless":
        assert moves[-1] >= 1 and sum(moves) < n / 2
    elif softcap is None:
        assert sum(moves) > n
    t = (z_label - constants).exp()
    logps = torch.where(t > 1e-20, -(sums / t).log1p(), z_label - constants - (sums + t).log())
    bound = row_bound(hidden, weight, None, logit_scale)
    assert ((logps.double() - want.detach()).abs() <= bound).all()
    unit = logit_scale * ((sums * slope_label)[:, None] * weight[labels] - weighted) / (sums + t)[:, None]
    largest = weight.double().norm(dim=1).max() * logit_scale
    assert ((unit.double() - want_unit).norm(dim=1) <= bound * largest + 1e-6 * want_unit.norm(dim=1)).all()
    if start == "confident" and softcap is None:
        assert (want.detach() > -1e-9).sum() >= 5  # what makes the relative error below worth asking for
        close(logps, want.detach(), 5e-5)  # |z| reaches 100, and exp(z - c) has the rounding of z


def test_the_constant_moves_only_past_the_margin_and_says_by_what_factor() -> None:
    rows, slab = torch.ones(4, 16, device=DEVICE), torch.zeros(40, 16, device=DEVICE)
    slab[7, 0] = 1.0
    rows[:, 0] = torch.tensor([9.9, 10.1, 50.0, 50.0])
    labels = torch.tensor([0, 0, 0, 7], device=DEVICE)  # the last row's peak is its own label
    constants, sums = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    out = torch.empty(4, 40, device=DEVICE)
    rescale = product_and_pass(rows, slab, labels, constants, sums, 0, margin=10.0, out=out)
    assert constants.tolist() == pytest.approx([0.0, 10.1, 50.0, 0.0])
    assert rescale[0] == 1 and rescale[3] == 1
    close(rescale[1:3], torch.tensor([-10.1, -50.0], device=DEVICE).exp(), 1e-5)
    close(out[:, 7], torch.tensor([math.exp(9.9), 1.0, 1.0, 0.0], device=DEVICE), 1e-5)
    assert sums[3] == 1 + 39


def test_exponentials_that_overflow_against_the_old_constant_are_done_again() -> None:
    """float16 ends at exp(11): a peak far above the constant must leave no infinity behind, in no column."""
    rows, slab = exact(18, 16, seed=5).half(), exact(90, 16, seed=6).half()
    labels, constants = torch.full((18,), 500, device=DEVICE), torch.full((18,), 40.0, device=DEVICE)
    constants[[2, 17]] = -100.0
    out, sums = torch.empty(18, 90, dtype=torch.float16, device=DEVICE), torch.zeros(18, device=DEVICE)
    rescale = product_and_pass(rows, slab, labels, constants, sums, 0, margin=8.0, out=out)
    assert (rescale != 1).nonzero().squeeze(1).tolist() == [2, 17]
    assert out.isfinite().all() and (out[[2, 17]].amax(1) == 1).all()
    close(constants[[2, 17]], (rows.float() @ slab.float().T).amax(1)[[2, 17]], 1e-6)


def test_columns_of_minus_infinity_change_nothing_and_a_row_of_them_waits() -> None:
    rows, slab, bias = exact(3, 16, seed=7), exact(70, 16, seed=8), torch.full((70,), -math.inf, device=DEVICE)
    labels = torch.tensor([3, 99, 40], device=DEVICE)
    constants, sums = (
        torch.tensor([-math.inf, 2.0, -math.inf], device=DEVICE),
        torch.tensor([0.0, 1.5, 0.0], device=DEVICE),
    )
    out = torch.full((3, 70), math.nan, device=DEVICE)
    rescale = product_and_pass(rows, slab, labels, constants, sums, 0, bias=bias, margin=60.0, out=out)
    assert constants.tolist() == [-math.inf, 2.0, -math.inf] and sums.tolist() == [0.0, 1.5, 0.0]
    assert rescale.tolist() == [1.0, 1.0, 1.0] and (out == 0).all()
    bias[40] = 0.0  # the label of the last row, which still has seen nothing
    rescale = product_and_pass(rows, slab, labels, constants, sums, 0, bias=bias, margin=60.0, out=out)
    assert constants[2] == -math.inf and sums[2] == 0 and rescale.tolist() == [0.0, 1.0, 1.0]
    assert constants[0] == (rows[0] * slab[40]).sum() and sums[0] == 1 and out[0, 40] == 1 and out[2, 40] == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_or_an_infinity_stays_in_its_row(poison: float) -> None:
    rows, slab, labels = exact(20, 16, seed=9), exact(40, 16, seed=10), torch.arange(20, device=DEVICE)
    results = []
    for value in (0.125, poison):
        rows[7, 3] = value
        constants, sums, out = (
            torch.zeros(20, device=DEVICE),
            torch.zeros(20, device=DEVICE),
            torch.empty(20, 40, device=DEVICE),
        )
        rescale = product_and_pass(rows, slab, labels, constants, sums, 0, margin=2.0, out=out)
        results.append([constants, sums, rescale, out])
    for clean, broken in zip(*results, strict=True):
        others = torch.arange(20) != 7
        assert torch.equal(clean[others], broken[others])
    assert results[1][1].isnan().nonzero().squeeze(1).tolist() == [7]


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """Not even on whether a row beside it moves, and makes their block be computed again."""
    rows, slab = normal(37, 48, seed=11), normal(140, 48, seed=12)
    if INTERPRETED:  # a CPU's matrix product rounds a row by its place in the block, a GPU's does not
        rows, slab = exact(37, 48, seed=11), exact(140, 48, seed=12)
    labels, start = torch.arange(37, device=DEVICE) * 3, normal(37, seed=15) * 10

    def run(which: Tensor) -> list[Tensor]:
        constants, sums = start[which], start[which].abs()
        out = torch.empty(len(which), 140, device=DEVICE)
        rescale = product_and_pass(rows[which], slab, labels[which], constants, sums, 0, margin=12.0, out=out)
        return [constants, sums, rescale, out]

    together = run(torch.arange(37))
    moved = together[2] != 1
    assert 4 < moved.sum() < 33
    order = torch.randperm(37, generator=torch.Generator().manual_seed(16))
    for which in (order, torch.arange(16, 17), torch.arange(5, 22), moved.cpu().nonzero().squeeze(1)):
        for part, whole in zip(run(which), together, strict=True):
            assert torch.equal(part, whole[which])
    for again, whole in zip(run(torch.arange(37)), together, strict=True):
        assert torch.equal(again, whole)


def test_strides_and_the_way_of_loading_do_not_change_a_bit() -> None:
    rows, slab, bias = exact(19, 40, seed=17), exact(75, 40, seed=18), exact(75, seed=19)
    labels, start = torch.arange(19, device=DEVICE) * 4, normal(19, seed=20) * 4
    wide_rows, wide_slab, wide_bias = (torch.full((2 * n, 80), math.nan, device=DEVICE) for n in (19, 75, 75))
    wide_rows[1::2, ::2], wide_slab[::2, 1::2], wide_bias[::2, 3] = rows, slab, bias
    spaced = torch.full((19, 48), math.nan, device=DEVICE)[:, :40]
    spaced.copy_(rows)

    def run(rows: Tensor, slab: Tensor, bias: Tensor, out: Tensor, tiles: Tiles = POINTERS) -> list[Tensor]:
        constants, sums = start.clone(), start.abs()
        rescale = product_and_pass(
            rows,
            slab,
            labels,
            constants,
            sums,
            0,
            bias=bias,
            logit_scale=1.25,
            softcap=20.0,
            margin=3.0,
            out=out,
            tiles=tiles,
        )
        return [constants, sums, rescale, out]

    plain = run(rows, slab, bias, torch.empty(19, 75, device=DEVICE))
    wide_out = torch.full((38, 150), math.nan, device=DEVICE)
    descriptors = Tiles(rows=16, columns=32, depth=32, warps=4, stages=1, descriptors=True)
    for results in (
        run(wide_rows[1::2, ::2], wide_slab[::2, 1::2], wide_bias[::2, 3], torch.empty(19, 75, device=DEVICE)),
        run(rows.t().contiguous().t(), slab.t().contiguous().t(), bias, wide_out[1::2, ::2]),
        run(rows, slab, bias, torch.empty(75, 19, device=DEVICE).t(), descriptors),
        run(spaced, slab, bias, torch.empty(19, 75, device=DEVICE), descriptors),
    ):
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))
    wide_out[1::2, ::2] = math.nan
    assert wide_out.isnan().all()  # nothing was written between the strides


def test_sums_are_taken_before_rounding_and_without_the_slope() -> None:
    """1000 exponentials that bfloat16 would all round to the same side, under a cap that would shrink them."""
    z = math.log(1 + 2**-9)
    rows, slab = torch.ones(1, 16, device=DEVICE).bfloat16(), torch.zeros(1000, 16, device=DEVICE).bfloat16()
    bias = torch.full((1000,), z, device=DEVICE)
    for softcap in (None, 0.01):
        constants, sums = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
        out = torch.empty(1, 1000, dtype=torch.bfloat16, device=DEVICE)
        product_and_pass(
            rows, slab, torch.tensor([5000], device=DEVICE), constants, sums, 0,
            bias=bias, softcap=softcap, margin=60.0, out=out,
        )  # fmt: skip
        capped = z if softcap is None else softcap * math.tanh(z / softcap)
        close(sums, torch.tensor([1000 * math.exp(capped)], device=DEVICE), 1e-6)


def test_many_blocks_of_columns_are_folded() -> None:
    """More than `_CHUNK` blocks."""
    columns = exp_epilogue._CHUNK * 32 + 5
    rows, slab = exact(17, 16, seed=21), exact(columns, 16, seed=22)
    labels, start = torch.full((17,), columns - 1, device=DEVICE), torch.full((17,), -20.0, device=DEVICE)
    start[:9] = 5.0
    ours, want = both_ways(rows, slab, labels, start, torch.ones_like(start), 0, margin=15.0)
    assert 0 < (want[2] != 1).sum() < 17
    for a, b in zip(ours, want, strict=True):
        close(a, b, 1e-5, 1e-30)


@pytest.mark.parametrize("shared_rows", [1, 2 * 16 * 24 * 4])
def test_the_order_of_programs_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, shared_rows: int) -> None:
    rows, slab, labels = normal(51, 24, seed=23), normal(70, 24, seed=24), torch.arange(51, device=DEVICE)
    zeros = torch.full((51,), 20.0, device=DEVICE)
    plain, _ = both_ways(rows, slab, labels, zeros, zeros, 0, margin=5.0)
    monkeypatch.setattr(product, "_SHARED_ROWS_BYTES", shared_rows)
    again, _ = both_ways(rows, slab, labels, zeros, zeros, 0, margin=5.0)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_no_rows_are_nothing_to_do() -> None:
    empty, labels = torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    out = torch.empty(0, 40, device=DEVICE)
    assert product_and_pass(
        normal(0, 16, seed=25), normal(40, 16, seed=26), labels, empty, empty, 0, margin=60.0, out=out
    ).shape == (0,)


def test_what_does_not_fit_is_refused_with_one_line() -> None:
    rows, slab, labels = (
        normal(4, 16, seed=27),
        normal(40, 16, seed=28),
        torch.zeros(4, dtype=torch.int64, device=DEVICE),
    )
    row, out = torch.zeros(4, device=DEVICE), torch.empty(4, 40, device=DEVICE)
    with pytest.raises(ValueError, match=r"rows torch.float64, slab torch.float64, out torch.float32; expected one of"):
        product_and_pass(rows.double(), slab.double(), labels, row, row, 0, margin=60.0, out=out)
    with pytest.raises(ValueError, match=r"slab torch.float32, out torch.bfloat16; expected"):
        product_and_pass(rows, slab, labels, row, row, 0, margin=60.0, out=out.bfloat16())
    with pytest.raises(ValueError, match=r"out \(4, 39\) do not fit; expected \(R, D\), \(C, D\), \(R,\), \(R, C\)"):
        product_and_pass(rows, slab, labels, row, row, 0, margin=60.0, out=out[:, :39])
    with pytest.raises(ValueError, match=r"constants is \(4,\) torch.float64.*expected \(4,\) float32, contiguous"):
        product_and_pass(rows, slab, labels, row.double(), row, 0, margin=60.0, out=out)
    odd = normal(4, 17, seed=29)[:, 1:]
    with pytest.raises(ValueError, match=r"strides \(17, 1\), at 4 bytes past .* descriptor; expected tiles with"):
        product_and_pass(odd, slab, labels, row, row, 0, margin=60.0, out=out, tiles=DESCRIPTORS)


STRIDES = [
    "stride_left_r",
    "stride_left_d",
    "stride_right_c",
    "stride_right_d",
    "stride_bias",
    "stride_out_r",
    "stride_out_c",
]


@pytest.mark.parametrize("kernel", ["exponentials", "redo"])
@pytest.mark.parametrize("large", STRIDES)
def test_addresses_past_two_to_the_31_are_computed_in_int64(large: str, kernel: str) -> None:
    """Rows 2**30 elements apart, in no memory: with a depth of 0 no operand is loaded, but every address is computed.

    Only the first row and column are inside, but all are addressed.
    """
    strides = [1 << 30 if name == large else 8 for name in STRIDES]
    floats, labels = torch.zeros(64, device=DEVICE), torch.full((16,), 5, dtype=torch.int64, device=DEVICE)
    flags: dict[str, Any] = {
        "HAS_BIAS": True,
        "HAS_SOFTCAP": False,
        "EVEN_D": False,
        "DESCRIPTORS": False,
        "UPCAST": True,
    }
    arguments = [
        floats,
        floats,
        floats,
        labels,
        floats[:16] - math.inf,
        floats[16:32].clone(),
        floats.clone(),
        floats.clone(),
    ]
    arguments += [1, 1, 0, 0, *strides, 1.0, 1.0]
    blocks = {"BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 32}
    with overflow_checked():
        if kernel == "exponentials":
            exp_epilogue._exponentials_kernel[(1,)](*arguments, GROUP_ROWS=1, **flags, **blocks)
            assert arguments[5][0] == 0  # the maximum of the only logit
        else:
            exp_epilogue._redo_kernel[(1,)](*arguments, 60.0, PROGRAMS=1, CHUNK=16, **flags, **blocks)
            assert arguments[6][0] == 1  # done, with that logit as its constant


def test_partial_results_past_two_to_the_31_are_addressed_in_int64() -> None:
    """2**30 rows and 1 block of columns: the 15 others that are held beside it are addressed, but not loaded."""
    maxima, partial_sums, constants, sums, rescale = torch.ones(5, 64, device=DEVICE).unbind()
    with overflow_checked():
        exp_epilogue._settle_kernel[(1,)](
            maxima, partial_sums, constants, sums, rescale, 1 << 30, 1, 60.0, BLOCK_N=32, CHUNK=16
        )
    assert sums.tolist() == [2.0] * 32 + [1.0] * 32
