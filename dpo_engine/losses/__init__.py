"""Preference losses: pure functions of sequence statistics, and the table that names them.

pairwise.py          losses of a pair and a reference
reference_free.py    losses of a pair alone
unpaired.py          KTO
ranked.py            Plackett-Luce
stats.py             what a loss gets to see
parameters.py        what it can be told
method.py            a loss with everything it needs
    mixture.py           a weighted sum of them
table.py             the names
"""

from dpo_engine.losses.method import Method
from dpo_engine.losses.pairwise import (
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    discopop_loss,
    dpo_loss,
    dpop_loss,
    exo_loss,
    f_dpo_loss,
    hinge_loss,
    ipo_loss,
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
from dpo_engine.losses.table import ALIASES, LOSSES, get_method
from dpo_engine.losses.unpaired import kto_baseline, kto_loss

__all__ = [
    "ALIASES",
    "LOSSES",
    "ListStats",
    "Method",
    "PairStats",
    "UnpairedStats",
    "aot_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "dpop_loss",
    "exo_loss",
    "f_dpo_loss",
    "get_method",
    "hinge_loss",
    "ipo_loss",
    "kto_baseline",
    "kto_loss",
    "nca_loss",
    "nll_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "r_dpo_loss",
    "rdpo_loss",
    "simpo_loss",
    "sppo_loss",
    "tdpo_loss",
    "wpo_loss",
]
