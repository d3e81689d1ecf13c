"""Which parameters do methods have, beside one another, and what may they be? Each entry of `LOSSES` says which it uses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dpo_engine.errors import ConfigError
from dpo_engine.losses.pairwise import F_DIVERGENCES


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number between two bounds, or one of some words."""

    name: str
    default: Any
    lowest: float = -math.inf
    highest: float = math.inf
    """Infinite values are refused whatever the bounds say."""
    excludes: tuple[float, ...] = ()
    """Numbers within the bounds that are refused, such as a bound itself."""
    choices: tuple[str, ...] = ()
    is_whole: bool = False
    """Fractions are refused."""

    def of(self, default: Any, **bounds: Any) -> Parameter:
        """The same parameter with another method's default, or within other bounds."""
        return replace(self, default=default, **bounds)

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        ends = [
            f"{word} {bound:g}"
            for word, bound in (
                ("above" if self.lowest in self.excludes else "of at least", self.lowest),
                ("below" if self.highest in self.excludes else "of at most", self.highest),
            )
            if math.isfinite(bound)
        ]
        inner = [f"{number:g}" for number in self.excludes if number not in (self.lowest, self.highest)]
        kind = "a whole number" if self.is_whole else "a finite number"
        return f"{kind} {' and '.join(ends)}".rstrip() + (f" other than {', '.join(inner)}" if inner else "")

    def check(self, value: Any) -> None:
        """Raise a `ConfigError` unless it may be `value`."""
        if self.choices:
            holds = value in self.choices
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            holds = is_number and self.lowest <= value <= self.highest and value not in self.excludes
            holds = holds and (not self.is_whole or value == int(value))
        if not holds:
            raise ConfigError(f"{self.name}={value!r} is out of range; expected {self.expected}")


def _above_zero(name: str, default: float) -> Parameter:
    return Parameter(name=name, default=default, lowest=0.0, excludes=(0.0,))


def _at_least_zero(name: str, default: float) -> Parameter:
    return Parameter(name=name, default=default, lowest=0.0)


BETA = _above_zero("beta", 0.1)
LABEL_SMOOTHING = Parameter(name="label_smoothing", default=0.0, lowest=0.0, highest=0.5, excludes=(0.5,))
IPO_REDUCTION = Parameter(name="ipo_reduction", default="mean", choices=("mean", "sum"))
RPO_ALPHA = _at_least_zero("rpo_alpha", 1.0)
DPOP_LAMBDA = _at_least_zero("dpop_lambda", 50.0)
DISCOPOP_TAU = _above_zero("discopop_tau", 0.05)
F_DIVERGENCE_TYPE = Parameter(name="f_divergence_type", default="reverse_kl", choices=F_DIVERGENCES)
F_ALPHA = Parameter(name="f_alpha_divergence_coef", default=0.5, excludes=(1.0,))
LD_ALPHA = Parameter(name="ld_alpha", default=0.5, lowest=0.0, highest=1.0)
R_DPO_ALPHA = _at_least_zero("r_dpo_alpha", 0.01)
TDPO_ALPHA = _at_least_zero("tdpo_alpha", 0.5)
REF_MODEL_MIXUP_ALPHA = Parameter(name="ref_model_mixup_alpha", default=0.6, lowest=0.0, highest=1.0, excludes=(0.0,))
REF_MODEL_SYNC_STEPS = Parameter(name="ref_model_sync_steps", default=512, lowest=1, is_whole=True)
CPO_ALPHA = _at_least_zero("cpo_alpha", 1.0)
GAMMA_BETA_RATIO = _at_least_zero("gamma_beta_ratio", 0.5)
DESIRABLE_WEIGHT = _above_zero("desirable_weight", 1.0)
UNDESIRABLE_WEIGHT = _above_zero("undesirable_weight", 1.0)
