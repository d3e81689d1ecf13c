"""What do policy and reference say of the pairs of a forest? Sums per completion, for a loss to compare."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_engine.batch import PreferenceForest, sum_by_completion
from dpo_engine.errors import ConfigError
from dpo_engine.losses import Method, PairStats
from dpo_engine.model.adapters import is_peft_model, reference_of
from dpo_engine.model.scoring import bind_scoring, forest_token_logps


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The model without adapters around it."""
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator,return-value]


def make_reference(model: nn.Module, ref_model: nn.Module | None) -> nn.Module | None:
    """The frozen second model, or None where switching the adapters off gives the reference.

    Raises:
        ConfigError: `ref_model` is the model that trains.
    """
    if ref_model is None:
        if is_peft_model(model):
            return None
        ref_model = copy.deepcopy(model)
    elif ref_model is model:
        raise ConfigError("DPOTrainer: ref_model is the model being trained; pass None for a frozen copy of it")
    else:
        bind_scoring(causal_model(ref_model))
    return ref_model.requires_grad_(False).eval()


def weighted_sum(losses: Tensor, stats: PairStats) -> Tensor:
    """() the sum of `weights * losses`."""
    return (losses if stats.weights is None else stats.weights * losses).sum()


class PairScorer:
    """Scores forests of pairs, of which completions alternate chosen, rejected.

    Args:
        method: whether it needs a reference.
        reference: a second model, or None where the reference lies under the policy's adapters.
    """

    def __init__(self, method: Method, reference: nn.Module | None, accelerator: Accelerator) -> None:
        self.method = method
        self.reference = reference
        self.accelerator = accelerator

    def token_logps(self, model: nn.Module, forest: PreferenceForest) -> Tensor:
        """(N,) log-probs of the forest's scored tokens under `model`."""
        with self.accelerator.autocast():
            return forest_token_logps(model, forest).float()

    def reference_token_logps(self, model: nn.Module, forest: PreferenceForest) -> Tensor:
        """The same under the reference of the policy `model`: eval mode, no gradient, adapters off."""
        if self.reference is not None:
            with torch.no_grad():
                return self.token_logps(self.reference, forest)
        with reference_of(self.accelerator.unwrap_model(model)):
            return self.token_logps(model, forest)

    def pair_stats(self, model: nn.Module, forest: PreferenceForest) -> PairStats:
        """Sums per completion of both models, with the gradient of the policy's."""
        reference: tuple[Tensor | None, Tensor | None] = None, None
        if self.method.needs_reference:
            known = forest.reference_token_logps
            reference = _sums(self.reference_token_logps(model, forest) if known is None else known, forest)
        chosen, rejected = _sums(self.token_logps(model, forest), forest)
        lengths = torch.tensor(forest.lengths, dtype=torch.float32).to(chosen.device, non_blocking=True)
        chosen_lengths, rejected_lengths = _by_pair(lengths, forest)
        weights = forest.completion_weights
        return PairStats(
            chosen_logps=chosen,
            rejected_logps=rejected,
            reference_chosen_logps=reference[0],
            reference_rejected_logps=reference[1],
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=torch.ones_like(chosen) if weights is None else torch.stack(_by_pair(weights, forest)).mean(0),
        )

    def policy_again(self, model: nn.Module, forest: PreferenceForest, like: PairStats) -> PairStats:
        """`like` with the policy's sums computed anew, with gradient."""
        chosen, rejected = _sums(self.token_logps(model, forest), forest)
        return replace(like, chosen_logps=chosen, rejected_logps=rejected)


def _sums(token_logps: Tensor, forest: PreferenceForest) -> tuple[Tensor, Tensor]:
    """`(chosen, rejected)`, each (trees,), sums over scored tokens."""
    return _by_pair(sum_by_completion(token_logps, forest.lengths, forest.token_weights), forest)


def _by_pair(by_completion: Tensor, forest: PreferenceForest) -> tuple[Tensor, Tensor]:
    """(2T,) in the order chosen, rejected, chosen, ... -> two of (T,); of an idle forest, two of (0,)."""
    chosen, rejected = by_completion.view(-1, 2)[: forest.trees].unbind(-1)
    return chosen, rejected
