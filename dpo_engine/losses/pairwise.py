"""Which losses compare a chosen completion with a rejected one, and both with a reference? One function each.

Every function takes the same four sums, (B,) each, of the log-probs of scored tokens, in nats: of the chosen and the rejected
completion under the policy, then under the reference. With

    a = policy_chosen_logps - reference_chosen_logps
    b = policy_rejected_logps - reference_rejected_logps
    h = a - b

it returns (B,) losses. `beta`, positive, is how strongly the policy is held to the reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_LARGEST_EXPONENT = 80.0  # exp of it is finite in float32, and so are differences


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`-(1 - eps) * logsigmoid(beta * h) - eps * logsigmoid(-beta * h)`.

    Args:
        label_smoothing: `eps`, the share of labels taken to be flipped, in [0, 0.5); above 0 this is conservative DPO
            (cDPO).

    Returns:
        log 2 where policy and reference agree.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing from Mitchell 2023, "A note on DPO with noisy
        preferences", eq. 3; of means over tokens in place of sums, Lambert et al. 2024, Tulu 3, arXiv:2411.15124.
    """
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return smoothed_logistic(beta * h, label_smoothing)


def rdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """`(-(1 - eps) * logsigmoid(beta * h) + eps * logsigmoid(-beta * h)) / (1 - 2 * eps)`: robust DPO.

    Averaged over labels that are flipped with probability `eps` it is DPO of the true ones; a single loss has no bound below.

    Source: Chowdhury et al. 2024, "Provably robust DPO", arXiv:2403.00409, eq. 12.
    """
    z = beta * ((policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps))
    eps = label_smoothing
    return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    tau: float,
) -> Tensor:
    """`(h - 1 / (2 * tau))**2`.

    A regression of the log-ratio's difference to a fixed margin, so that it does not grow for ever on pairs that are never
    contradicted. The four may also be means over tokens, as in most trainers.

    Returns:
        `1 / (4 * tau**2)` where policy and reference agree.

    Source: Azar et al. 2023, "A general theoretical paradigm to understand learning from human preferences",
        arXiv:2310.12036, eq. 17.
    """
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return (h - 1 / (2 * tau)) ** 2


def hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """`relu(1 - beta * h)`.

    Source: Zhao et al. 2023, SLiC-HF, arXiv:2305.10425, with the log-ratio to a reference as in Liu et al. 2023 (RSO),
        arXiv:2309.06657, table 1.
    """
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return relu(1 - beta * h)


def dpop_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    dpop_lambda: float,
) -> Tensor:
    """`-logsigmoid(beta * (h - dpop_lambda * relu(-a)))`: DPO that pays for every nat the chosen completion loses.

    Source: Pal et al. 2024, Smaug, arXiv:2402.13228, eq. 3: the penalty is inside the sigmoid, times beta.
    """
    a, b = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    return -logsigmoid(beta * (a - b - dpop_lambda * relu(-a)))


def apo_zero_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """`1 - sigmoid(beta * a) + sigmoid(beta * b)`: the chosen completion goes up, the rejected one down.

    For chosen completions better than what the model says by itself.

    Source: D'Oosterlinck et al. 2024, "Anchored preference optimization", arXiv:2408.06266, eq. 7.
    """
    a, b = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    return torch.sigmoid(-beta * a) + torch.sigmoid(beta * b)


def apo_down_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """`sigmoid(beta * a) + 1 - sigmoid(beta * h)`: both completions go down, the rejected one further.

    For chosen completions worse than what the model says by itself.

    Source: D'Oosterlinck et al. 2024, "Anchored preference optimization", arXiv:2408.06266, eq. 8.
    """
    a, b = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    return torch.sigmoid(beta * a) + torch.sigmoid(-beta * (a - b))


def nca_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """`-logsigmoid(beta * a) - logsigmoid(-beta * a) / 2 - logsigmoid(-beta * b) / 2`: each completion against noise.

    Returns:
        2 log 2 where policy and reference agree.

    Source: Chen et al. 2024, "Noise contrastive alignment of language models with explicit rewards", arXiv:2402.05369,
        eq. 12 for a pair.
    """
    a = beta * (policy_chosen_logps - reference_chosen_logps)
    b = beta * (policy_rejected_logps - reference_rejected_logps)
    return -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)


def exo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """`p * log(p / (1 - eps)) + (1 - p) * log((1 - p) / eps)`, p = sigmoid(beta * h): the KL from smoothed labels.

    Args:
        label_smoothing: `eps`, in (0, 0.5): at 0 the divergence is infinite.

    Source: Ji et al. 2024, "Towards efficient exact optimization of language model alignment", arXiv:2402.00856, eq. 16.
    """
    z = beta * ((policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps))
    likely, unlikely = math.log1p(-label_smoothing), math.log(label_smoothing)
    return torch.sigmoid(z) * (logsigmoid(z) - likely) + torch.sigmoid(-z) * (logsigmoid(-z) - unlikely)


def sppo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """`(a - 1 / (2 * beta))**2 + (b + 1 / (2 * beta))**2`: self-play, with the chosen completion sure to win.

    Returns:
        `1 / (2 * beta**2)` where policy and reference agree.

    Source: Wu et al. 2024, "Self-play preference optimization", arXiv:2405.00675, eq. 4.7 with P of 1 and 0.
    """
    a, b = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


def bco_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    delta: Tensor | float,
) -> Tensor:
    """`-logsigmoid(beta * a - delta) - logsigmoid(delta - beta * b)`.

    A classifier that tells chosen from rejected completions by their reward; `delta` centres the rewards.

    Args:
        delta: () the mean of the rewards seen so far (`bco_rewards`), a constant: no gradient goes through it.

    Returns:
        2 log 2 where policy and reference agree.

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
    """`beta * (a + b) / 2`, without gradient: a pair's mean reward, whose running mean over pairs is BCO's `delta`."""
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return 0.5 * beta * (chosen + rejected).detach()


def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`dpo(sort(policy_chosen - policy_rejected) - sort(reference_chosen - reference_rejected))`, in the policy's order.

    The distribution of the policy's margins is moved above that of the reference's, quantile by quantile: a pair is compared
    with the reference's pair of the same place. The pairs depend on each other.

    Source: Melnyk et al. 2024, "Distributional preference alignment of LLMs via optimal transport", arXiv:2406.05882, eq. 9.
    """
    margins = policy_chosen_logps - policy_rejected_logps
    places = margins.detach().argsort(stable=True).argsort(stable=True)  # of each pair among the policy's margins
    against = (reference_chosen_logps - reference_rejected_logps).sort().values[places]
    return smoothed_logistic(beta * (margins - against), label_smoothing)


def discopop_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    discopop_tau: float,
) -> Tensor:
    """`(1 - m) * -logsigmoid(z) + m * exp(-z)`, z = beta * h, m = sigmoid(z / discopop_tau); not convex.

    Source: Lu et al. 2024, "Discovering preference optimization algorithms with and for large language models",
        arXiv:2406.08414, eq. 5 (log-ratio modulated loss).
    """
    z = beta * ((policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps))
    logistic = torch.sigmoid(-z / discopop_tau) * -logsigmoid(z)
    return logistic + torch.exp(logsigmoid(z / discopop_tau) - z)  # one exponent: m may be 0 where exp(-z) is infinite


def f_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """`-logsigmoid(beta * (f'(exp(a)) - f'(exp(b))))`: the policy is held to the reference by another divergence.

    Args:
        f_divergence_type: one of `F_DIVERGENCES`; "reverse_kl" is DPO.
        f_alpha_divergence_coef: `alpha` of "alpha_divergence", not 1 (which is "reverse_kl"); 0 is "forward_kl".

    Source: Wang et al. 2023, "Beyond reverse KL", arXiv:2309.16240, table 1. Its alpha is 1 - `f_alpha_divergence_coef`.
    """
    a, b = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    slopes = [f_slope(x, f_divergence_type, f_alpha_divergence_coef) for x in (a, b)]
    return -logsigmoid(beta * (slopes[0] - slopes[1]))


def f_slope(log_ratio: Tensor, f_divergence_type: str, f_alpha_divergence_coef: float = 0.5) -> Tensor:
    """`f'(exp(log_ratio))`, up to a constant, of the f that makes `sum reference * f(policy / reference)` the divergence.

    f(u) of reverse_kl: u log u; forward_kl: -log u; js_divergence: u log u - (u + 1) log((u + 1) / 2);
    alpha_divergence: (u**alpha - alpha * u) / (alpha * (alpha - 1)). Exponents end at 80, beyond which the slope is level.
    """
    if f_divergence_type == "forward_kl":
        return -(-log_ratio).clamp(max=_LARGEST_EXPONENT).exp()
    if f_divergence_type == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if f_divergence_type == "alpha_divergence":
        power = f_alpha_divergence_coef - 1
        return torch.expm1((power * log_ratio).clamp(max=_LARGEST_EXPONENT)) / power
    return log_ratio


def ld_logps(logps: Tensor, public_logps: Tensor, ld_alpha: float) -> Tensor:
    """`public + ld_alpha * (logps - public)`: sums in which tokens beyond the pair's shorter completion count `ld_alpha`.

    Of the policy and the reference alike; with them DPO is LD-DPO. `ld_alpha` in [0, 1]; 1 is plain DPO.

    Source: Liu et al. 2024, "Length desensitization in direct preference optimization", arXiv:2409.06411, eq. 10.
    """
    return public_logps + ld_alpha * (logps - public_logps)


def r_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    r_dpo_alpha: float,
) -> Tensor:
    """`-logsigmoid(beta * h + r_dpo_alpha * (chosen_lengths - rejected_lengths))`: longer chosen completions learn less.

    Not log 2 where policy and reference agree, but where lengths do too.

    Source: Park et al. 2024, "Disentangling length from quality in direct preference optimization", arXiv:2403.19159, eq. 9.
    """
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return -logsigmoid(beta * h + r_dpo_alpha * (chosen_lengths - rejected_lengths))


def wpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_confidence: Tensor,
    rejected_confidence: Tensor,
    beta: float,
) -> Tensor:
    """`dpo * min(exp(chosen_confidence + rejected_confidence), 1)`: pairs the policy could have written itself count more.

    Args:
        chosen_confidence, rejected_confidence: means over tokens of `log pi(y_t) - log sum_v pi(v)**2`; no gradient through them.

    Source: Zhou et al. 2024, "WPO: enhancing RLHF with weighted preference optimization", arXiv:2406.11827, eq. 2 and its
        sampled alignment.
    """
    losses = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    return (chosen_confidence + rejected_confidence).detach().clamp(max=0.0).exp() * losses


def tdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    beta: float,
    tdpo_alpha: float,
) -> Tensor:
    """`-logsigmoid(beta * (h - tdpo_alpha * (rejected_kl - chosen_kl)))`, no gradient through `chosen_kl`: TDPO2.

    Args:
        chosen_kl, rejected_kl: `sum_t KL(reference || policy)` over the vocabulary, at the scored tokens, nats.

    Source: Zeng et al. 2024, "Token-level direct preference optimization", arXiv:2404.11999, eq. 18.
    """
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return -logsigmoid(beta * (h - tdpo_alpha * (rejected_kl - chosen_kl.detach())))


def smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    """The cross-entropy of sigmoid(z) with a label that holds with probability 1 - label_smoothing."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
