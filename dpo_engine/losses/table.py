"""Which method does a name stand for? One table; adding a method is one function and one entry."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo_engine.errors import ConfigError
from dpo_engine.losses.pairwise import bco_loss, bco_rewards, dpo_loss, ipo_loss, ld_token_weights
from dpo_engine.losses.stats import PairStats


@dataclass(frozen=True, kw_only=True)
class Method:
    """A loss and what the trainer must know to feed it. Calling it gives one loss per pair."""

    loss: Callable[[PairStats, Any], Tensor]
    """`loss(stats, config) -> (B,)`; reads its own parameters (`config.beta`, ...)."""
    start: Callable[[Any], float]
    """`start(config)`: its value where the policy is the reference."""
    needs: type = PairStats
    needs_reference: bool = True
    beta: float = 0.1
    """What `beta` is where it is not given."""
    uses: frozenset[str] = frozenset()
    """Its own parameters beside `beta`; giving another is refused."""
    whole_step: bool = False
    """Its examples depend on each other: it is given all pairs of an optimiser step, over all forests and ranks, at once."""
    baseline: Callable[[PairStats, Any], Tensor] | None = None
    """`baseline(stats, config) -> (B,)`, what `stats.baseline` is the running mean of, over all pairs since the run began."""

    token_weights: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    """`token_weights(places, public_lengths, config) -> (N,)`, what each scored token counts in the sums of both models: from its
    place among those of its completion, and the scored tokens of the shorter completion of its pair. None: 1."""

    def __call__(self, stats: PairStats, config: Any) -> Tensor:
        return self.loss(stats, config)


def _sums(stats: PairStats) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four sums that a method with a reference compares."""
    assert stats.reference_chosen_logps is not None and stats.reference_rejected_logps is not None
    return stats.chosen_logps, stats.rejected_logps, stats.reference_chosen_logps, stats.reference_rejected_logps


def _dpo(stats: PairStats, config: Any) -> Tensor:
    return dpo_loss(*_sums(stats), config.beta, config.label_smoothing)


def _bco(stats: PairStats, config: Any) -> Tensor:
    delta = _bco_rewards(stats, config).mean() if stats.baseline is None else stats.baseline
    return bco_loss(*_sums(stats), config.beta, delta)


def _bco_rewards(stats: PairStats, config: Any) -> Tensor:
    return bco_rewards(*_sums(stats), config.beta)


def _ipo(stats: PairStats, config: Any) -> Tensor:
    sums = _sums(stats)
    if getattr(config, "ipo_reduction", "mean") == "mean":
        lengths = stats.chosen_lengths, stats.rejected_lengths
        sums = tuple(value / length for value, length in zip(sums, lengths * 2, strict=True))  # type: ignore[assignment]
    return ipo_loss(*sums, config.beta)


def _ld_dpo(stats: PairStats, config: Any) -> Tensor:
    """The sums are weighted already (`token_weights`)."""
    return dpo_loss(*_sums(stats), config.beta)


LOSSES: dict[str, Method] = {
    "dpo": Method(loss=_dpo, start=lambda config: math.log(2), uses=frozenset({"label_smoothing"})),
    "ipo": Method(loss=_ipo, start=lambda config: 1 / (4 * config.beta**2), uses=frozenset({"ipo_reduction"})),
    "ld_dpo": Method(
        loss=_ld_dpo,
        start=lambda config: math.log(2),
        uses=frozenset({"ld_alpha"}),
        token_weights=lambda places, public_lengths, config: ld_token_weights(places, public_lengths, config.ld_alpha),
    ),
    "bco": Method(loss=_bco, start=lambda config: 2 * math.log(2), beta=0.01, whole_step=True, baseline=_bco_rewards),
}


def get_method(name: str) -> Method:
    """The entry of `LOSSES`, or a `ConfigError` that names the nearest one."""
    if name in LOSSES:
        return LOSSES[name]
    near = difflib.get_close_matches(name, LOSSES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"method={name!r} is not known; {hint}expected one of {', '.join(sorted(LOSSES))}")
