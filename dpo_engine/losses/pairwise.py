"""Which losses compare a chosen completion with a rejected one? One function each, of sums over scored tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`-(1 - eps) * logsigmoid(beta * h) - eps * logsigmoid(-beta * h)`, h = (pi_c - ref_c) - (pi_r - ref_r).

    Args:
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: (B,) sums of the
            log-probs of scored tokens, in nats.
        beta: how strongly the policy is held to the reference; positive.
        label_smoothing: `eps`, the share of labels taken to be flipped, in [0, 0.5); above 0 this is conservative DPO
            (cDPO).

    Returns:
        (B,) losses, log 2 where policy and reference agree.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing from Mitchell 2023, "A note on DPO with noisy
        preferences", eq. 3.
    """
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)


def bco_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    delta: Tensor | float,
) -> Tensor:
    """`-logsigmoid(beta * a - delta) - logsigmoid(delta - beta * b)`, a = pi_c - ref_c, b = pi_r - ref_r.

    A classifier that tells chosen from rejected completions by their reward; `delta` centres the rewards.

    Args:
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: (B,) sums of the
            log-probs of scored tokens, in nats.
        beta: how strongly the policy is held to the reference; positive.
        delta: () the mean of the rewards seen so far (`bco_rewards`), a constant: no gradient goes through it.

    Returns:
        (B,) losses, 2 log 2 where policy and reference agree.

    Source: Jung et al. 2024, "Binary classifier optimization for large language model alignment", arXiv:2404.04656,
        with its reward shift `delta` as a running mean.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return -logsigmoid(chosen - delta) - logsigmoid(delta - rejected)


def bco_rewards(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """`beta * (a + b) / 2`, (B,) without gradient: a pair's mean reward, whose running mean over pairs is BCO's `delta`."""
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return 0.5 * beta * (chosen + rejected).detach()


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    tau: float,
) -> Tensor:
    """`(h - 1 / (2 * tau))**2`, h = (pi_c - ref_c) - (pi_r - ref_r).

    A regression of the log-ratio's difference to a fixed margin, so that it does not grow for ever on pairs that are never
    contradicted.

    Args:
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: (B,) sums over scored
            tokens as in the paper, or means over them as in most trainers; nats.
        tau: regularisation, positive; the margin aimed for is `1 / (2 * tau)`.

    Returns:
        (B,) losses, `1 / (4 * tau**2)` where policy and reference agree.

    Source: Azar et al. 2023, "A general theoretical paradigm to understand learning from human preferences",
        arXiv:2310.12036, eq. 17.
    """
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return (h - 1 / (2 * tau)) ** 2


def ld_token_weights(places: Tensor, public_lengths: Tensor, ld_alpha: float) -> Tensor:
    """`1 if place < public_length else ld_alpha`: what a token counts in length-desensitised sums.

    Args:
        places: (N,) each scored token's place among those of its completion, from 0.
        public_lengths: (N,) scored tokens of the shorter completion of its pair.
        ld_alpha: weight of the tokens beyond that length, in [0, 1]; 1 is plain DPO.

    Returns:
        (N,) float32, for sums of the policy and of the reference alike.

    Source: Liu et al. 2024, "Length desensitization in direct preference optimization", arXiv:2409.06411, eq. 10.
    """
    beyond = places >= public_lengths
    return torch.where(beyond, ld_alpha, 1.0)
