"""Which loss needs no pairs, but completions that are labelled desirable or not? KTO."""

from __future__ import annotations

import torch
from torch import Tensor


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """`w_D * (1 - sigmoid(beta * (u - z0)))` of a desirable completion, `w_U * (1 - sigmoid(beta * (z0 - u)))` of another.

    Args:
        policy_logps, reference_logps: (B,) sums of scored tokens' log-probs, in nats; `u` is their difference.
        desirable: (B,) bool.
        baseline: () `z0` (`kto_baseline`), a constant.
        beta: how strongly the policy is held to the reference; positive.
        desirable_weight, undesirable_weight: what the classes count: `desirable_weight * n_D / (undesirable_weight * n_U)` in
            [1, 4/3] is advised.

    Returns:
        (B,), half the weight where policy and reference agree.

    Source: Ethayarajh et al. 2024, "KTO: model alignment as prospect theoretic optimization", arXiv:2402.01306, eq. 8.
    """
    distance = beta * (policy_logps - reference_logps - baseline)
    good = desirable_weight * torch.sigmoid(-distance)
    return torch.where(desirable, good, undesirable_weight * torch.sigmoid(distance))


def kto_baseline(mean_log_ratio: Tensor) -> Tensor:
    """`max(0, mean of u)` () without gradient, over completions put behind prompts they do not belong to.

    Args:
        mean_log_ratio: () the mean of `policy_logps - reference_logps` over all mismatched completions of the step and its ranks:
            clamped after it is averaged, since a mean of clamped parts is another number.
    """
    return mean_log_ratio.detach().clamp(min=0.0)
