"""What does a method say of forests that were scored? Losses, what to differentiate, and what its losses compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpo_engine.batch import PreferenceForest
from dpo_engine.losses import Method
from dpo_engine.train.metrics import MetricSums, Sums, stats_metrics
from dpo_engine.train.mismatched import baseline_over_ranks
from dpo_engine.train.ranks import joined_over_ranks
from dpo_engine.train.scoring import Scorer
from dpo_engine.train.state import RunningMean
from dpo_engine.train.statistics import weighted_sum
from dpo_engine.train.whole_step import (
    Judged,
    StepPart,
    generator_states,
    joined,
    stacked,
    step_parts,
    unstacked,
)


class Judge:
    """Calls a method on the statistics of a run.

    Args:
        method, config: the method and its parameters.
        scorer: of the same method.
    """

    def __init__(self, method: Method, config: Any, scorer: Scorer, accelerator: Accelerator) -> None:
        self.method, self.config, self.scorer, self.accelerator = method, config, scorer, accelerator
        self.running = RunningMean()
        """Of a method that has a `baseline`: state of the run."""

    def __call__(self, stats: Any, scale: float, baseline: Tensor | None = None) -> Judged:
        """Losses, and as the objective their weighted sum times `scale`; moves the method's running mean on."""
        if self.method.baseline is not None:
            self.running.add(self.method.baseline(stats, self.method.settings(self.config)))
            baseline = self.running.mean()
        if baseline is not None:
            stats = replace(stats, baseline=baseline)
        losses = self.method(stats, self.config)
        return Judged(losses, self.method.part_losses(stats, self.config), weighted_sum(losses, stats) * scale, stats)

    def whole_step(self, model: nn.Module, forests: Sequence[PreferenceForest], scale: float) -> list[StepPart]:
        """What each forest must know of the others, on all ranks, for a loss that couples them."""
        scored, generators, known = [], [], []
        with torch.no_grad():
            for forest in forests:
                known.append(self.scorer.with_reference(model, forest))  # before what the second pass draws anew
                generators.append(generator_states(self.accelerator.device))
                scored.append(self.scorer.stats(model, known[-1]))
        return step_parts(known, scored, generators, lambda stats: self(stats, scale), self.accelerator)

    def baseline(self, model: nn.Module, mismatched: Sequence[PreferenceForest]) -> Tensor:
        """() what rewards are compared with, found on completions behind prompts of other rows, of all ranks."""
        with torch.no_grad():
            ratios = [self.scorer.log_ratios(model, forest) for forest in mismatched]
        return baseline_over_ranks(ratios, self.accelerator)

    def held_out(self, scored: Sequence[Any], baseline: Tensor | None) -> MetricSums:
        """Metrics of this rank's rows; where losses couple them, of all ranks' rows on the first: a data set is one step."""
        metrics = MetricSums()
        if not self.method.whole_step:
            for stats in scored:
                metrics.add(self._metrics(stats if baseline is None else replace(stats, baseline=baseline)))
            return metrics
        together = joined(scored)
        values, _ = joined_over_ranks(self.accelerator, stacked(together))
        sums = self._metrics(replace(unstacked(values, together), baseline=self.running.mean()))
        is_first = self.accelerator.is_main_process
        metrics.add(sums if is_first else {name: torch.zeros_like(value) for name, value in sums.items()})
        return metrics

    def _metrics(self, stats: Any) -> Sums:
        losses, by_part = self.method(stats, self.config), self.method.part_losses(stats, self.config)
        return stats_metrics(self.method, stats, losses, self.config, by_part)
