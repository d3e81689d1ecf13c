"""Which losses compare a chosen completion with a rejected one? One function each, of sums over scored tokens."""

from __future__ import annotations

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
