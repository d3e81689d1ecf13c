"""Per-token log-probs of a linear head, without logits: `linear_logps`."""

from dpo_engine.ops.linear_logps import BACKENDS, linear_logps

__all__ = ["BACKENDS", "linear_logps"]
