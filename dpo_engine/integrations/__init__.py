"""The engine inside programs that other people wrote: their trainers, their loops, their loss classes.

token_logps  any causal model answers labels with log-probs instead of logits
liger        the call shape of Liger's fused DPO loss
"""
