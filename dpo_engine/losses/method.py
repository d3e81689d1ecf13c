"""What is a method? A loss, and as data what it must be fed: a trainer loads that and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_engine.losses.parameters import Parameter
from dpo_engine.losses.stats import ListStats, PairStats, UnpairedStats

Stats = PairStats | UnpairedStats | ListStats
Settings = Mapping[str, Any]
"""A method's own parameters by name, each with a value."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A loss and what the trainer must know to feed it. `method(stats, config)` is one loss for each pair (completion, list)."""

    name: str
    loss: Callable[[Any, Settings], Tensor]
    """`loss(stats, settings) -> (B,)`."""
    parameters: tuple[Parameter, ...] = ()
    """Its own, with its own defaults; a value for any other is refused."""
    needs: type = PairStats
    """`PairStats`, `UnpairedStats` or `ListStats`: what `stats` is."""
    needs_reference: bool = True
    public_part: bool = False
    """It reads sums over the first tokens of a pair's completions, as many as the shorter has."""
    token_kl: bool = False
    """It reads KL(reference || policy) at every scored token: both models' hidden states are met in one operator call, so no
    reference log-prob can be known beforehand."""
    extras: tuple[str, ...] = ()
    """Extra outputs of the operator that it reads, without gradient."""
    moving_reference: bool = False
    """The reference follows the policy, so none of its log-probs can be known beforehand."""
    mismatched: bool = False
    """Its baseline is found on completions behind prompts of other rows, of the whole step and all ranks."""
    whole_step: bool = False
    """Its examples depend on each other: it is given all pairs of an optimiser step, over all forests and ranks, at once."""
    baseline: Callable[[Any, Settings], Tensor] | None = None
    """`baseline(stats, settings) -> (B,)`, what `stats.baseline` is the running mean of, over all pairs since the run began; it is
    state of a run, kept in checkpoints."""
    sums: Callable[[Any, Settings], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    """`sums(stats, settings)`: the four sums that it compares, where they are not plain ones; metrics are of these."""
    reward_per_token: bool = False
    """Rewards, in metrics, are `beta` times means over tokens instead of sums."""
    parts: tuple[tuple[float, Method], ...] = ()
    """Of a mixture: weights and methods; none of a plain method."""

    def __call__(self, stats: Any, config: Any) -> Tensor:
        """(B,) losses.

        Args:
            stats: a `needs`.
            config: anything that has the parameters as attributes, or a dict; what is missing or None takes the method's
                default.

        Raises:
            ValueError: `stats` lacks what the method needs.
        """
        return self.loss(stats, self.settings(config))

    def part_losses(self, stats: Any, config: Any) -> dict[str, Tensor]:
        """Of a mixture, each method's own losses (B,) by its name, without weight or gradient; of a plain method, none."""
        settings = self.settings(config)
        with torch.no_grad():
            return {part.name: part.loss(stats, settings[part.name]) for _, part in self.parts}

    def settings(self, config: Any) -> dict[str, Any]:
        """The values of its parameters: those of `config` where it has them, else its own defaults."""
        read = config.get if isinstance(config, Mapping) else partial(getattr, config)
        given = {parameter.name: read(parameter.name, None) for parameter in self.parameters}
        return {p.name: p.default if given[p.name] is None else given[p.name] for p in self.parameters}

    @property
    def kind(self) -> str:
        """The data it trains on, as `dpo_engine.data` calls it: "pairs", "unpaired" or "ranked"."""
        return {PairStats: "pairs", UnpairedStats: "unpaired", ListStats: "ranked"}[self.needs]

    @property
    def uses(self) -> frozenset[str]:
        """Names of its parameters."""
        return frozenset(parameter.name for parameter in self.parameters)

    @property
    def known_beforehand(self) -> bool:
        """Whether it needs reference log-probs that can be computed once and kept."""
        return self.needs_reference and not self.moving_reference and not self.token_kl

    def check(self, config: Any) -> None:
        """Raise a `ConfigError` for the first of its parameters that is out of range."""
        for parameter in self.parameters:
            parameter.check(self.settings(config)[parameter.name])


def needed(stats: Any, *names: str) -> tuple[Tensor, ...]:
    """Fields of the statistics, which must be there.

    Raises:
        ValueError: one is None.
    """
    values: tuple[Any, ...] = tuple(getattr(stats, name, None) for name in names)
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise ValueError(
            f"{type(stats).__name__} came without {', '.join(missing)}, which the loss reads; expected (B,) each"
        )
    return values


def four_sums(stats: PairStats) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen and rejected under the policy, then under the reference."""
    found = needed(stats, "chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
    return found[0], found[1], found[2], found[3]


def four_means(stats: PairStats) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same over the numbers of scored tokens."""
    sums, chosen, rejected = four_sums(stats), stats.chosen_lengths, stats.rejected_lengths
    return sums[0] / chosen, sums[1] / rejected, sums[2] / chosen, sums[3] / rejected


def on_sums(function: Callable[..., Tensor]) -> Callable[[PairStats, Settings], Tensor]:
    """A loss of the four sums and the method's parameters, by their names."""
    return lambda stats, settings: function(*four_sums(stats), **settings)


def on_means(function: Callable[..., Tensor]) -> Callable[[PairStats, Settings], Tensor]:
    """The same of the four means."""
    return lambda stats, settings: function(*four_means(stats), **settings)


def on_fields(function: Callable[..., Tensor], *names: str) -> Callable[[Any, Settings], Tensor]:
    """A loss of these fields, in this order, and the method's parameters."""
    return lambda stats, settings: function(*needed(stats, *names), **settings)
