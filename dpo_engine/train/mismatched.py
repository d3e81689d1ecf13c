"""What does KTO compare rewards with? How far the policy is from its reference on completions of other prompts.

    z0 = max(0, mean of policy_logps - reference_logps)      over the mismatched completions of the step, on all ranks

Such a completion is the last one of its tree (`dpo_engine.data.mismatched`). It is scored without gradient, in forests of its own,
before the completions that train; these then depend on each other through z0 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo_engine.batch import TokenTree, with_completions
from dpo_engine.losses import kto_baseline


def split_mismatched(trees: Sequence[TokenTree]) -> tuple[list[TokenTree], list[TokenTree]]:
    """`(own, others)`: the trees without the completions that are not theirs, and with these alone."""
    # Labels are those of a tree's own completions.
    own: list[TokenTree] = [
        replace(with_completions(tree, slice(None, -1)), desirable=getattr(tree, "desirable", None))
        if _has_one(tree)
        else tree
        for tree in trees
    ]
    others: list[TokenTree] = [
        replace(with_completions(tree, slice(-1, None)), desirable=None) for tree in trees if _has_one(tree)
    ]
    return own, others


def _has_one(tree: TokenTree) -> bool:
    return bool(getattr(tree, "mismatched", False))


def baseline_over_ranks(log_ratios: Sequence[Tensor], accelerator: Accelerator) -> Tensor:
    """() `z0`: averaged over everything, then clamped.

    Args:
        log_ratios: (C,) each, of this rank's forests.
    """
    mine = torch.cat([ratios.detach().double() for ratios in log_ratios])
    total = torch.stack([mine.sum(), mine.new_tensor(float(len(mine)))])
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    return kto_baseline((total[0] / total[1].clamp(min=1)).float())
