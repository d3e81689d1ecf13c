"""What is each method's loss, by its paper and in nobody's code? Formulas and inputs that losses are compared with.

Nothing here calls the engine's losses: sums are taken apart in loops where a loss is vectorised, and `softplus` is written out.
Parameters that are not given are the values the papers or their authors use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dpo_engine.losses import ListStats, PairStats, UnpairedStats


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, which is `-log sigmoid(-x)`."""
    return torch.logaddexp(torch.zeros_like(x), x)


def sigmoid(x: Tensor) -> Tensor:
    return torch.exp(-softplus(-x))


def ratios(s: PairStats) -> tuple[Tensor, Tensor]:
    """a and b."""
    assert s.reference_chosen_logps is not None and s.reference_rejected_logps is not None
    return s.chosen_logps - s.reference_chosen_logps, s.rejected_logps - s.reference_rejected_logps


def margin(s: PairStats) -> Tensor:
    a, b = ratios(s)
    return a - b


def dpo(s: PairStats, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    z = beta * margin(s)
    return (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)


def dpo_norm(s: PairStats, beta: float = 5.0) -> Tensor:
    a, b = ratios(s)
    return softplus(-beta * (a / s.chosen_lengths - b / s.rejected_lengths))


def cdpo(s: PairStats, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    return dpo(s, beta, label_smoothing)


def rdpo(s: PairStats, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    z = beta * margin(s)
    return ((1 - label_smoothing) * softplus(-z) - label_smoothing * softplus(z)) / (1 - 2 * label_smoothing)


def ipo(s: PairStats, beta: float = 0.1, ipo_reduction: str = "mean") -> Tensor:
    a, b = ratios(s)
    if ipo_reduction == "mean":
        a, b = a / s.chosen_lengths, b / s.rejected_lengths
    return (a - b - 1 / (2 * beta)) ** 2


def hinge(s: PairStats, beta: float = 0.1) -> Tensor:
    z = beta * margin(s)
    return torch.where(z < 1, 1 - z, 0.0)


def dpo_nll(s: PairStats, beta: float = 0.1, rpo_alpha: float = 1.0) -> Tensor:
    return dpo(s, beta) - rpo_alpha * s.chosen_logps / s.chosen_lengths


def dpop(s: PairStats, beta: float = 0.1, dpop_lambda: float = 50.0) -> Tensor:
    a, b = ratios(s)
    lost = torch.where(a < 0, -a, 0.0)
    return softplus(-beta * (a - b - dpop_lambda * lost))


def apo_zero(s: PairStats, beta: float = 0.1) -> Tensor:
    a, b = ratios(s)
    return sigmoid(-beta * a) + sigmoid(beta * b)  # 1 - sigmoid(x) is sigmoid(-x)


def apo_down(s: PairStats, beta: float = 0.1) -> Tensor:
    a, b = ratios(s)
    return sigmoid(beta * a) + sigmoid(beta * b - beta * a)


def nca(s: PairStats, beta: float = 0.01) -> Tensor:
    a, b = ratios(s)
    return softplus(-beta * a) + (softplus(beta * a) + softplus(beta * b)) / 2


def exo(s: PairStats, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    z = beta * margin(s)
    found = 0.0
    for side, wanted in ((z, 1 - label_smoothing), (-z, label_smoothing)):
        found = found + sigmoid(side) * (-softplus(-side) - math.log(wanted))
    return found


def sppo(s: PairStats, beta: float = 1e-3) -> Tensor:
    a, b = ratios(s)
    return (a - (1 - 0.5) / beta) ** 2 + (b - (0 - 0.5) / beta) ** 2


def bco(s: PairStats, beta: float = 0.01) -> Tensor:
    a, b = ratios(s)
    delta = s.baseline if s.baseline is not None else (beta * torch.cat([a, b])).detach().mean()
    return softplus(delta - beta * a) + softplus(beta * b - delta)


def aot(s: PairStats, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """Of each pair in the order given: it is compared with the reference's margin of the same quantile."""
    assert s.reference_chosen_logps is not None and s.reference_rejected_logps is not None
    policy = s.chosen_logps - s.rejected_logps
    reference = sorted((s.reference_chosen_logps - s.reference_rejected_logps).tolist())
    order = sorted(range(len(policy)), key=lambda i: policy[i].item())
    place = {i: k for k, i in enumerate(order)}
    z = torch.stack([beta * (policy[i] - reference[place[i]]) for i in range(len(policy))])
    return (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)


def discopop(s: PairStats, beta: float = 0.05, discopop_tau: float = 0.05) -> Tensor:
    """Each term as an exponential of one exponent, so that none is 0 times infinity."""
    z = beta * margin(s)
    return sigmoid(-z / discopop_tau) * softplus(-z) + torch.exp(-softplus(-z / discopop_tau) - z)


def f_dpo(
    s: PairStats, beta: float = 0.1, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5
) -> Tensor:
    """By f'(u) at u = exp(a) and exp(b); not for ratios whose exp overflows."""
    alpha = f_alpha_divergence_coef
    slope: Callable[[Tensor], Tensor] = {
        "reverse_kl": lambda u: torch.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "js_divergence": lambda u: torch.log(2 * u / (1 + u)),
        "alpha_divergence": lambda u: (u ** (alpha - 1) - 1) / (alpha - 1),
    }[f_divergence_type]
    a, b = ratios(s)
    return softplus(-beta * (slope(torch.exp(a)) - slope(torch.exp(b))))


def ld_dpo(s: PairStats, beta: float = 0.1, ld_alpha: float = 0.5) -> Tensor:
    """Tokens of the shorter one's length count 1, those beyond `ld_alpha`."""

    def weighted(whole: Tensor, public: Tensor | None) -> Tensor:
        assert public is not None
        return (1 - ld_alpha) * public + ld_alpha * whole

    assert s.reference_chosen_logps is not None and s.reference_rejected_logps is not None
    a = weighted(s.chosen_logps, s.chosen_public_logps)
    a = a - weighted(s.reference_chosen_logps, s.reference_chosen_public_logps)
    b = weighted(s.rejected_logps, s.rejected_public_logps)
    b = b - weighted(s.reference_rejected_logps, s.reference_rejected_public_logps)
    return softplus(-beta * (a - b))


def r_dpo(s: PairStats, beta: float = 0.1, r_dpo_alpha: float = 0.01) -> Tensor:
    return softplus(-(beta * margin(s) + r_dpo_alpha * (s.chosen_lengths - s.rejected_lengths)))


def wpo(s: PairStats, beta: float = 0.01) -> Tensor:
    assert s.chosen_confidence is not None and s.rejected_confidence is not None
    weight = torch.exp(s.chosen_confidence) * torch.exp(s.rejected_confidence)
    return torch.where(weight < 1, weight, 1.0).detach() * dpo(s, beta)


def tr_dpo(s: PairStats, beta: float = 0.1) -> Tensor:
    return dpo(s, beta)


def tdpo(s: PairStats, beta: float = 0.1, tdpo_alpha: float = 0.5) -> Tensor:
    assert s.chosen_kl is not None and s.rejected_kl is not None
    return softplus(-beta * (margin(s) - tdpo_alpha * (s.rejected_kl - s.chosen_kl.detach())))


def sft(s: PairStats) -> Tensor:
    return -(s.chosen_logps / s.chosen_lengths)


def cpo(s: PairStats, beta: float = 0.1, label_smoothing: float = 0.0, cpo_alpha: float = 1.0) -> Tensor:
    z = beta * (s.chosen_logps - s.rejected_logps)
    return (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z) + cpo_alpha * sft(s)


def simpo(s: PairStats, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> Tensor:
    gamma = gamma_beta_ratio * beta
    return softplus(gamma - beta * (s.chosen_logps / s.chosen_lengths - s.rejected_logps / s.rejected_lengths))


def orpo(s: PairStats, beta: float = 0.1) -> Tensor:
    """log(p / (1 - p)) of p = exp(x) as `-log(expm1(-x))`."""
    odds = [
        -torch.where(x > -30, torch.log(torch.expm1(-x.clamp(min=-30.0))), -x)
        for x in (s.chosen_logps / s.chosen_lengths, s.rejected_logps / s.rejected_lengths)
    ]
    return sft(s) + beta * softplus(odds[1] - odds[0])


def kto(s: UnpairedStats, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    assert s.reference_logps is not None and s.baseline is not None
    found = []
    for logp, reference, is_good in zip(s.logps, s.reference_logps, s.desirable.tolist(), strict=True):
        u = logp - reference
        value = sigmoid(beta * (s.baseline - u)) if is_good else sigmoid(beta * (u - s.baseline))
        found.append((desirable_weight if is_good else undesirable_weight) * value)
    return torch.stack(found)


def plackett_luce(s: ListStats, beta: float = 0.1) -> Tensor:
    """Breslow's ties: whoever has someone below is compared with all of its rank and below."""
    assert s.reference_logps is not None
    scores = beta * (s.logps - s.reference_logps)
    found = []
    for one in range(s.lists):
        mine = [i for i in range(len(scores)) if s.list_ids[i] == one]
        total = scores.new_zeros(())
        for i in mine:
            if any(s.ranks[j] > s.ranks[i] for j in mine):
                total = total + torch.logsumexp(torch.stack([scores[j] for j in mine if s.ranks[j] >= s.ranks[i]]), 0)
                total = total - scores[i]
        found.append(total)
    return torch.stack(found)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        dpo, dpo_norm, cdpo, rdpo, ipo, hinge, dpo_nll, dpop, apo_zero, apo_down, nca, exo, sppo, bco, aot, discopop, f_dpo,
        ld_dpo, r_dpo, wpo, tr_dpo, tdpo, cpo, simpo, orpo, sft, kto, plackett_luce,
    )
}  # fmt: skip

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FORMULAS),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2}),
    ("dpo_norm", {"beta": 2.0}),
    ("cdpo", {"label_smoothing": 0.3}),
    ("rdpo", {"beta": 0.3, "label_smoothing": 0.45}),
    ("ipo", {"beta": 0.02}),
    ("ipo", {"beta": 0.3, "ipo_reduction": "sum"}),
    ("dpo_nll", {"beta": 0.3, "rpo_alpha": 0.2}),
    ("dpop", {"dpop_lambda": 5.0}),
    ("exo", {"beta": 0.5, "label_smoothing": 0.1}),
    ("sppo", {"beta": 0.1}),
    ("aot", {"beta": 0.2, "label_smoothing": 0.1}),
    ("discopop", {"beta": 0.1, "discopop_tau": 0.2}),
    ("discopop", {"beta": 1.0}),
    ("f_dpo", {"f_divergence_type": "forward_kl"}),
    ("f_dpo", {"f_divergence_type": "js_divergence", "beta": 1.0}),
    ("f_dpo", {"f_divergence_type": "alpha_divergence"}),
    ("f_dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0}),
    ("f_dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": -0.5}),
    ("ld_dpo", {"ld_alpha": 0.0}),
    ("ld_dpo", {"ld_alpha": 0.9, "beta": 0.3}),
    ("r_dpo", {"r_dpo_alpha": 0.05}),
    ("wpo", {"beta": 0.1}),
    ("tdpo", {"tdpo_alpha": 0.1, "beta": 0.3}),
    ("cpo", {"label_smoothing": 0.1, "cpo_alpha": 0.3}),
    ("simpo", {"beta": 10.0, "gamma_beta_ratio": 0.3}),
    ("orpo", {"beta": 1.0}),
    ("kto", {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
    ("plackett_luce", {"beta": 0.5}),
]
"""Every method as it comes, and what else its parameters can say."""


def case_id(case: Any) -> str:
    name, settings = case
    return "-".join([name, *(f"{key}={value}" for key, value in settings.items())])


# ---- inputs ----


def stats_of(name: str, *, hard: bool, count: int = 48, seed: int = 0) -> Any:
    """Statistics in float64 for a method.

    Args:
        hard: log-probs of sums from -1e-3 to -800 and lengths from 1 to 2000, both spread evenly over their orders of magnitude;
            else the sizes of short replies, with policy and reference a few nats apart.
    """
    if name == "kto":
        return unpaired(hard=hard, count=count, seed=seed)
    if name == "plackett_luce":
        return ranked(hard=hard, seed=seed)
    found = pairs(hard=hard, count=count, seed=seed)
    if hard and name == "f_dpo":  # exp of the ratios must be finite in float32 too
        assert found.reference_chosen_logps is not None and found.reference_rejected_logps is not None
        sides = {
            side: under + 40 * torch.tanh((own - under) / 40)
            for side, own, under in (
                ("chosen_logps", found.chosen_logps, found.reference_chosen_logps),
                ("rejected_logps", found.rejected_logps, found.reference_rejected_logps),
            )
        }
        return replace(found, **sides)
    return found


class Numbers:
    """Random numbers of one seed, float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator, dtype=torch.float64)

    def spread(self, count: int, low: float, high: float) -> Tensor:
        """Evenly over orders of magnitude, both ends among them."""
        found = torch.exp(self.uniform(count, math.log(low), math.log(high)))
        found[0], found[-1] = low, high
        return found

    def shuffled(self, values: Tensor) -> Tensor:
        return values[torch.randperm(len(values), generator=self.generator)]


def pairs(*, hard: bool, count: int = 48, seed: int = 0) -> PairStats:
    """Every field that some method reads, but for `baseline`."""
    numbers = Numbers(seed)
    if hard:
        four = [-numbers.shuffled(numbers.spread(count, 1e-3, 800)) for _ in range(4)]
        lengths = [numbers.shuffled(numbers.spread(count, 1, 2000)).round() for _ in range(2)]
    else:
        four = [numbers.uniform(count, -60, -20) for _ in range(2)]
        four += [four[0] + numbers.uniform(count, -6, 6), four[1] + numbers.uniform(count, -6, 6)]
        lengths = [numbers.uniform(count, 3, 40).round() for _ in range(2)]
    shorter = torch.minimum(*lengths)
    shares = [torch.where(length > shorter, numbers.uniform(count, 0, 1), 1.0) for length in lengths]
    return PairStats(
        chosen_logps=four[0],
        rejected_logps=four[1],
        reference_chosen_logps=four[2],
        reference_rejected_logps=four[3],
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        chosen_public_logps=four[0] * shares[0],
        rejected_public_logps=four[1] * shares[1],
        reference_chosen_public_logps=four[2] * shares[0],
        reference_rejected_public_logps=four[3] * shares[1],
        chosen_confidence=numbers.uniform(count, -3, 1),
        rejected_confidence=numbers.uniform(count, -3, 1),
        chosen_kl=numbers.uniform(count, 0, 20),
        rejected_kl=numbers.uniform(count, 0, 20),
    )


def unpaired(*, hard: bool, count: int = 48, seed: int = 0) -> UnpairedStats:
    of_pairs, numbers = pairs(hard=hard, count=count, seed=seed), Numbers(seed + 1)
    return UnpairedStats(
        logps=of_pairs.chosen_logps,
        reference_logps=of_pairs.reference_chosen_logps,
        lengths=of_pairs.chosen_lengths,
        desirable=numbers.uniform(count, 0, 1) < 0.6,
        baseline=torch.tensor(0.7, dtype=torch.float64),
    )


def ranked(*, hard: bool, seed: int = 0) -> ListStats:
    """Lists of 2 to 5: without ties, with ties in the middle, at the top and at the bottom, and of nothing but a tie."""
    ranks = [[0, 1], [0, 1, 2, 3, 4], [0, 1, 1, 2], [0, 0, 1], [0, 1, 1], [0, 0], [0, 0, 1, 1, 2]]
    flat = [rank for one in ranks for rank in one]
    of_pairs = pairs(hard=hard, count=len(flat), seed=seed)
    return ListStats(
        logps=of_pairs.chosen_logps,
        reference_logps=of_pairs.reference_chosen_logps,
        lengths=of_pairs.chosen_lengths,
        list_ids=torch.tensor([i for i, one in enumerate(ranks) for _ in one]),
        ranks=torch.tensor(flat),
        lists=len(ranks),
    )


def cast(stats: Any, dtype: torch.dtype) -> Any:
    """The same, each number rounded to a type."""
    numbers = {
        field.name: value.to(dtype)
        for field in fields(stats)
        if isinstance(value := getattr(stats, field.name), Tensor) and value.is_floating_point()
    }
    return replace(stats, **numbers)


def leaves(stats: Any) -> tuple[Any, dict[str, Tensor]]:
    """The same statistics with fields that a loss is differentiated by as leaves, and these by name."""
    found = {
        name: getattr(stats, name).detach().clone().requires_grad_()
        for name in stats.with_gradient
        if getattr(stats, name) is not None
    }
    return replace(stats, **found), found


def value_and_gradients(loss: Callable[[Any], Tensor], stats: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) losses, and the gradient of their sum by each field (0 where none comes)."""
    stats, by_name = leaves(stats)
    losses = loss(stats)
    if not losses.requires_grad:
        return losses, {name: torch.zeros_like(leaf) for name, leaf in by_name.items()}
    found = torch.autograd.grad(losses.sum(), list(by_name.values()), allow_unused=True, materialize_grads=True)
    return losses.detach(), dict(zip(by_name, found, strict=True))
