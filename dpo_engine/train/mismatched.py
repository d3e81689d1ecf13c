"""What does KTO compare rewards with? How far the policy is from its reference on completions of other prompts.

    z0 = max(0, mean of policy_logps - reference_logps)      over the mismatched completions of the step, on all ranks

Such a completion is the last one of its tree (`dpo_engine.data.mismatched`). It is scored without gradient, in forests of its own,
before the completions that train; these then depend on each other through z0 alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo_engine.batch import TokenTree, Tree, with_completions
from dpo_engine.data import TokenizedTree
from dpo_engine.data.mismatched import with_mismatched
from dpo_engine.losses import kto_baseline

logger = logging.getLogger(__name__)


def trees_with_mismatched(trees: Sequence[TokenTree], max_length: int | None) -> list[TokenTree]:
    """`with_mismatched` of any trees: the completion that is added is scored as it is where it came from, and counts 1.

    Reference log-probs that trees bring are dropped, since they lack those of the new completion; a warning says of how many.

    Raises:
        DataError: as `with_mismatched`.
    """
    plain = [
        TokenizedTree(
            prompt_ids=list(tree.prompt_ids),
            completions=tuple(map(list, tree.completions)),
            origin=getattr(tree, "origin", None) or f"row {index + 1}",
            scored=_masks(tree),
        )
        for index, tree in enumerate(trees)
    ]
    dropped = sum(any(getattr(tree, name, None) is not None for name in _REFERENCE) for tree in trees)
    if dropped:
        logger.warning(
            "%d rows bring log-probs of the reference, but not of another prompt's completion behind theirs, which the baseline "
            "needs; theirs are not used, and all are computed",
            dropped,
        )
    found: list[TokenTree] = []
    for tree, more in zip(trees, with_mismatched(plain, max_length), strict=True):
        token_weights, weights = getattr(tree, "token_weights", None), getattr(tree, "completion_weights", None)
        found.append(
            Tree(
                prompt_ids=tree.prompt_ids,
                completions=more.completions,
                scored=more.scored,
                token_weights=None if token_weights is None else [*token_weights, [1.0] * len(more.completions[-1])],
                completion_weights=None if weights is None else [*weights, 1.0],
                desirable=getattr(tree, "desirable", None),
                mismatched=True,
                origin=more.origin,
            )
        )
    return found


_REFERENCE = ("reference_token_logps", "reference_logps")


def _masks(tree: TokenTree) -> tuple[list[bool], ...] | None:
    scored = getattr(tree, "scored", None)
    return None if scored is None else tuple([bool(counts) for counts in mask] for mask in scored)


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
    total = torch.stack([mine.sum(), mine.new_full((), float(len(mine)))])
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    return kto_baseline((total[0] / total[1].clamp(min=1)).float())
