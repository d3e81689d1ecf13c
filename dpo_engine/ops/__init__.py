"""Per-token log-probs of a linear head, without logits: `linear_logps`, and what is built like it."""

from dpo_engine.ops.kl import TokenKL, linear_kl
from dpo_engine.ops.linear_logps import BACKENDS, linear_logps
from dpo_engine.ops.preference_loss import linear_preference_loss
from dpo_engine.ops.statistics import TokenExtras

__all__ = ["BACKENDS", "TokenExtras", "TokenKL", "linear_kl", "linear_logps", "linear_preference_loss"]
