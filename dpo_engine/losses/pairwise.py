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
