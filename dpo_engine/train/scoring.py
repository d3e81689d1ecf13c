"""What do policy and reference say of the pairs of a forest? Sums per completion, for a loss to compare."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_engine.batch import PreferenceForest, sum_by_completion
from dpo_engine.losses import Method, PairStats
from dpo_engine.model.adapter_inputs import adapter_inputs_as_they_are
from dpo_engine.model.adapters import is_peft_model, reference_of
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from dpo_engine.train.offload import checkpoints_offloaded, offloader_for
from dpo_engine.train.second_model import check_second_model


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The model without adapters around it."""
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator,return-value]


def make_reference(model: nn.Module, ref_model: nn.Module | None) -> nn.Module | None:
    """The frozen second model, or None where switching the adapters off gives the reference.

    Raises:
        ConfigError: `ref_model` would change with the model that trains.
    """
    if ref_model is None:
        if is_peft_model(model):
            return None
        ref_model = copy.deepcopy(model)
    else:
        check_second_model(model, ref_model)
        bind_scoring(causal_model(ref_model))
    return ref_model.requires_grad_(False).eval()


def weighted_sum(losses: Tensor, stats: PairStats) -> Tensor:
    """() the sum of `weights * losses`."""
    return (losses if stats.weights is None else stats.weights * losses).sum()


class PairScorer:
    """Scores forests of pairs, of which completions alternate chosen, rejected.

    Args:
        method: whether it needs a reference, and what tokens count.
        config: the method's parameters.
        reference: a second model, or None where the reference lies under the policy's adapters.
    """

    def __init__(self, method: Method, config: Any, reference: nn.Module | None, accelerator: Accelerator) -> None:
        self.method = method
        self.config = config
        self.reference = reference
        self.accelerator = accelerator
        self.offloader = offloader_for(config.activation_offload, accelerator.device)

    @contextmanager
    def as_trained(self, model: nn.Module) -> Iterator[None]:
        """Around a forest's forward and backward pass together: what spares memory and changes no number."""
        with self.accelerator.autocast():
            autocast = torch.is_autocast_enabled(self.accelerator.device.type)
        with adapter_inputs_as_they_are(model, autocast), checkpoints_offloaded(model, self.offloader):
            yield

    def token_logps(self, model: nn.Module, forest: PreferenceForest) -> Tensor:
        """(N,) log-probs of the forest's scored tokens under `model`."""
        with self.accelerator.autocast():
            return forest_token_logps(model, forest).float()

    def reference_token_logps(self, model: nn.Module, forest: PreferenceForest) -> Tensor:
        """The same under the reference of the policy `model`: eval mode, no gradient, adapters off."""
        if self.reference is not None:
            if any(module.training for module in self.reference.modules()):  # its owner may have called train() since
                self.reference.eval()
            with torch.no_grad():
                return self.token_logps(self.reference, forest)
        with reference_of(self.accelerator.unwrap_model(model)):
            return self.token_logps(model, forest)

    def pair_stats(self, model: nn.Module, forest: PreferenceForest) -> PairStats:
        """Sums per completion of both models, with the gradient of the policy's."""
        reference: tuple[Tensor | None, Tensor | None] = None, None
        if self.method.needs_reference:
            known = self.known_reference(forest)
            reference = known or self._sums(self.reference_token_logps(model, forest), forest)
        chosen, rejected = self._sums(self.token_logps(model, forest), forest)
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

    def known_reference(self, forest: PreferenceForest) -> tuple[Tensor, Tensor] | None:
        """`(chosen, rejected)`, each (trees,): the reference's sums that a forest brings; None if it brings none."""
        if forest.reference_logps is not None:
            return _by_pair(forest.reference_logps, forest)
        if forest.reference_token_logps is not None:
            return self._sums(forest.reference_token_logps, forest)
        return None

    def policy_again(self, model: nn.Module, forest: PreferenceForest, like: PairStats) -> PairStats:
        """`like` with the policy's sums computed anew, with gradient."""
        chosen, rejected = self._sums(self.token_logps(model, forest), forest)
        return replace(like, chosen_logps=chosen, rejected_logps=rejected)

    def _sums(self, token_logps: Tensor, forest: PreferenceForest) -> tuple[Tensor, Tensor]:
        """`(chosen, rejected)`, each (trees,), sums over scored tokens, weighted as the data and the method say."""
        weights = forest.token_weights
        if self.method.token_weights is not None:
            places, public_lengths = _places(forest)
            by_method = self.method.token_weights(places, public_lengths, self.config).to(token_logps.device)
            weights = by_method if weights is None else weights * by_method
        return _by_pair(sum_by_completion(token_logps, forest.lengths, weights), forest)


def _places(forest: PreferenceForest) -> tuple[Tensor, Tensor]:
    """(N,) each scored token's place in its completion, and (N,) the scored tokens of its pair's shorter completion."""
    pairs = zip(forest.lengths[::2], forest.lengths[1::2], strict=True)
    lengths = torch.tensor(forest.lengths)
    shorter = torch.tensor([min(pair) for pair in pairs]).repeat_interleave(2)
    places = torch.cat([torch.arange(length) for length in forest.lengths])
    return places, torch.repeat_interleave(shorter, lengths)


def _by_pair(by_completion: Tensor, forest: PreferenceForest) -> tuple[Tensor, Tensor]:
    """(2T,) in the order chosen, rejected, chosen, ... -> two of (T,); of an idle forest, two of (0,)."""
    chosen, rejected = by_completion.view(-1, 2)[: forest.trees].unbind(-1)
    return chosen, rejected
