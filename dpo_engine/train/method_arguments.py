"""Which settings choose a method and tell it something? One field for each parameter that a method of `LOSSES` has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpo_engine.errors import ConfigError
from dpo_engine.losses import Method, get_method
from dpo_engine.train.statistics import RANKED_PAIRS
from dpo_engine.train.trl_names import SAME, TRL_NAMES
from dpo_engine.train.trl_settle import say_once

SWITCHES = (
    ("ld_alpha", "ld_dpo"),
    ("rpo_alpha", "dpo_nll"),
    ("f_divergence_type", "f_dpo"),
    ("use_weighting", "wpo"),
    ("sync_ref_model", "tr_dpo"),
)
"""What makes `dpo` another method, as in TRL."""


class OwnDefault(float):
    """A method's own default, which nobody gave: another method does not take it over."""


@dataclass
class MethodArguments:
    """The method, and what methods can be told. None is the method's own default; what a method does not use is refused."""

    method: str = field(
        default="dpo",
        metadata={
            "help": "A name of dpo_engine.losses.LOSSES (docs/methods.md), or several joined by + for a mixture: dpo+sft."
        },
    )
    loss_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Of a mixture: what each method's loss counts, in their order; 1 each if not given."},
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "How strongly the policy is held to the reference (ipo: tau; orpo: lambda); > 0. The method's own if not "
            "given: 0.1 for most."
        },
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={
            "help": "Share of labels taken to be flipped, in [0, 0.5); 0 if not given in dpo (above 0 it is cDPO), 0.1 in cdpo and "
            "rdpo, 0.001 in exo."
        },
    )
    ipo_reduction: str | None = field(
        default=None,
        metadata={
            "help": "ipo: compare means over tokens (mean, as most trainers and if not given) or sums (sum, the paper)."
        },
    )
    rpo_alpha: float | None = field(
        default=None,
        metadata={
            "help": "dpo_nll: what the chosen completion's NLL counts; 1 if not given. Given with dpo, it is dpo_nll."
        },
    )
    dpop_lambda: float | None = field(
        default=None, metadata={"help": "dpop: what a nat that the chosen completion loses counts; 50 if not given."}
    )
    discopop_tau: float | None = field(
        default=None, metadata={"help": "discopop: temperature of the blend, > 0; 0.05 if not given."}
    )
    f_divergence_type: str | None = field(
        default=None,
        metadata={
            "help": "f_dpo: reverse_kl (which is dpo, and if not given), forward_kl, js_divergence or alpha_divergence. Given with "
            "dpo, the method is f_dpo."
        },
    )
    f_alpha_divergence_coef: float | None = field(
        default=None, metadata={"help": "f_dpo with alpha_divergence: alpha, not 1; 0.5 if not given."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "ld_dpo: weight of the tokens beyond the shorter completion's length, in [0, 1]; 0.5 if not given. Given "
            "with dpo, the method is ld_dpo."
        },
    )
    r_dpo_alpha: float | None = field(
        default=None, metadata={"help": "r_dpo: what a token more in the chosen completion counts; 0.01 if not given."}
    )
    use_weighting: bool = field(default=False, metadata={"help": "With dpo: the method is wpo (TRL's name)."})
    sync_ref_model: bool = field(default=False, metadata={"help": "With dpo: the method is tr_dpo (TRL's name)."})
    ref_model_mixup_alpha: float | None = field(
        default=None,
        metadata={
            "help": "tr_dpo: what share of the policy the reference takes on at a sync, in (0, 1]; 0.6 if not given."
        },
    )
    ref_model_sync_steps: int | None = field(
        default=None, metadata={"help": "tr_dpo: optimiser steps between syncs; 512 if not given."}
    )
    tdpo_alpha: float | None = field(
        default=None, metadata={"help": "tdpo: what the difference of token-level KLs counts; 0.5 if not given."}
    )
    cpo_alpha: float | None = field(
        default=None, metadata={"help": "cpo: what the chosen completion's NLL counts; 1 if not given."}
    )
    gamma_beta_ratio: float | None = field(
        default=None,
        metadata={"help": "simpo: the margin aimed for over beta (gamma = beta * gamma_beta_ratio); 0.5 if not given."},
    )
    desirable_weight: float | None = field(
        default=None, metadata={"help": "kto: what desirable completions count; 1 if not given."}
    )
    undesirable_weight: float | None = field(
        default=None, metadata={"help": "kto: what undesirable completions count; 1 if not given."}
    )
    ranked_pairs: str = field(
        default="all",
        metadata={
            "help": "Methods of pairs on ranked lists: compare all whose ranks differ, adjacent ranks, or best_worst."
        },
    )

    @property
    def entry(self) -> Method:
        """The method, or the mixture, that these settings are of."""
        return get_method(self.method, self.loss_weights)

    def settle_method(self) -> None:
        """Follow what makes dpo another method, and check parameters.

        Raises:
            ConfigError: an unknown method, a parameter out of range, or one that the method does not use.
        """
        if isinstance(self.beta, OwnDefault):  # of the method that was set before
            self.beta = None
        is_of_trl = vars(self).get("_is_of_trl", False)
        for name, method in SWITCHES:
            given = getattr(self, name)
            says_nothing = given is None or given is False or given == "reverse_kl"
            if self.method in ("dpo", "sigmoid") and not says_nothing:
                say_once(f"{name}={given} with method 'dpo': the method is {method!r}")
                self.method, is_of_trl = method, True
        entry = self.entry
        self.method = entry.name
        methods = [entry, *(part for _, part in entry.parts)]
        uses = set().union(*(method.uses for method in methods))
        for name, method in SWITCHES:
            given = getattr(self, name)
            if isinstance(given, bool) and given and all(part.name != method for part in methods):
                raise ConfigError(
                    f"{name}={given!r} is out of range; expected false: the method {self.method} is not {method}"
                )
        for name in PARAMETERS:
            given = getattr(self, name)
            if given is not None and name not in uses and not _says_nothing(name, given):
                uses_shown = ", ".join(sorted(uses)) or "none"
                raise ConfigError(
                    f"{name}={given!r} is given, but the method {self.method} does not use it; leave it out (its own: {uses_shown})"
                )
        entry.check(self)
        if is_of_trl:
            for used in methods:
                self._say_defaults(used)
        if not entry.parts and "beta" in uses and self.beta is None:
            self.beta = OwnDefault(entry.settings(self)["beta"])
        for used in methods:
            own = {parameter.name: parameter.default for parameter in used.parameters}.get("beta")
            if own and self.beta and not 0.1 <= self.beta / own / 1.0000001 <= 10:
                say_once(
                    f"beta={self.beta:g} with method {used.name!r}, whose own is {own:g}: each method has a scale of its own"
                )
        divergence = entry.settings(self).get("f_divergence_type", "alpha_divergence")
        if divergence != "alpha_divergence" and self.f_alpha_divergence_coef not in (None, 0.5):
            raise ConfigError(
                f"f_alpha_divergence_coef={self.f_alpha_divergence_coef!r} belongs to f_divergence_type: alpha_divergence, and "
                f"that is {divergence}; leave it out"
            )
        expected = RANKED_PAIRS if entry.kind == "pairs" else RANKED_PAIRS[:1]  # others compare no pairs
        if self.ranked_pairs not in expected:
            raise ConfigError(
                f"ranked_pairs={self.ranked_pairs!r} is out of range; expected {' or '.join(expected)} with method {self.method}"
            )

    def _say_defaults(self, method: Method) -> None:
        """Say which parameters are left at a method's own default that is not TRL's, where TRL's names are used."""
        of_trl = {row.name: row.default for row in TRL_NAMES if row.kind == SAME and row.default is not None}
        left = [
            f"{own.name} {own.default} (TRL: {of_trl[own.name]})"
            for own in method.parameters
            if getattr(self, own.name) is None and own.name in of_trl and own.default != of_trl[own.name]
        ]
        if left:
            say_once(f"method {method.name!r} has defaults of its own that are not TRL's: {', '.join(left)}")


PARAMETERS = tuple(
    name
    for name in MethodArguments.__dataclass_fields__
    if name not in ("method", "loss_weights", "ranked_pairs", "use_weighting", "sync_ref_model")
)
"""Fields that are parameters of methods."""


def _says_nothing(name: str, given: Any) -> bool:
    """Whether a value is what TRL's configurations hold where nothing was said."""
    if name == "beta":
        return False
    return any(row.name == name and row.kind == SAME and row.default == given for row in TRL_NAMES)
