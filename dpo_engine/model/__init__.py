"""Models: finding and loading them, adapters, the head, the scoring forward, and the probe that checks it.

loading     a name becomes a folder, a config that was checked, a model, a tokenizer
smollm2     the one model that the package index itself carries, as an ordinary folder
adapters    LoRA, and the reference that lies under it
head        what a model's config says it does to logits
scoring     a forward that returns log-probs and never builds logits
forest_mask a forest as one mask, for models that keep their attention to themselves
rope        up to which length a row's rope does not look at the whole row
probe       the model's own logits against what the engine computes
"""
