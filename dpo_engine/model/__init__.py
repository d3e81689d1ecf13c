"""Models: finding and loading them, adapters, the head, the scoring forward, how it attends, and the probes that check it.

loading           a name becomes a folder, a config that was checked, a model, a tokenizer
smollm2           the one model that the package index itself carries, as an ordinary folder
adapters          LoRA, and the reference that lies under it
head              what a model's config says it does to logits
scoring           a forward that returns log-probs and never builds logits
forest_attention  attention over a forest, tree by tree, through transformers' interface
flex_attention    a forest in one kernel, on CUDA cards
forest_mask       a forest as one mask, for models that keep their attention to themselves
rope              up to which length a row's rope does not look at the whole row
layout            which layout of a forest a model is right on
probe             the model's own logits against what the engine computes
"""
