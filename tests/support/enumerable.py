"""Which responses are there at all, and how likely is each? Models of three words, for tests of what a loss has as its optimum.

A response is up to two letters, of which fewer than two are followed by the end token: with two letters 7 responses, whose
probabilities add up to 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

END, LETTERS, LONGEST = 0, 2, 2
# Each has two different letters: where all are alike, attention by relative positions cannot tell how many there are, and
# a model could not take every distribution.
PROMPTS = ((1, 2), (2, 1))
RESPONSES: tuple[tuple[int, ...], ...] = tuple(
    string if length == LONGEST else (*string, END)
    for length in range(LONGEST + 1)
    for string in itertools.product(range(1, LETTERS + 1), repeat=length)
)
ALL_PAIRS = [(i, j) for i in range(len(RESPONSES)) for j in range(len(RESPONSES)) if i != j]


def response_logps(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> Tensor:
    """(P, R) float64, by the model's own logits, a response at a time: nothing of the engine."""
    found = []
    with torch.no_grad():
        for prompt in prompts:
            for response in RESPONSES:
                ids = torch.tensor([[*prompt, *response]])
                logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
                found.append(sum(logps[place, word] for place, word in zip(places, response, strict=True)))
    return torch.stack(found).view(len(prompts), len(RESPONSES))  # type: ignore[arg-type]


def preferences(rewards: Tensor) -> Tensor:
    """(P, R, R) Bradley-Terry: `p[x, i, j] = sigmoid(r[x, i] - r[x, j])`."""
    return (rewards[..., :, None] - rewards[..., None, :]).sigmoid()


def kl_optimum(reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(P, R) `ref * exp(r / beta) / Z`: DPO's, and that of every reward model followed by exact RL."""
    return (reference_logps + rewards / beta).softmax(-1)


def ipo_optimum(reference_logps: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """(P, R) `ref * exp(p(y > mu) / tau) / Z`, p(y > mu) the mean preference over a response drawn from mu = ref.

    With weights mu(y) mu(y') the sum form's loss is least where every y has `E_mu[h(y, y')] = E_mu[2 p(y > y') - 1] / (2 tau)`.
    """
    over_reference = (preferences(rewards) * reference_logps.exp()[:, None, :]).sum(-1)
    return (reference_logps + over_reference / tau).softmax(-1)


def f_optimum(reference_logps: Tensor, rewards: Tensor, beta: float, ratio_at: Callable[[Tensor], Tensor]) -> Tensor:
    """(P, R) pi with `beta * f'(pi / ref) = r - lambda`, by bisection for the lambda with which pi adds up to 1.

    Args:
        ratio_at: the inverse of f', increasing; infinite above its range.
    """
    reference = reference_logps.exp()
    low = rewards.min(-1, keepdim=True).values - 50 * beta
    high = rewards.max(-1, keepdim=True).values + 50 * beta
    for _ in range(200):
        middle = (low + high) / 2
        too_much = (reference * ratio_at((rewards - middle) / beta)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return reference * ratio_at((rewards - high) / beta)


def total_variation(first: Tensor, second: Tensor) -> float:
    """The largest over prompts of `sum |p - q| / 2`."""
    return float((first - second).abs().sum(-1).max()) / 2
