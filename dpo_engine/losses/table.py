"""Which method does a name stand for? One table; adding a method is one function and one entry."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo_engine.errors import ConfigError
from dpo_engine.losses.pairwise import dpo_loss
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

    def __call__(self, stats: PairStats, config: Any) -> Tensor:
        return self.loss(stats, config)


def _dpo(stats: PairStats, config: Any) -> Tensor:
    assert stats.reference_chosen_logps is not None and stats.reference_rejected_logps is not None
    return dpo_loss(
        stats.chosen_logps,
        stats.rejected_logps,
        stats.reference_chosen_logps,
        stats.reference_rejected_logps,
        config.beta,
        config.label_smoothing,
    )


LOSSES: dict[str, Method] = {
    "dpo": Method(loss=_dpo, start=lambda config: math.log(2)),
}


def get_method(name: str) -> Method:
    """The entry of `LOSSES`, or a `ConfigError` that names the nearest one."""
    if name in LOSSES:
        return LOSSES[name]
    near = difflib.get_close_matches(name, LOSSES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"method={name!r} is not known; {hint}expected one of {', '.join(sorted(LOSSES))}")
