"""The engine inside programs that other people wrote: their trainers, their loops, their loss classes.

trl           install() for TRL's own trainers, 0.19 to 1.16
llamafactory  python -m ... in the place of llamafactory-cli: its trainers replace TRL's
axolotl       a plugin for Axolotl
token_logps   any causal model answers labels with log-probs instead of logits
liger         the call shape of Liger's fused DPO loss
"""
