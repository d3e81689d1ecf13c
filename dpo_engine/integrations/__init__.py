"""The engine inside programs that other people wrote: their trainers, their loops, their loss classes.

trl          install() for TRL's own trainers, 0.19 to 1.16
llamafactory install() for LLaMA-Factory's, which replace TRL's
axolotl      a plugin for Axolotl
run          python -m: another program with install() done first
token_logps  any causal model answers labels with log-probs instead of logits
liger        the call shape of Liger's fused DPO loss
"""
