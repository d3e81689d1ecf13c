"""Which losses of a pair need no reference? One function each, of sums and lengths.

`chosen_logps`, `rejected_logps` (B,) are the sums of scored tokens' log-probs under the policy, in nats; lengths (B,) their
numbers. Every function returns (B,) losses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_engine.losses.pairwise import smoothed_logistic


def nll_loss(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """`-chosen_logps / chosen_lengths`: a token's negative log-likelihood, a mean over each sequence's own tokens.

    Each sequence counts the same, however long; a mean over a batch's tokens would count long ones more.

    Source: supervised fine-tuning as before a preference stage, Ouyang et al. 2022, arXiv:2203.02155.
    """
    return -chosen_logps / chosen_lengths


def cpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, beta: float, label_smoothing: float,
    cpo_alpha: float,
) -> Tensor:  # fmt: skip
    """`-(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z) + cpo_alpha * nll(chosen)`, z = beta * (chosen - rejected).

    Source: Xu et al. 2024, "Contrastive preference optimization", arXiv:2401.08417, eq. 4 and 5; the likelihood term as the
        mean over each sequence's tokens.
    """
    z = beta * (chosen_logps - rejected_logps)
    return smoothed_logistic(z, label_smoothing) + cpo_alpha * nll_loss(chosen_logps, chosen_lengths)


def simpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float,
    gamma_beta_ratio: float,
) -> Tensor:  # fmt: skip
    """`-logsigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths - gamma_beta_ratio))`.

    Args:
        gamma_beta_ratio: the margin aimed for over beta, in nats a token; the paper's gamma is `beta * gamma_beta_ratio`.

    Source: Meng et al. 2024, "SimPO", arXiv:2405.14734, eq. 6.
    """
    return -logsigmoid(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths - gamma_beta_ratio))


def orpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float
) -> Tensor:
    """`nll(chosen) - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))`, of mean log-probs.

    Args:
        beta: the paper's lambda.

    Source: Hong et al. 2024, "ORPO", arXiv:2403.07691, eq. 6 and 7; the likelihood is that of the completion.
    """
    odds = log_odds(chosen_logps / chosen_lengths) - log_odds(rejected_logps / rejected_lengths)
    return nll_loss(chosen_logps, chosen_lengths) - beta * logsigmoid(odds)


def log_odds(logps: Tensor) -> Tensor:
    """`logps - log1mexp(logps)`, log(p / (1 - p)) of p = exp(logps).

    A log-prob above -eps of its dtype counts as -eps: nearer to 0 the odds have no digits, and at 0 they are infinite.
    """
    below = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return below - torch.log(-torch.expm1(below))
