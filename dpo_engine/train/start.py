"""Does a run start where it must? Where the policy is the reference still, everything known of either must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.batch import PreferenceForest
from dpo_engine.errors import TrainingError
from dpo_engine.losses import PairStats, UnpairedStats
from dpo_engine.reference.guard import unit_of
from dpo_engine.train.scoring import Scorer
from dpo_engine.train.whole_step import joined


def check_start(scorer: Scorer, model: nn.Module, forests: Sequence[PreferenceForest], dtype: torch.dtype) -> None:
    """Score the first batch with policy and reference: each loss must be that of two models that agree, and what is known of the
    reference must be what the policy says.

    Args:
        model: the policy, in eval mode, which is the reference still.
        forests: the first batch.
        dtype: what the reference computes in.

    Raises:
        TrainingError: policy and reference differ, or known log-probs are not what the policy says.
    """
    tolerance = 1e-3 if scorer.accelerator.mixed_precision != "no" else 1e-4
    # Asked anew also where it was computed before: in the same forest both are the same to the last bits.
    unknown = [replace(forest, reference_token_logps=None, reference_logps=None) for forest in forests]
    values = [scorer.values(model, forest) for forest in unknown]
    anew = [scorer.stats_of(found, forest) for found, forest in zip(values, unknown, strict=True)]
    for forest, found in zip(forests, values, strict=True):
        if (known := scorer.known_reference(forest)) is not None:
            _check_known(forest, known, found.logps, unit_of(dtype))
    # Losses that couple pairs see them all.
    for stats in [joined(anew)] if isinstance(anew[0], PairStats) else anew:
        if isinstance(stats, UnpairedStats):
            stats = replace(stats, baseline=stats.logps.new_zeros(()))
        losses, expected = (scorer.method(each, scorer.config) for each in (stats, in_agreement(stats)))
        if not len(losses):
            continue
        off = (losses - expected).abs() / expected.abs().clamp(min=1)
        worst = int(off.nan_to_num(nan=torch.inf).argmax())
        if not off[worst].item() <= tolerance:
            raise TrainingError(
                f"before the first step the policy is the reference, so a {scorer.config.method} loss of the first batch must be "
                f"{expected[worst].item():.6f} (within {tolerance:g}), but it is {losses[worst].item():.6f}: policy and reference "
                "are not computed alike (weights changed in memory, or a layer that is random in eval mode?)"
            )


def in_agreement(stats: Any) -> Any:
    """The statistics, if the reference said what the policy says."""
    if not isinstance(stats, PairStats):
        return replace(stats, reference_logps=stats.logps)
    public: dict[str, Any] = {}
    if stats.chosen_public_logps is not None:
        public = {
            "reference_chosen_public_logps": stats.chosen_public_logps,
            "reference_rejected_public_logps": stats.rejected_public_logps,
        }
    kl = (
        {}
        if stats.chosen_kl is None
        else dict.fromkeys(("chosen_kl", "rejected_kl"), torch.zeros_like(stats.chosen_kl))
    )
    return replace(
        stats,
        reference_chosen_logps=stats.chosen_logps,
        reference_rejected_logps=stats.rejected_logps,
        **public,
        **kl,
    )


def _check_known(forest: PreferenceForest, known: Tensor, now: Tensor, unit: float) -> None:
    """Refuse reference log-probs, of a data set or a cache, that are not those of the policy.

    Args:
        known, now: (C,) sums of each completion.
        unit: what a log-prob of size 1 may differ by.
    """
    if not forest.trees:
        return
    lengths = torch.tensor(forest.lengths, dtype=torch.float32).to(now.device)
    off = (known - now).abs() - 8 * unit * (now.abs() + lengths)
    if bool((off <= 0).all()):
        return
    worst = int(off.nan_to_num(nan=torch.inf).argmax())
    place = forest.tree_ids.tolist().index(int(forest.tree_ids[worst]))
    which = ("chosen", "rejected")[worst - place] if forest.sizes[0] == 2 else f"completion {worst - place + 1}"
    raise TrainingError(
        f"before the first step the policy is the reference, but a row of the first batch has known reference "
        f"log-probs that sum to {known[worst].item():.4f} ({which}), and {now[worst].item():.4f} now; "
        "`dpo-engine cache verify --all` names the rows: compute them anew, or set reference_cache: off"
    )
