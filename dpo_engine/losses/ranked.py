"""Which loss reads the whole ranking of a prompt's completions? Plackett-Luce, of which DPO is the case of two."""

from __future__ import annotations

import torch
from torch import Tensor


def plackett_luce_loss(
    policy_logps: Tensor, reference_logps: Tensor, list_ids: Tensor, ranks: Tensor, lists: int, beta: float
) -> Tensor:
    """`-sum_i (s_i - logsumexp(s_j for j ranked no better than i))`, s = beta * (policy - reference).

    The last of a ranking adds nothing. Completions that tie are each compared with all of their rank and below (Breslow's
    form for ties), but a tie for the last place adds nothing either: it says nothing that the ones above do not.

    Args:
        policy_logps, reference_logps: (C,) sums of scored tokens' log-probs, in nats.
        list_ids: (C,) int64 ascending, whose list a completion is in.
        ranks: (C,) int64 ascending within a list, 0 for its best.
        lists: T.

    Returns:
        (T,); log K! where policy and reference agree on K completions without ties; of two, DPO's loss.

    Source: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; ties as in Breslow 1974 for the same partial likelihood.
    """
    scores = beta * (policy_logps - reference_logps)
    same_list = list_ids[:, None] == list_ids[None, :]
    no_better = same_list & (ranks[None, :] >= ranks[:, None])  # (C, C): j stands against i
    against = torch.where(no_better, scores[None, :], -torch.inf).logsumexp(-1)
    has_worse = (same_list & (ranks[None, :] > ranks[:, None])).any(-1)
    terms = torch.where(has_worse, against - scores, 0.0)
    return terms.new_zeros(lists).index_add(0, list_ids, terms)
