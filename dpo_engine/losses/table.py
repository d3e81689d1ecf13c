"""Which method does a name stand for? One table; adding a method is one function and one entry."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_engine.errors import ConfigError
from dpo_engine.losses import parameters as p
from dpo_engine.losses.method import (
    Method,
    Settings,
    four_means,
    four_sums,
    needed,
    on_fields,
    on_means,
    on_sums,
)
from dpo_engine.losses.mixture import mixture
from dpo_engine.losses.pairwise import (
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    bco_rewards,
    discopop_loss,
    dpo_loss,
    dpop_loss,
    exo_loss,
    f_dpo_loss,
    hinge_loss,
    ipo_loss,
    ld_logps,
    nca_loss,
    r_dpo_loss,
    rdpo_loss,
    sppo_loss,
    tdpo_loss,
    wpo_loss,
)
from dpo_engine.losses.ranked import plackett_luce_loss
from dpo_engine.losses.reference_free import cpo_loss, nll_loss, orpo_loss, simpo_loss
from dpo_engine.losses.stats import ListStats, PairStats, UnpairedStats
from dpo_engine.losses.unpaired import kto_loss

logger = logging.getLogger(__name__)

_PAIR = ("chosen_logps", "rejected_logps")
_LENGTHS = ("chosen_lengths", "rejected_lengths")
_REFERENCE = ("reference_chosen_logps", "reference_rejected_logps")

ALIASES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "robust": "rdpo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
}
"""TRL's names of losses -> ours, where they differ and mean the same."""


def _ipo(stats: PairStats, settings: Settings) -> Tensor:
    four = four_means(stats) if settings["ipo_reduction"] == "mean" else four_sums(stats)
    return ipo_loss(*four, settings["beta"])


def _dpo_nll(stats: PairStats, settings: Settings) -> Tensor:
    """Source: Pang et al. 2024, "Iterative reasoning preference optimization", arXiv:2404.19733, eq. 2."""
    nll = nll_loss(stats.chosen_logps, stats.chosen_lengths)
    return dpo_loss(*four_sums(stats), settings["beta"]) + settings["rpo_alpha"] * nll


def _bco(stats: PairStats, settings: Settings) -> Tensor:
    delta = _bco_rewards(stats, settings).mean() if stats.baseline is None else stats.baseline
    return bco_loss(*four_sums(stats), settings["beta"], delta)


def _bco_rewards(stats: PairStats, settings: Settings) -> Tensor:
    return bco_rewards(*four_sums(stats), settings["beta"])


def _ld_dpo(stats: PairStats, settings: Settings) -> Tensor:
    return dpo_loss(*_ld_sums(stats, settings), settings["beta"])


def _ld_sums(stats: PairStats, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without public parts, only where they cannot matter: lengths are equal, or policy and reference are."""
    sums = four_sums(stats)
    alike = stats.chosen_public_logps is None and (
        torch.equal(stats.chosen_lengths, stats.rejected_lengths)
        or (torch.equal(sums[0], sums[2]) and torch.equal(sums[1], sums[3]))
    )
    if alike:
        return sums
    public = needed(
        stats,
        "chosen_public_logps",
        "rejected_public_logps",
        "reference_chosen_public_logps",
        "reference_rejected_public_logps",
    )
    weighted = [ld_logps(*both, settings["ld_alpha"]) for both in zip(sums, public, strict=True)]
    return weighted[0], weighted[1], weighted[2], weighted[3]


def _tr_dpo(stats: PairStats, settings: Settings) -> Tensor:
    """DPO's loss; the reference is another at each sync.

    Source: Gorbatovski et al. 2024, "Learn your reference model for real good alignment", arXiv:2404.09656.
    """
    return dpo_loss(*four_sums(stats), settings["beta"])


def _kto(stats: UnpairedStats, settings: Settings) -> Tensor:
    logps, reference, baseline = needed(stats, "logps", "reference_logps", "baseline")
    return kto_loss(logps, reference, stats.desirable, baseline, **settings)


def _plackett_luce(stats: ListStats, settings: Settings) -> Tensor:
    logps, reference = needed(stats, "logps", "reference_logps")
    return plackett_luce_loss(logps, reference, stats.list_ids, stats.ranks, stats.lists, **settings)


_METHODS = (
    Method(name="dpo", loss=on_sums(dpo_loss), parameters=(p.BETA, p.LABEL_SMOOTHING)),
    Method(name="dpo_norm", loss=on_means(dpo_loss), parameters=(p.BETA.of(5.0),), reward_per_token=True),
    Method(name="cdpo", loss=on_sums(dpo_loss), parameters=(p.BETA, p.LABEL_SMOOTHING.of(0.1))),
    Method(name="rdpo", loss=on_sums(rdpo_loss), parameters=(p.BETA, p.LABEL_SMOOTHING.of(0.1))),
    Method(name="ipo", loss=_ipo, parameters=(p.BETA, p.IPO_REDUCTION)),
    Method(name="hinge", loss=on_sums(hinge_loss), parameters=(p.BETA,)),
    Method(name="dpo_nll", loss=_dpo_nll, parameters=(p.BETA, p.RPO_ALPHA)),
    Method(name="dpop", loss=on_sums(dpop_loss), parameters=(p.BETA, p.DPOP_LAMBDA)),
    Method(name="apo_zero", loss=on_sums(apo_zero_loss), parameters=(p.BETA,)),
    Method(name="apo_down", loss=on_sums(apo_down_loss), parameters=(p.BETA,)),
    Method(name="nca", loss=on_sums(nca_loss), parameters=(p.BETA.of(0.01),)),
    Method(
        name="exo",
        loss=on_sums(exo_loss),
        parameters=(p.BETA, p.LABEL_SMOOTHING.of(1e-3, excludes=(0.0, 0.5))),
    ),
    Method(name="sppo", loss=on_sums(sppo_loss), parameters=(p.BETA.of(1e-3),)),
    Method(name="bco", loss=_bco, parameters=(p.BETA.of(0.01),), whole_step=True, baseline=_bco_rewards),
    Method(name="aot", loss=on_sums(aot_loss), parameters=(p.BETA.of(0.01), p.LABEL_SMOOTHING), whole_step=True),
    Method(name="discopop", loss=on_sums(discopop_loss), parameters=(p.BETA.of(0.05), p.DISCOPOP_TAU)),
    Method(name="f_dpo", loss=on_sums(f_dpo_loss), parameters=(p.BETA, p.F_DIVERGENCE_TYPE, p.F_ALPHA)),
    Method(name="ld_dpo", loss=_ld_dpo, parameters=(p.BETA, p.LD_ALPHA), public_part=True, sums=_ld_sums),
    Method(
        name="r_dpo",
        loss=on_fields(r_dpo_loss, *_PAIR, *_REFERENCE, *_LENGTHS),
        parameters=(p.BETA, p.R_DPO_ALPHA),
    ),
    Method(
        name="wpo",
        loss=on_fields(wpo_loss, *_PAIR, *_REFERENCE, "chosen_confidence", "rejected_confidence"),
        parameters=(p.BETA.of(0.01),),
        extras=("log_sum_squares",),
    ),
    Method(
        name="tr_dpo",
        loss=_tr_dpo,
        parameters=(p.BETA, p.REF_MODEL_MIXUP_ALPHA, p.REF_MODEL_SYNC_STEPS),
        moving_reference=True,
    ),
    Method(
        name="tdpo",
        loss=on_fields(tdpo_loss, *_PAIR, *_REFERENCE, "chosen_kl", "rejected_kl"),
        parameters=(p.BETA, p.TDPO_ALPHA),
        token_kl=True,
    ),
    Method(
        name="cpo",
        loss=on_fields(cpo_loss, *_PAIR, _LENGTHS[0]),
        parameters=(p.BETA, p.LABEL_SMOOTHING, p.CPO_ALPHA),
        needs_reference=False,
    ),
    Method(
        name="simpo",
        loss=on_fields(simpo_loss, *_PAIR, *_LENGTHS),
        parameters=(p.BETA.of(2.0), p.GAMMA_BETA_RATIO),
        needs_reference=False,
        reward_per_token=True,
    ),
    Method(
        name="orpo",
        loss=on_fields(orpo_loss, *_PAIR, *_LENGTHS),
        parameters=(p.BETA,),
        needs_reference=False,
        reward_per_token=True,
    ),
    Method(
        name="sft",
        loss=on_fields(nll_loss, _PAIR[0], _LENGTHS[0]),
        needs_reference=False,
        reward_per_token=True,
    ),
    Method(
        name="kto",
        loss=_kto,
        parameters=(p.BETA, p.DESIRABLE_WEIGHT, p.UNDESIRABLE_WEIGHT),
        needs=UnpairedStats,
        mismatched=True,
    ),
    Method(name="plackett_luce", loss=_plackett_luce, parameters=(p.BETA,), needs=ListStats),
)


class _Table(dict[str, Method]):
    """By name; TRL's names too, which are said to be so."""

    def __missing__(self, name: str) -> Method:
        return get_method(name)


LOSSES: dict[str, Method] = _Table({method.name: method for method in _METHODS})


def get_method(name: str, weights: Sequence[float] | None = None) -> Method:
    """The entry of `LOSSES` that a name stands for, or a mixture of several.

    Args:
        name: of `LOSSES` or `ALIASES`, or several joined by `+`: "dpo+bco+sft".
        weights: of a mixture, one a method; 1 each if not given.

    Raises:
        ConfigError: a name that is not known (the message has the nearest one), or weights that do not fit.
    """
    names = [part.strip() for part in str(name).split("+")]
    if len(names) == 1:
        if weights is not None and list(weights) != [1.0]:
            raise ConfigError(
                f"loss_weights={list(weights)} with the one method {name!r}; expected none: it is no mixture"
            )
        return _entry(names[0])
    methods = tuple(_entry(part) for part in names)
    if len({method.name for method in methods}) < len(methods):
        raise ConfigError(f"method={name!r} has a method twice; expected each once, with its weight in loss_weights")
    given: list[Any] = [1.0] * len(names) if weights is None else list(weights)
    are_numbers = all(isinstance(weight, int | float) for weight in given)
    if not are_numbers or len(given) != len(names) or not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise ConfigError(
            f"loss_weights={given} for method={name!r}; expected {len(names)} finite numbers above 0, one a method"
        )
    return mixture(tuple(zip(map(float, given), methods, strict=True)))


def _entry(name: str) -> Method:
    ours = ALIASES.get(name, name)
    if ours in LOSSES:
        if ours != name:
            logger.warning("%r is TRL's name; here the method is %r", name, ours)
        return LOSSES[ours]
    plain = name.lower().removesuffix("_pair")
    near = [plain] if plain in LOSSES else difflib.get_close_matches(name.lower(), [*LOSSES, *ALIASES], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"method={name!r} is not known; {hint}expected one of {', '.join(sorted(LOSSES))}, or several joined by '+'"
    )


def parameter_names() -> set[str]:
    """The names of all methods' parameters."""
    return {parameter.name for method in LOSSES.values() for parameter in method.parameters}
