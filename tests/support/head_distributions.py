"""Which inputs break operators that are right on randn?

Each builder gives a `Case` in float32 that a test rounds to the dtype it is about. On the CPU a tile is 1024 rows by 2048
columns, so some shapes pass both. Upstream gradients are never uniform and hold zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from support.oracle import Case


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def upstream(n: int) -> Tensor:
    """Every third entry is 0, but not the first."""
    g = normal(n, seed=7)
    g[1::3] = 0.0
    return g


def random_labels(n: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(11))


def randn(n: int = 37, d: int = 24, v: int = 331, spread: float = 1.0, **head: object) -> Case:
    """Logits of standard deviation `spread`."""
    hidden, weight = normal(n, d, seed=1, scale=spread * d**-0.5), normal(v, d, seed=2)
    return Case(hidden=hidden, weight=weight, labels=random_labels(n, v), upstream=upstream(n), **head)


def with_bias(v: int = 331, **head: object) -> Case:
    return randn(v=v, bias=normal(v, seed=3, scale=2.0), **head)


def edge_labels(n: int, v: int) -> Case:
    """Labels at the first and last id and on both sides of every tile edge."""
    edges = sorted({e for e in (0, 1, 2047, 2048, 4095, 4096, 8191, 8192, v - 2, v - 1) if 0 <= e < v})
    case = randn(n=n, d=5, v=v)
    labels = torch.tensor(edges).repeat(-(-n // len(edges)))[:n]
    return Case(hidden=case.hidden, weight=case.weight, labels=labels, upstream=case.upstream)


def gap(low: float, high: float, n: int = 24, v: int = 200) -> Case:
    """Row i's label is ahead of the others by `low` to `high` nats, give or take the unit noise of the others."""
    d = 16
    hidden, weight, labels = normal(n, d, seed=1, scale=0.02), normal(v, d, seed=2), random_labels(n, v)
    # One feature that only labels have, and it says how far ahead; labels that several rows share are as far for all.
    weight[:, 0] = 0.0
    weight[labels, 0] = 1.0
    # A row must not lift the other rows' labels: each label has a feature of its own.
    used, own = labels.unique(return_inverse=True)
    features = torch.zeros(v, len(used))
    features[used, torch.arange(len(used))] = 1.0
    lift = torch.zeros(n, len(used))
    lift[torch.arange(n), own] = torch.linspace(low, high, n)
    return Case(
        hidden=torch.cat([hidden[:, 1:], lift], 1),
        weight=torch.cat([weight[:, 1:], features], 1),
        labels=labels,
        upstream=upstream(n),
    )


def equal() -> Case:
    """Every logit is 0."""
    case = randn()
    return Case(hidden=torch.zeros_like(case.hidden), weight=case.weight, labels=case.labels, upstream=case.upstream)


def all_negative() -> Case:
    """Logits about -40: a 0 that slips in from padding would take all of the probability."""
    case = randn(n=19, d=8, v=4099)
    hidden = torch.cat([case.hidden, torch.full((19, 1), 4.0)], 1)
    weight = torch.cat([case.weight, torch.full((4099, 1), -10.0)], 1)
    return Case(hidden=hidden, weight=weight, labels=case.labels, upstream=case.upstream)


def common_mode() -> Case:
    """Logits about 4096 that differ by a few: half of a float32's digits are spent before the softmax."""
    case = randn(n=19, d=8, v=333)
    hidden = torch.cat([case.hidden, torch.full((19, 1), 64.0)], 1)
    weight = torch.cat([case.weight, torch.full((333, 1), 64.0)], 1)
    return Case(hidden=hidden, weight=weight, labels=case.labels, upstream=case.upstream)


def duplicated() -> Case:
    """One row of the weight, again and again: the true gradient of `hidden` is 0."""
    case = randn()
    weight = case.weight[:1].expand_as(case.weight).contiguous()
    return Case(hidden=case.hidden, weight=weight, labels=case.labels, upstream=case.upstream)


def one_hot() -> Case:
    """Each row puts everything on one id; for half of the rows that is the label."""
    v = 48
    hit = random_labels(32, v)
    labels = torch.where(torch.arange(32) % 2 == 0, hit, (hit + 1) % v)
    hidden = torch.nn.functional.one_hot(hit, v).float()
    return Case(hidden=hidden, weight=torch.eye(v) * 50.0, labels=labels, upstream=upstream(32))


def rising(n: int = 21, v: int = 9001) -> Case:
    """Logits rise by 1000 nats over the vocabulary, labels lie low: every tile rescales what was summed before it."""
    case = randn(n=n, d=6, v=v)
    hidden = torch.cat([case.hidden, torch.full((n, 1), 50.0)], 1)
    weight = torch.cat([case.weight, torch.linspace(-10.0, 10.0, v)[:, None]], 1)
    return Case(hidden=hidden, weight=weight, labels=torch.arange(n) * 7 % v, upstream=case.upstream)


def minus_infinity(n: int = 37, v: int = 9001, masked: slice = slice(4000, 8500)) -> Case:
    """A mask of -inf in the bias that takes a whole tile and parts of both its neighbours."""
    case = with_bias(n=n, v=v)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[masked] = float("-inf")
    labels = case.labels % masked.start
    labels[::4] = v - 1
    return Case(hidden=case.hidden, weight=case.weight, labels=labels, upstream=case.upstream, bias=bias)


def strided(n: int = 40, v: int = 700) -> Case:
    """Every other row and feature of a wider `hidden`, and a `weight` stored as (D, V)."""
    case = randn(n=n, d=12, v=v)
    hidden = torch.full((2 * n, 24), float("nan"))
    hidden[::2, 1::2] = case.hidden
    return Case(
        hidden=hidden[::2, 1::2], weight=case.weight.T.contiguous().T, labels=case.labels, upstream=case.upstream
    )


def transposed() -> Case:
    """`hidden` stored as (D, N), and every third row of a longer `weight`."""
    case = randn(n=530, d=6, v=411)
    weight = torch.full((3 * 411, 6), float("nan"))
    weight[::3] = case.weight
    return Case(hidden=case.hidden.T.contiguous().T, weight=weight[::3], labels=case.labels, upstream=case.upstream)


DISTRIBUTIONS: dict[str, Callable[[], Case]] = {
    "randn": randn,
    "one row of two words": lambda: randn(n=1, d=3, v=2),
    "vocabulary of one tile and a bit": lambda: randn(n=9, d=16, v=4113),
    "vocabulary of 65537": lambda: edge_labels(5, 65537),
    "vocabulary of 256001": lambda: edge_labels(3, 256001),
    "two row tiles, labels at tile edges": lambda: edge_labels(1040, 8195),
    "logits about 1e2": lambda: randn(spread=100.0),
    "logits about 1e4": lambda: randn(spread=1e4),
    "softcap": lambda: randn(spread=6.0, softcap=5.0),
    "softcap, saturated": lambda: randn(spread=90.0, softcap=30.0),
    "scale": lambda: randn(spread=20.0, logit_scale=0.0625),
    "negative scale": lambda: randn(logit_scale=-2.5),
    "bias": with_bias,
    "bias, scale and softcap": lambda: with_bias(logit_scale=1.75, softcap=4.0),
    "confident": lambda: gap(8.0, 20.0),
    "logp near -1e-12": lambda: gap(30.0, 36.0),
    "logp below -130": lambda: gap(-300.0, -140.0),
    "all equal": equal,
    "all negative": all_negative,
    "common mode": common_mode,
    "duplicated rows": duplicated,
    "one-hot": one_hot,
    "rising": rising,
    "a block of -inf": minus_infinity,
    "strided hidden, transposed weight": strided,
    "transposed hidden, strided weight": transposed,
}
