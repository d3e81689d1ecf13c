"""What holds for `linear_logps` whatever the inputs?

Bit-exact where the standard says so: on the CPU a row of the tiled path does not depend on the rows beside it, because
row tiles are padded to a multiple of 16 rows. The GEMM (MKL, AVX2) keeps that for every vocabulary where D is a multiple
of 16, as it is in every real model; with D = 5 and a handful of words it does not, whatever the padding. Elsewhere results
agree within the bound of `support.row_bound`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_engine.ops import linear_logps, plan
from support.head_distributions import normal
from support.oracle import Case, computed

small = settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

HEADS = [{}, {"logit_scale": 0.25}, {"logit_scale": -1.5}, {"softcap": 3.0}, {"logit_scale": 2.0, "softcap": 10.0}]


SMALLEST = 1e-37  # below this float32 loses digits, and a product of two such numbers all of them
DEPTHS = st.integers(1, 24)
REAL_DEPTHS = st.sampled_from([16, 48, 64])


@st.composite
def cases(draw: st.DrawFn, *, depths: st.SearchStrategy[int] = DEPTHS, heads: list[dict[str, float]] = HEADS) -> Case:
    """Up to 40 rows and 300 words, logits from tiny to certain, any head; upstream gradients with zeros."""
    n, d, v = draw(st.integers(1, 40)), draw(depths), draw(st.integers(2, 300))
    seed = draw(st.integers(0, 2**20))
    spread = draw(st.sampled_from([0.01, 1.0, 10.0, 100.0]))
    g = normal(n, seed=seed)
    g[seed % 3 :: 3] = 0.0
    return Case(
        hidden=normal(n, d, seed=seed + 1, scale=spread * d**-0.5),
        weight=normal(v, d, seed=seed + 2),
        labels=torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed)),
        upstream=g,
        bias=normal(v, seed=seed + 3) if draw(st.booleans()) else None,
        **draw(st.sampled_from(heads)),
    )


def logps_of(case: Case, **changed: object) -> Tensor:
    return linear_logps(case.hidden, case.weight, case.labels, **{"backend": "tiled", **case.head, **changed})


@contextmanager
def tiles_of(rows: int, columns: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.TILE_ROWS, "cpu", rows)
        patch.setitem(plan.TILE_COLUMNS, "cpu", columns)
        yield


def gradient_floor(case: Case) -> Tensor:
    """What the rounding of logits may do to each row of dH; twice, for the difference of two results. (N,) float64."""
    reach = case.weight.double().norm(dim=1).max() * abs(case.logit_scale)
    return 2 * case.bound() * case.upstream.double().abs() * reach


def assert_rows_close(given: Tensor | None, want: Tensor | None, floor: Tensor) -> None:
    assert given is not None and want is not None
    error = (given.double() - want.double()).norm(dim=1)
    assert bool((error <= floor + 1e-6 * want.double().norm(dim=1) + SMALLEST).all()), (error, floor)


@small
@given(cases(depths=REAL_DEPTHS), st.randoms(use_true_random=False), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_in_another_order_give_the_same_bits(case: Case, random: object, dtype: torch.dtype) -> None:
    order = list(range(len(case.labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    case = case.to(dtype)
    straight, shuffled = computed(case, trains=False), computed(case.rows(torch.tensor(order)), trains=False)
    assert torch.equal(straight.logps[order], shuffled.logps)
    assert torch.equal(straight.d_hidden[order], shuffled.d_hidden)


@small
@given(cases(depths=REAL_DEPTHS), st.data(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_has_the_same_bits_in_any_batch(case: Case, data: st.DataObject, dtype: torch.dtype) -> None:
    n = len(case.labels)
    picked = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50)))
    case = case.to(dtype)
    for trains in (False, True):
        whole, part = computed(case, trains=trains), computed(case.rows(picked), trains=trains)
        assert torch.equal(whole.logps[picked], part.logps)
        assert torch.equal(whole.d_hidden[picked], part.d_hidden)
    assert torch.equal(logps_of(case)[picked], logps_of(case.rows(picked)))


@small
@given(cases(), st.sampled_from([16, 32, 512]), st.integers(1, 400))
def test_tile_sizes_change_rounding_only(case: Case, rows: int, columns: int) -> None:
    bound, floor = case.bound(), gradient_floor(case)
    for trains in (False, True):
        usual = computed(case, trains=trains)
        with tiles_of(rows, columns):
            ours = computed(case, trains=trains)
        assert bool(((ours.logps - usual.logps).abs() <= 2 * bound).all())
        assert_rows_close(ours.d_hidden, usual.d_hidden, floor)


@small
@given(cases(heads=HEADS[:3]), st.sampled_from([-64.0, -8.0, 8.0, 1024.0]))
def test_a_constant_added_to_every_bias_changes_nothing(case: Case, constant: float) -> None:
    bias = torch.zeros(len(case.weight)) if case.bias is None else case.bias
    plain, shifted = replace(case, bias=bias), replace(case, bias=bias + constant)
    allowed = plain.bound() + shifted.bound()
    assert bool(((logps_of(plain) - logps_of(shifted)).abs() <= allowed).all())


LAYOUTS = st.sampled_from(["rows", "features", "transposed"])


@small
@given(cases(), LAYOUTS, st.booleans())
def test_the_strides_of_hidden_change_no_bit(case: Case, layout: str, whole_tiles: bool) -> None:
    """Row tiles are made contiguous before they are multiplied, those that need no padding too."""
    if whole_tiles:
        case = case.rows(torch.arange(32) % len(case.labels))
    laid_out = replace(case, hidden=restrided(case.hidden, layout))
    assert torch.equal(logps_of(case), logps_of(laid_out))
    for trains in (False, True):
        usual, ours = computed(case, trains=trains), computed(laid_out, trains=trains)
        for field in ("logps", "d_hidden", "d_weight", "d_bias"):
            given, want = getattr(ours, field), getattr(usual, field)
            assert (given is None and want is None) or torch.equal(given, want), field


@small
@given(cases(), LAYOUTS, LAYOUTS)
def test_the_strides_of_the_weight_change_rounding_only(case: Case, hidden_layout: str, weight_layout: str) -> None:
    laid_out = replace(case, hidden=restrided(case.hidden, hidden_layout), weight=restrided(case.weight, weight_layout))
    for trains in (False, True):
        usual, ours = computed(case, trains=trains), computed(laid_out, trains=trains)
        assert bool(((ours.logps - usual.logps).abs() <= 2 * case.bound()).all())
        assert_rows_close(ours.d_hidden, usual.d_hidden, gradient_floor(case))


def restrided(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout, with NaN in the gaps."""
    if layout == "transposed":
        return matrix.T.contiguous().T
    n, d = matrix.shape
    rows, features = (2, 1) if layout == "rows" else (1, 3)
    wide = torch.full((n * rows, d * features), float("nan"))
    wide[::rows, ::features] = matrix
    return wide[::rows, ::features]


@small
@given(cases(), st.floats(-4.0, 4.0, width=32))
def test_backward_is_linear_in_the_upstream_gradient(case: Case, factor: float) -> None:
    """Also: a frozen head's backward is one product a row, so a power of two changes no digit, and 0 gives 0."""
    other = normal(len(case.upstream), seed=3)
    mixed = case.upstream * factor + other
    for trains in (False, True):
        first, second, both = (
            computed(replace(case, upstream=g), trains=trains) for g in (case.upstream, other, mixed)
        )
        unit = computed(replace(case, upstream=torch.ones_like(other)), trains=False).d_hidden
        assert first.d_hidden is not None and second.d_hidden is not None and unit is not None
        scale = (case.upstream.abs() * abs(factor) + other.abs()) * unit.norm(dim=1)
        assert_rows_close(both.d_hidden, first.d_hidden * factor + second.d_hidden, 1e-4 * scale.double())
        assert bool((first.d_hidden[case.upstream == 0] == 0).all())
        doubled = computed(replace(case, upstream=case.upstream * 2), trains=trains)
        torch.testing.assert_close(doubled.d_hidden, first.d_hidden * 2, rtol=0, atol=SMALLEST)


@small
@given(cases())
def test_probabilities_of_all_words_sum_to_one(case: Case) -> None:
    v = len(case.weight)
    row = replace(case, hidden=case.hidden[:1].expand(v, -1), labels=torch.arange(v))
    total = logps_of(row).double().exp().sum()
    assert abs(total - 1) <= 2 * case.bound()[0]


@small
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_log_prob_is_positive(case: Case, dtype: torch.dtype) -> None:
    case = case.to(dtype)
    logps = logps_of(case)
    assert bool((logps <= (0 if not plan.cpu_multiplies_bfloat16() else case.bound())).all())


@small
@given(cases(), st.integers(1, 40))
def test_micro_batches_add_up_to_the_batch(case: Case, size: int) -> None:
    """Each gradient of the weight and the bias is a sum over rows, and rows of dH lie side by side."""
    whole = computed(case, trains=True)
    parts = [computed(case.rows(slice(start, start + size)), trains=True) for start in range(0, len(case.labels), size)]
    assert bool(((torch.cat([part.logps for part in parts]) - whole.logps).abs() <= 2 * case.bound()).all())
    assert_rows_close(torch.cat([part.d_hidden for part in parts]), whole.d_hidden, gradient_floor(case))
    weighted = 2 * case.bound() * case.upstream.double().abs() * abs(case.logit_scale)
    terms = case.upstream.double().abs() * abs(case.logit_scale)  # each row's share is at most this, times |h_i|
    reach = case.hidden.double().norm(dim=1)
    allowed = (weighted * reach).norm() + 1e-6 * (terms * reach).sum()
    assert (sum(part.d_weight.double() for part in parts) - whole.d_weight.double()).norm() <= allowed
    if case.bias is not None:
        allowed = weighted.norm() + 1e-6 * terms.sum()
        assert (sum(part.d_bias.double() for part in parts) - whole.d_bias.double()).norm() <= allowed


@small
@given(cases(), st.data(), st.booleans())
def test_ignored_rows_among_scored_ones_change_none_of_them(case: Case, data: st.DataObject, trains: bool) -> None:
    n = len(case.labels)
    at = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 2 * n - 1), min_size=n, max_size=n))))
    rows = torch.full((2 * n, case.hidden.shape[1]), float("nan")).index_copy(0, at, case.hidden)
    wider = replace(
        case,
        hidden=rows,
        labels=torch.full((2 * n,), -100).index_copy(0, at, case.labels),
        upstream=torch.full((2 * n,), 9.0).index_copy(0, at, case.upstream),
    )
    alone, among = computed(case, trains=trains), computed(wider, trains=trains)
    ignored = torch.ones(2 * n, dtype=torch.bool).index_fill(0, at, False)
    assert torch.equal(among.logps[at], alone.logps) and bool((among.logps[ignored] == 0).all())
    assert torch.equal(among.d_hidden[at], alone.d_hidden) and bool((among.d_hidden[ignored] == 0).all())
    if trains:
        assert torch.equal(among.d_weight, alone.d_weight)
