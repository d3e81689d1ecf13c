"""Preference losses: pure functions of sequence statistics, and the table that names them."""

from dpo_engine.losses.pairwise import bco_loss, dpo_loss, ipo_loss, ld_token_weights
from dpo_engine.losses.stats import PairStats
from dpo_engine.losses.table import LOSSES, Method, get_method

__all__ = ["LOSSES", "Method", "PairStats", "bco_loss", "dpo_loss", "get_method", "ipo_loss", "ld_token_weights"]
