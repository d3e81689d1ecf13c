"""What do policy and reference say of a forest? Numbers per completion, for a loss to compare."""

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
from dpo_engine.losses import Method
from dpo_engine.model.adapter_inputs import adapter_inputs_as_they_are
from dpo_engine.model.adapters import is_peft_model, reference_of
from dpo_engine.model.head import head_of
from dpo_engine.model.scoring import bind_scoring, forest_token_logps, score_forest
from dpo_engine.train.offload import checkpoints_offloaded, offloader_for
from dpo_engine.train.second_model import check_second_model
from dpo_engine.train.statistics import CompletionValues, forest_stats


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


class Scorer:
    """Scores forests for a method.

    Args:
        method: what it needs of policy and reference.
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
        with self._as_reference(model) as reference:
            return self.token_logps(reference, forest)

    @contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model to ask for the reference's numbers, within it."""
        if self.reference is None:
            with reference_of(self.accelerator.unwrap_model(model)):
                yield model
            return
        if any(module.training for module in self.reference.modules()):  # its owner may have called train() since
            self.reference.eval()
        with torch.no_grad():
            yield self.reference

    def stats(self, model: nn.Module, forest: PreferenceForest) -> Any:
        """What the method's loss is given of the forest, with the gradient of the policy's."""
        return self.stats_of(self.values(model, forest), forest)

    def values(self, model: nn.Module, forest: PreferenceForest) -> CompletionValues:
        """What policy and reference say of each completion."""
        return self._with_kl(model, forest) if self.method.token_kl else self._values(model, forest)

    def stats_of(self, values: CompletionValues, forest: PreferenceForest) -> Any:
        """What the method's loss is given, of values found before."""
        return forest_stats(self.method, values, forest, self.config.ranked_pairs)

    def with_reference(self, model: nn.Module, forest: PreferenceForest) -> PreferenceForest:
        """The forest with the reference log-probs that it lacks, so that it can be scored again without asking the reference."""
        if not self._is_asked(forest):
            return forest
        return replace(forest, reference_token_logps=self.reference_token_logps(model, forest))

    def known_reference(self, forest: PreferenceForest) -> Tensor | None:
        """(C,) the reference's sums that a forest brings; None if it brings none."""
        if forest.reference_logps is not None:
            return forest.reference_logps
        if forest.reference_token_logps is not None:
            return _sums(forest.reference_token_logps, forest)
        return None

    def log_ratios(self, model: nn.Module, forest: PreferenceForest) -> Tensor:
        """(C,) `policy - reference` of the sums of each completion; none of an idle forest's."""
        values = self._values(model, forest)
        assert values.reference_logps is not None
        return (values.logps - values.reference_logps)[: sum(forest.sizes[: forest.trees])]

    def _is_asked(self, forest: PreferenceForest) -> bool:
        """Whether the reference's log-probs have to be computed."""
        is_known = forest.reference_token_logps is not None or forest.reference_logps is not None
        return self.method.needs_reference and not self.method.token_kl and not is_known

    def _values(self, model: nn.Module, forest: PreferenceForest) -> CompletionValues:
        reference = self.with_reference(model, forest).reference_token_logps if self.method.needs_reference else None
        sums = forest.reference_logps if self.method.needs_reference else None
        squares = None
        if self.method.extras:
            with self.accelerator.autocast():
                scored = score_forest(model, forest, extras=self.method.extras)
            assert scored.token_logps is not None
            policy, squares = scored.token_logps.float(), scored.log_sum_squares
        else:
            policy = self.token_logps(model, forest)
        return _completion_values(policy, reference, forest, sums=sums, squares=squares)

    def _with_kl(self, model: nn.Module, forest: PreferenceForest) -> CompletionValues:
        """Both models' hidden states, met in one call of the operator."""
        with self._as_reference(model) as asked, self.accelerator.autocast():
            rows = score_forest(asked, forest, rows_only=True).rows
            head = head_of(causal_model(self.accelerator.unwrap_model(asked)))
        with self.accelerator.autocast():
            scored = score_forest(
                model,
                forest,
                reference_rows=rows,
                reference_weight=head.weight.detach(),
                reference_bias=head.bias,
                extras=self.method.extras,
            )
        assert scored.token_logps is not None and scored.reference_token_logps is not None
        return _completion_values(
            scored.token_logps,
            scored.reference_token_logps.detach(),
            forest,
            squares=scored.log_sum_squares,
            token_kl=scored.token_kl,
        )


def _completion_values(
    policy: Tensor,
    reference: Tensor | None,
    forest: PreferenceForest,
    *,
    sums: Tensor | None = None,
    squares: Tensor | None = None,
    token_kl: Tensor | None = None,
) -> CompletionValues:
    """Sums per completion of what was found of tokens, (N,) each; `sums` (C,) in the place of `reference`."""
    confidence = k3 = None
    with torch.no_grad():
        if squares is not None:
            counts = torch.tensor(forest.lengths, dtype=torch.float32).to(policy.device, non_blocking=True)
            confidence = sum_by_completion(policy - squares, forest.lengths) / counts
        if reference is not None:
            distance = policy.detach() - reference
            k3 = sum_by_completion(torch.expm1(distance) - distance, forest.lengths)
    weights = forest.token_weights
    token_logps = policy if weights is None else weights * policy
    weighted = reference if reference is None or weights is None else weights * reference
    return CompletionValues(
        logps=sum_by_completion(token_logps, forest.lengths),
        reference_logps=sums if weighted is None else sum_by_completion(weighted, forest.lengths),
        token_logps=token_logps,
        reference_token_logps=weighted,
        confidence=confidence,
        kl=None if token_kl is None else sum_by_completion(token_kl, forest.lengths, weights),
        k3=k3,
    )


def _sums(token_logps: Tensor, forest: PreferenceForest) -> Tensor:
    """(C,) sums over scored tokens, weighted as the data says."""
    return sum_by_completion(token_logps, forest.lengths, forest.token_weights)
