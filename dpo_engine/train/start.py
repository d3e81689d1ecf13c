"""Does a run start where it must? Where the policy is the reference still, everything known of either must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dpo_engine.batch import PreferenceForest
from dpo_engine.errors import TrainingError
from dpo_engine.losses import PairStats
from dpo_engine.reference.guard import unit_of
from dpo_engine.train.scoring import PairScorer
from dpo_engine.train.whole_step import joined


def check_start(scorer: PairScorer, model: nn.Module, forests: Sequence[PreferenceForest], dtype: torch.dtype) -> None:
    """Score the first batch with policy and reference, and compare with the method's start value and with what is known.

    Args:
        model: the policy, in eval mode, which is the reference still.
        forests: the first batch.
        dtype: what the reference computes in.

    Raises:
        TrainingError: a loss is not the method's start value, or known log-probs are not what the policy says.
    """
    expected = scorer.method.start(scorer.config)
    tolerance = 1e-3 if scorer.accelerator.mixed_precision != "no" else 1e-4
    # Asked anew also where it was computed before: in the same forest both are the same to the last bits.
    unknown = [replace(forest, reference_token_logps=None, reference_logps=None) for forest in forests]
    anew = [scorer.pair_stats(model, forest) for forest in unknown]
    losses = scorer.method(joined(anew), scorer.config)
    if not len(losses):  # this rank has idle forests only
        return
    for forest, stats in zip(forests, anew, strict=True):
        _check_known(scorer, forest, stats, unit_of(dtype))
    worst = losses[(losses - expected).abs().argmax()].item()
    if not abs(worst - expected) <= tolerance:
        raise TrainingError(
            f"before the first step the policy is the reference, so every {scorer.config.method} loss must be "
            f"{expected:.6f} (within {tolerance:g}), but a pair of the first batch has {worst:.6f}: policy and "
            "reference are not computed alike (weights changed in memory, or a layer that is random in eval mode?)"
        )


def _check_known(scorer: PairScorer, forest: PreferenceForest, anew: PairStats, unit: float) -> None:
    """Refuse reference log-probs, of a data set or a cache, that are not those of the policy.

    Args:
        anew: what the policy says of the forest's pairs.
        unit: what a log-prob of size 1 may differ by.
    """
    known = scorer.known_reference(forest)
    if known is None:
        return
    for name, used, now, lengths in (
        ("chosen", known[0], anew.chosen_logps, anew.chosen_lengths),
        ("rejected", known[1], anew.rejected_logps, anew.rejected_lengths),
    ):
        off = (used - now).abs() - 8 * unit * (now.abs() + lengths)
        if len(off) and not bool((off <= 0).all()):
            worst = int(off.nan_to_num(nan=torch.inf).argmax())
            raise TrainingError(
                f"before the first step the policy is the reference, but a pair of the first batch has known reference "
                f"log-probs that sum to {used[worst].item():.4f} ({name}), and {now[worst].item():.4f} now; "
                "`dpo-engine cache verify --all` names the rows: compute them anew, or set reference_cache: off"
            )
