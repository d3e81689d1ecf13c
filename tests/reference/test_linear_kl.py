"""Is `linear_kl` the divergence of two heads over the same tokens, in value and every gradient?"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_kl, linear_logps, plan
from dpo_engine.ops.kl import TokenKL
from support.call_cost import PeakBytes, Products
from support.head_distributions import normal, random_labels, upstream
from support.row_bound import row_bound


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Inputs of one call; `options` are the keyword arguments that both heads share."""

    hidden: Tensor
    weight: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    labels: Tensor
    bias: Tensor | None
    options: dict[str, float]

    def bound(self) -> Tensor:
        scale = self.options.get("logit_scale", 1.0) / self.options.get("temperature", 1.0)
        return row_bound(self.hidden, self.weight, self.bias, scale) + row_bound(
            self.reference_hidden, self.reference_weight, None, scale
        )


def heads(
    spread: float = 1.0, n: int = 37, v: int = 331, biased: bool = False, near: bool = False, **options: float
) -> Heads:
    """`near`: the reference is the policy, moved a little."""
    d, its_d = 24, 24 if near else 16
    hidden, weight = normal(n, d, seed=1, scale=spread * d**-0.5), normal(v, d, seed=2)
    reference_hidden = (
        hidden + 1e-3 * normal(n, d, seed=5) if near else normal(n, its_d, seed=5, scale=spread * its_d**-0.5)
    )
    return Heads(
        hidden=hidden,
        weight=weight,
        reference_hidden=reference_hidden,
        reference_weight=weight if near else normal(v, its_d, seed=6),
        labels=random_labels(n, v),
        bias=normal(v, seed=3) if biased else None,
        options=options,
    )


def definition(case: Heads, leaves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`(kl, logps, reference_logps)` in float64, from both (N, V) matrices; `leaves` are the policy's inputs."""
    hidden, weight, *bias = leaves

    def log_softmax(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        x = h @ w.T if b is None else h @ w.T + b
        x = x * case.options.get("logit_scale", 1.0)
        cap = case.options.get("softcap")
        x = x if cap is None else cap * torch.tanh(x / cap)
        return (x / case.options.get("temperature", 1.0)).log_softmax(-1)

    ours = log_softmax(hidden, weight, bias[0] if bias else None)
    theirs = log_softmax(case.reference_hidden.double(), case.reference_weight.double(), None)
    at = case.labels[:, None]
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    return kl, ours.gather(1, at).squeeze(1), theirs.gather(1, at).squeeze(1)


def computed(case: Heads, leaves: list[Tensor], **options: object) -> TokenKL:
    hidden, weight, *bias = leaves
    return linear_kl(
        hidden, weight, case.labels, case.reference_hidden, case.reference_weight,
        bias=bias[0] if bias else None, **{**case.options, **options},
    )  # fmt: skip


CASES = {
    "apart": lambda: heads(),
    "near": lambda: heads(near=True),
    "logits about 1e2": lambda: heads(spread=60.0),
    "bias, scale, softcap, temperature": lambda: heads(
        spread=4.0, biased=True, logit_scale=1.5, softcap=6.0, temperature=0.7
    ),
    "two row tiles and slabs": lambda: heads(n=1040, v=4300),
}


@pytest.mark.parametrize("tiles", ["default", "small"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_definition(
    name: str, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles == "small":
        monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
        monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 64)
    case = CASES[name]()
    inputs = [t for t in (case.hidden, case.weight, case.bias) if t is not None]
    ours_in = [t.clone().requires_grad_() for t in inputs]
    true_in = [t.double().requires_grad_() for t in inputs]
    g_kl, g_logps = upstream(len(case.labels)), upstream(len(case.labels)).flip(0)
    ours, truth = computed(case, ours_in), definition(case, true_in)
    bound = case.bound()
    assert bool(((ours.kl.double() - truth[0]).abs() <= 4 * bound).all())
    assert bool(((ours.logps.double() - truth[1]).abs() <= bound).all())
    assert bool(((ours.reference_logps.double() - truth[2]).abs() <= bound).all())
    assert not ours.reference_logps.requires_grad
    found = torch.autograd.grad((ours.kl * g_kl + ours.logps * g_logps).sum(), ours_in)
    wanted = torch.autograd.grad((truth[0] * g_kl.double() + truth[1] * g_logps.double()).sum(), true_in)
    for mine, want in zip(found, wanted, strict=True):
        assert (mine.double() - want).norm() <= (2e-6 + 4 * bound.max()) * want.norm()


def test_finite_differences_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 8)
    case = heads(n=17, v=11, biased=True, softcap=3.0, logit_scale=0.8)
    leaves = [t.double().requires_grad_() for t in (case.hidden[:, :3], case.weight[:, :3], case.bias)]
    reference = case.reference_hidden.double(), case.reference_weight.double()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_kl(hidden, weight, case.labels, *reference, bias=bias, **case.options)[:2]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_multiplied_exactly_here(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "cpu_multiplies_bfloat16", lambda: False)
    case = heads(spread=3.0)
    rounded = Heads(
        **{k: getattr(case, k).to(dtype) for k in ("hidden", "weight", "reference_hidden", "reference_weight")},
        labels=case.labels, bias=None, options={},
    )  # fmt: skip
    ours = computed(rounded, [rounded.hidden, rounded.weight])
    kl, _, _ = definition(rounded, [rounded.hidden.double(), rounded.weight.double()])
    assert bool(((ours.kl.double() - kl).abs() <= 4 * rounded.bound()).all())


def test_equal_heads_diverge_by_nothing() -> None:
    case = heads(spread=20.0)
    hidden = case.hidden.clone().requires_grad_()
    ours = linear_kl(hidden, case.weight, case.labels, case.hidden, case.weight)
    assert ours.kl.abs().max() == 0
    ours.kl.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() <= 1e-6


def test_a_constant_that_moves_takes_along_what_was_summed() -> None:
    """The label lies 300 nats below the rest, and the rest rises over the slabs, in either head."""
    v = 9001
    rising = torch.linspace(0.0, 300.0, v)[:, None]
    flat = torch.zeros(v, 1)
    labels, one = torch.zeros(4, dtype=torch.long), torch.ones(4, 1)
    for weight, reference in ((rising, flat), (flat, rising), (rising, rising * 0.9)):
        ours = linear_kl(one, weight, labels, one, reference)
        lp, lr = weight.double().T.log_softmax(-1), reference.double().T.log_softmax(-1)
        want = (lr.exp() * (lr - lp)).sum()
        torch.testing.assert_close(ours.kl.double(), want.expand(4), rtol=1e-5, atol=1e-4)


def test_an_id_that_both_exclude_adds_nothing_and_one_that_only_the_policy_excludes_is_infinite() -> None:
    case = heads(v=300)
    mask = torch.zeros(300)
    mask[100:200] = float("-inf")
    labels = case.labels % 100
    both = linear_kl(
        case.hidden, case.weight, labels, case.reference_hidden, case.reference_weight, bias=mask, reference_bias=mask
    )
    keep = torch.cat([torch.arange(100), torch.arange(200, 300)])
    without = linear_kl(case.hidden, case.weight[keep], labels, case.reference_hidden, case.reference_weight[keep])
    torch.testing.assert_close(both.kl, without.kl, rtol=1e-5, atol=1e-6)
    only_policy = linear_kl(case.hidden, case.weight, labels, case.reference_hidden, case.reference_weight, bias=mask)
    assert bool((only_policy.kl == float("inf")).all())


def test_ignored_rows_are_zero_in_value_and_gradient_whatever_they_hold() -> None:
    case = heads()
    labels, hidden = case.labels.clone(), case.hidden.clone()
    labels[::3] = -100
    hidden[::3] = float("nan")
    hidden.requires_grad_()
    ours = linear_kl(hidden, case.weight, labels, case.reference_hidden, case.reference_weight)
    assert all(bool((value[::3] == 0).all()) for value in ours)
    (ours.kl + ours.logps).sum().backward()
    assert hidden.grad is not None and bool((hidden.grad[::3] == 0).all()) and bool(hidden.grad.isfinite().all())


def test_the_log_probs_are_those_of_linear_logps() -> None:
    case = heads(n=1040, v=4300)
    ours = computed(case, [case.hidden, case.weight])
    torch.testing.assert_close(ours.logps, linear_logps(case.hidden, case.weight, case.labels, backend="tiled"))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case = heads(n=48)
    whole = computed(case, [case.hidden, case.weight])
    part = linear_kl(case.hidden[5:9], case.weight, case.labels[5:9], case.reference_hidden[5:9], case.reference_weight)
    torch.testing.assert_close(part.kl, whole.kl[5:9], rtol=0, atol=1e-6)


@pytest.mark.parametrize("trains,total", [("", 2), ("h", 5), ("hw", 6)])
def test_products_and_memory_are_as_promised(trains: str, total: int) -> None:
    n, d, v = 1040, 16, 9000
    hidden, weight = (
        normal(n, d, seed=1).requires_grad_("h" in trains),
        normal(v, d, seed=2).requires_grad_("w" in trains),
    )
    labels, its_hidden = random_labels(n, v), normal(n, d, seed=3)
    with Products() as seen, PeakBytes() as bytes_seen:
        ours = linear_kl(hidden, weight, labels, its_hidden, weight.detach())
        if trains:
            ours.kl.sum().backward()
    assert total <= seen.flops / (2 * n * d * v) < total + 0.02
    assert bytes_seen.peak < 3.5 * 512 * 4096 * 4 < n * v * 4


def test_two_vocabularies_are_refused() -> None:
    case = heads()
    with pytest.raises(ValueError, match=r"weight \(331, 24\), reference_weight \(300, 16\); expected one vocabulary"):
        linear_kl(case.hidden, case.weight, case.labels % 300, case.reference_hidden, case.reference_weight[:300])
