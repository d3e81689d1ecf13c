"""Is the fused Triton forward within its bound of float64, on every distribution that has broken one?

Run by `tests/reference/test_triton_kernels.py` in a process of its own, under Triton's interpreter. By hand, from the
root:

    TRITON_INTERPRET=1 python -m pytest tests/support/lse_forward_cases.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo_engine.kernels import lse_forward, product
from dpo_engine.kernels.lse_forward import logps_forward
from dpo_engine.kernels.product import takes_descriptor
from dpo_engine.kernels.tiles import EXPONENTIAL, FUSED, Tiles, choose_tiles
from support.interpreted import DEVICE, INTERPRETED, overflow_checked
from support.row_bound import logits_in_float64, row_bound

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAX_SPLITS = lse_forward._MAX_SPLITS


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all its splits a small vocabulary is one block a split, and no running maximum would ever move."""
    monkeypatch.setattr(lse_forward, "_MAX_SPLITS", 3)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).to(DEVICE)


def integers(high: int, count: int, seed: int) -> Tensor:
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, bias=None, logit_scale=1.0, softcap=None) -> Tensor:
    """`z_y - logsumexp(z)` in float64, the label's own exponential kept apart: exp(-27) loses digits beside 1."""
    z = logits_in_float64(hidden, weight, bias, logit_scale, softcap)
    label = z.gather(1, labels[:, None])
    others = z.scatter(1, labels[:, None], -math.inf).logsumexp(1, keepdim=True)
    return -torch.nn.functional.softplus(others - label, threshold=500).squeeze(1)


def check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias=None, logit_scale=1.0, softcap=None, tiles=None
) -> Tensor:
    """Every row within `b_i`; returns the log-probs."""
    logps = logps_forward(hidden, weight, labels, bias, logit_scale, softcap, tiles=tiles)
    assert logps.dtype == torch.float32 and logps.shape == labels.shape
    want = expected(hidden, weight, labels, bias, logit_scale, softcap)
    share = (logps.double() - want).abs() / row_bound(hidden, weight, bias, logit_scale)
    worst = int(share.argmax())
    assert share[worst] <= 1, f"row {worst}: {logps[worst]} for {want[worst]}, {share[worst]:.3g} of the bound"
    assert (logps <= 0).all()
    return logps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,v,d", [(1, 2, 1), (1, 2, 64), (5, 257, 33), (16, 32, 32), (17, 100, 96), (33, 130, 100)])
def test_ragged_shapes_stay_within_the_bound(n: int, v: int, d: int, dtype: torch.dtype) -> None:
    check(normal(n, d, seed=1, dtype=dtype), normal(v, d, seed=2, dtype=dtype), integers(v, n, seed=3))


@pytest.mark.parametrize(
    "n,v,d,dtype",
    [(5, 257, 40, dtype) for dtype in DTYPES]
    + [(1, 2, 8, torch.bfloat16), (17, 100, 96, torch.float16)]
    + [slow(1, 2, 8, torch.float32), slow(1, 2, 8, torch.float16)]
    + [slow(17, 100, 96, torch.float32), slow(17, 100, 96, torch.bfloat16)],
)
def test_operands_loaded_by_descriptor_do_not_change_a_bit(n: int, v: int, d: int, dtype: torch.dtype) -> None:
    hidden, weight = normal(n, d, seed=1, dtype=dtype), normal(v, d, seed=2, dtype=dtype)
    wide = torch.full((n, d + 8), math.nan, device=DEVICE, dtype=dtype)[:, :d]
    wide.copy_(hidden)
    rest = integers(v, n, seed=3), normal(v, seed=6), 0.25, 5.0
    tiles = Tiles(rows=16, columns=32, depth=32, warps=4, stages=1)
    plain = check(hidden, weight, *rest, tiles=tiles)
    for h in (hidden, wide):
        assert torch.equal(check(h, weight, *rest, tiles=replace(tiles, descriptors=True)), plain)


def test_descriptors_are_left_where_an_operand_forbids_them() -> None:
    matrix = torch.zeros(9, 24, device=DEVICE).bfloat16()
    assert takes_descriptor(matrix) and takes_descriptor(matrix[3:, 8:16])
    assert takes_descriptor(matrix[:1].as_strided((1, 24), (1, 1)))  # a single row, whatever its stride
    for forbidden in (matrix.t(), matrix[:, ::2], matrix[:, 1:], matrix[:, :0], matrix[:0], matrix[:1].expand(9, 24)):
        assert not takes_descriptor(forbidden)
    assert not takes_descriptor(torch.zeros(9, 20, device=DEVICE).bfloat16())  # rows 40 bytes apart
    for table in (FUSED, EXPONENTIAL):
        for capability in [(9, 0), (10, 0), (12, 0)]:
            for softcap in (False, True):
                chosen = [
                    choose_tiles(table, capability, torch.bfloat16, descriptors=d, softcap=softcap)
                    for d in (False, True)
                ]
                assert [tiles.descriptors for tiles in chosen] == [False, True]


# In 16 bits only the operands are rounded otherwise: what is done to a logit is the same float32.
TRANSFORMS = [(scale, bias, cap) for scale in (0.0625, -1.7) for bias in (False, True) for cap in (None, 0.5, 30.0)]


@pytest.mark.parametrize(
    "dtype,logit_scale,with_bias,softcap",
    [(torch.float32, *transform) for transform in TRANSFORMS]
    + [
        (dtype, *transform) if transform == (-1.7, True, 30.0) else slow(dtype, *transform)
        for dtype in DTYPES[1:]
        for transform in TRANSFORMS
    ],
)
def test_head_transforms_stay_within_the_bound(
    dtype: torch.dtype, softcap: float | None, with_bias: bool, logit_scale: float
) -> None:
    bias = normal(70, seed=6, dtype=dtype, scale=3.0) if with_bias else None
    check(
        normal(9, 40, seed=4, dtype=dtype),
        normal(70, 40, seed=5, dtype=dtype),
        integers(70, 9, seed=7),
        bias,
        logit_scale,
        softcap,
    )


@pytest.mark.parametrize("largest", [1e2, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_stay_within_the_bound(largest: float, dtype: torch.dtype) -> None:
    hidden, weight = normal(12, 64, seed=8, dtype=dtype), normal(131, 64, seed=9, dtype=dtype)
    scale = largest / logits_in_float64(hidden, weight).abs().max().item()
    labels = integers(131, 12, seed=10)
    labels[:6] = (logits_in_float64(hidden, weight).argmax(1))[:6]  # sure rows beside hopeless ones
    logps = check(hidden, weight, labels, logit_scale=scale)
    assert logps.min() < -largest / 2


def test_a_large_logit_common_to_all_does_not_hide_the_differences() -> None:
    hidden, weight = normal(6, 32, seed=11), normal(90, 32, seed=12, scale=0.1)
    hidden[:, 0], weight[:, 0] = 100.0, 50.0
    check(hidden, weight, integers(90, 6, seed=13))


@pytest.mark.parametrize("gap", [5.0, 12.0, 27.63, 60.0, 80.0])
def test_a_row_that_is_sure_of_its_label_is_exact_relative_to_one_minus_its_probability(gap: float) -> None:
    """At logp = -1e-12 a bound of 1e-6 proves nothing: the digits of 1 - p are what a gradient is made of."""
    vocabulary, label = 45, 40
    weight = torch.zeros(vocabulary, 16, device=DEVICE)
    weight[label, 0] = gap
    weight[:, 1] = normal(vocabulary, seed=14)
    hidden = torch.zeros(4, 16, device=DEVICE)
    hidden[:, 0] = 1.0
    hidden[:, 1] = torch.tensor([0.0, 0.25, 0.5, 1.0])
    labels = torch.full((4,), label, device=DEVICE)
    want = expected(hidden, weight, labels)
    logps = logps_forward(hidden, weight, labels).double()
    relative = ((logps - want) / want).abs()
    assert (relative <= row_bound(hidden, weight)).all(), relative
    assert (logps < 0).all()


def test_a_row_that_is_sure_of_another_label_keeps_its_nats() -> None:
    weight = torch.zeros(40, 8, device=DEVICE)
    weight[3, 0] = 131.0
    logps = check(torch.ones(2, 8, device=DEVICE), weight, torch.tensor([35, 3], device=DEVICE))
    assert logps[0] < -130 and logps[1] == 0


def test_equal_logits_give_minus_log_of_the_vocabulary() -> None:
    for vocabulary in (2, 32, 33, 257):
        row = normal(1, 24, seed=15)
        logps = check(normal(3, 24, seed=16), row.expand(vocabulary, 24), integers(vocabulary, 3, seed=17))
        assert logps.sub(-math.log(vocabulary)).abs().max() < 1e-6
    # What all logits have in common is subtracted before a logarithm is added to it: a float32 near 1e4 moves in 1e-3.
    large = logps_forward(
        torch.ones(2, 1, device=DEVICE), torch.full((70, 1), 1e4, device=DEVICE), integers(70, 2, seed=74)
    )
    assert large.sub(-math.log(70)).abs().max() < 1e-6


def test_padding_does_not_count_as_a_logit_of_zero_where_all_logits_are_negative() -> None:
    hidden, weight = normal(5, 33, seed=18).abs(), -normal(35, 33, seed=19).abs()
    check(hidden, weight, integers(35, 5, seed=20), logit_scale=8.0)


@pytest.mark.parametrize("vocabulary", [64, 65, 257])
@pytest.mark.parametrize("splits", [1, 3, MAX_SPLITS])
def test_labels_at_the_edges_of_blocks_are_found(vocabulary: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lse_forward, "_MAX_SPLITS", splits)
    edges = [v for v in (0, 1, 31, 32, 33, 63, 64, 127, 128, 255, 256) if v < vocabulary] + [vocabulary - 1]
    labels = torch.tensor(edges, device=DEVICE)
    check(normal(len(edges), 20, seed=21), normal(vocabulary, 20, seed=22), labels)


def test_many_blocks_in_each_of_many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lse_forward, "_MAX_SPLITS", MAX_SPLITS)
    vocabulary = 128 * 16 * 2 + 1
    labels = torch.tensor([0, 2047, vocabulary - 1], device=DEVICE)
    tiles = Tiles(rows=16, columns=16, depth=16, warps=4, stages=1)
    check(normal(3, 16, seed=23), normal(vocabulary, 16, seed=24), labels, tiles=tiles)


@pytest.mark.parametrize("vocabulary", [65_537, slow(256_001)])
def test_large_odd_vocabularies(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lse_forward, "_MAX_SPLITS", MAX_SPLITS)
    labels = torch.tensor([vocabulary - 1, 12_345], device=DEVICE)
    tiles = Tiles(rows=16, columns=512, depth=16, warps=8, stages=1)
    check(normal(2, 8, seed=25), normal(vocabulary, 8, seed=26), labels, tiles=tiles)


def test_blocks_of_minus_infinity_are_harmless() -> None:
    """The first block, one in the middle and the whole last one masked out, as padded vocabularies are."""
    hidden, weight, bias = normal(6, 16, seed=27), normal(160, 16, seed=28), torch.zeros(160, device=DEVICE)
    bias[:32] = bias[70:101] = bias[128:] = -math.inf
    labels = torch.tensor([40, 69, 101, 127, 5, 159], device=DEVICE)
    logps = logps_forward(hidden, weight, labels, bias)
    want = expected(hidden, weight, labels, bias)
    bound = row_bound(hidden, weight, bias)
    assert ((logps[:4].double() - want[:4]).abs() <= bound[:4]).all()
    assert (logps[4:] == -math.inf).all()


def test_a_label_that_is_all_there_is_has_log_prob_zero() -> None:
    bias = torch.full((70,), -math.inf, device=DEVICE)
    bias[50] = 0.0
    labels = torch.tensor([50, 51], device=DEVICE)
    assert logps_forward(normal(2, 16, seed=29), normal(70, 16, seed=30), labels, bias).tolist() == [0.0, -math.inf]


def test_softcap_is_exact_where_tanh_is_nearly_linear_and_where_it_saturates() -> None:
    hidden, weight, labels = normal(8, 32, seed=31), normal(64, 32, seed=32), integers(64, 8, seed=33)
    for logit_scale in (1e-3, 0.05, 0.5, 5.0, 1e3):
        check(hidden, weight, labels, logit_scale=logit_scale, softcap=50.0)
    # A softcap multiplies the rounding of tanh: small logits under a large cap would drown in it.
    logps = logps_forward(hidden, weight, labels, None, 0.01, 1000.0).double()
    want = expected(hidden, weight, labels, None, 0.01, 1000.0)
    assert ((logps - want).abs() <= row_bound(hidden, weight, None, 0.01)).all()


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16], ids=str)
def test_strides_do_not_change_a_bit(dtype: torch.dtype) -> None:
    hidden, weight, bias = (
        normal(7, 40, seed=34, dtype=dtype),
        normal(75, 40, seed=35, dtype=dtype),
        normal(75, seed=36, dtype=dtype),
    )
    labels = integers(75, 7, seed=37)
    plain = logps_forward(hidden, weight, labels, bias, 1.3, 20.0)
    wide_hidden = normal(14, 80, seed=38, dtype=dtype)
    wide_hidden[1::2, ::2] = hidden
    wide_weight = normal(150, 80, seed=39, dtype=dtype)
    wide_weight[::2, 1::2] = weight
    wide_bias = normal(150, seed=40, dtype=dtype)
    wide_bias[::2] = bias
    wide_labels = integers(75, 14, seed=41)
    wide_labels[1::2] = labels
    for h in (hidden, hidden.t().contiguous().t(), wide_hidden[1::2, ::2]):
        for w in (weight, weight.t().contiguous().t(), wide_weight[::2, 1::2]):
            assert torch.equal(logps_forward(h, w, labels, bias, 1.3, 20.0), plain)
    strided = logps_forward(hidden, weight, wide_labels[1::2], wide_bias[::2], 1.3, 20.0)
    assert torch.equal(strided, plain)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    hidden, weight, labels = normal(37, 48, seed=42), normal(140, 48, seed=43), integers(140, 37, seed=44)
    if (
        INTERPRETED
    ):  # a CPU's matrix product rounds a row by its place in the block, a GPU's does not: here, leave nothing to round
        hidden, weight = hidden.mul(8).round() / 8, weight.mul(8).round() / 8
    together = logps_forward(hidden, weight, labels)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(45)).to(DEVICE)
    assert torch.equal(logps_forward(hidden[order], weight, labels[order]), together[order])
    for part in (slice(0, 1), slice(16, 17), slice(36, 37), slice(5, 22)):
        assert torch.equal(logps_forward(hidden[part], weight, labels[part]), together[part])


def test_more_rows_than_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = normal(37, 24, seed=46), normal(100, 24, seed=47), integers(100, 37, seed=48)
    together = check(hidden, weight, labels)
    monkeypatch.setattr(lse_forward, "_ROWS_PER_LAUNCH", 16)
    assert torch.equal(logps_forward(hidden, weight, labels), together)


@pytest.mark.parametrize("shared_rows", [1, 2 * 16 * 24 * 4, 1 << 30])
def test_the_order_of_programs_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, shared_rows: int) -> None:
    hidden, weight, labels = normal(5 * 16 + 3, 24, seed=49), normal(100, 24, seed=50), integers(100, 83, seed=51)
    together = check(hidden, weight, labels)
    monkeypatch.setattr(product, "_SHARED_ROWS_BYTES", shared_rows)
    assert torch.equal(logps_forward(hidden, weight, labels), together)


def test_block_sizes_change_nothing_beyond_the_bound() -> None:
    hidden, weight, labels = normal(19, 70, seed=52), normal(300, 70, seed=53), integers(300, 19, seed=54)
    want, bound = expected(hidden, weight, labels), row_bound(hidden, weight)
    for rows, columns, depth in [(16, 16, 16), (32, 64, 16), (64, 128, 64), (128, 256, 64)]:
        tiles = Tiles(rows=rows, columns=columns, depth=depth, warps=4, stages=2)
        logps = logps_forward(hidden, weight, labels, tiles=tiles)
        assert ((logps.double() - want).abs() <= bound).all()


def test_probabilities_of_all_labels_sum_to_one() -> None:
    hidden, weight = normal(1, 30, seed=55).expand(97, 30), normal(97, 30, seed=56)
    logps = logps_forward(hidden, weight, torch.arange(97, device=DEVICE))
    assert logps.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_duplicated_rows_of_the_weight_share_their_probability() -> None:
    weight = normal(1, 30, seed=57).repeat(2, 1)
    logps = logps_forward(normal(5, 30, seed=58), weight, torch.tensor([0, 1, 0, 1, 0], device=DEVICE))
    assert logps.sub(-math.log(2)).abs().max() < 1e-6


def test_a_nan_stays_in_its_row() -> None:
    hidden, weight, labels = normal(20, 16, seed=59), normal(40, 16, seed=60), integers(40, 20, seed=61)
    clean = logps_forward(hidden, weight, labels)
    for poison in (math.nan, math.inf):
        broken = hidden.clone()
        broken[7, 3] = poison
        logps = logps_forward(broken, weight, labels)
        assert logps[7].isnan()
        assert torch.equal(logps[:7], clean[:7]) and torch.equal(logps[8:], clean[8:])


def test_a_nan_in_one_row_of_the_weight_is_not_swallowed() -> None:
    weight = normal(40, 16, seed=62)
    weight[33, 2] = math.nan
    labels = torch.tensor([0, 33], device=DEVICE)
    assert logps_forward(normal(2, 16, seed=63), weight, labels).isnan().all()


def test_a_logit_of_plus_infinity_gives_nan_as_the_softmax_does() -> None:
    bias = torch.zeros(40, device=DEVICE)
    bias[9] = math.inf
    logps = logps_forward(normal(2, 16, seed=72), normal(40, 16, seed=73), torch.tensor([9, 8], device=DEVICE), bias)
    assert logps.isnan().all()


def test_a_label_outside_the_vocabulary_gives_nan_not_a_number() -> None:
    labels = torch.tensor([0, 40, -100, 39], device=DEVICE)
    logps = logps_forward(normal(4, 16, seed=64), normal(40, 16, seed=65), labels)
    assert logps.isnan().tolist() == [False, True, True, False]


def test_no_rows_give_no_log_probs() -> None:
    logps = logps_forward(normal(0, 16, seed=66), normal(40, 16, seed=67), integers(40, 0, seed=68))
    assert logps.shape == (0,) and logps.dtype == torch.float32


def test_what_has_no_kernel_is_refused_with_one_line() -> None:
    hidden, weight, labels = normal(4, 16, seed=69), normal(40, 16, seed=70), integers(40, 4, seed=71)
    with pytest.raises(ValueError, match=r"hidden torch.float64, weight torch.float64; expected one of float32"):
        logps_forward(hidden.double(), weight.double(), labels)
    with pytest.raises(ValueError, match=r"hidden torch.float32, weight torch.bfloat16"):
        logps_forward(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"labels \(3,\) do not fit; expected \(N, D\), \(V, D\), \(N,\)"):
        logps_forward(hidden, weight, labels[:3])


STRIDES = ["stride_hidden_n", "stride_hidden_d", "stride_weight_v", "stride_weight_d", "stride_bias"]


@pytest.mark.parametrize("large", STRIDES)
def test_addresses_past_two_to_the_31_are_computed_in_int64(large: str) -> None:
    """Rows 2**30 elements apart, in no memory: with a depth of 0 nothing is loaded, but every address is computed."""
    strides = [1 << 30 if name == large else 8 for name in STRIDES]
    has_bias = large == "stride_bias"
    # The bias is loaded whatever the depth: only its first column lies inside a vocabulary of 1.
    vocabulary = 1 if has_bias else 32
    floats, labels = torch.zeros(64, device=DEVICE), torch.zeros(16, dtype=torch.int64, device=DEVICE)
    with overflow_checked():
        lse_forward._fold_kernel[(1,)](
            floats, floats, floats, labels, floats[:16], floats[16:32], floats[32:48],
            16, vocabulary, 0, 32, 1, 16, *strides, 1.0, 1.0,
            HAS_BIAS=has_bias, HAS_SOFTCAP=False, EVEN_D=False, DESCRIPTORS=False, UPCAST=True,
            BLOCK_N=16, BLOCK_V=32, BLOCK_D=32, GROUP_ROWS=1,
        )  # fmt: skip
