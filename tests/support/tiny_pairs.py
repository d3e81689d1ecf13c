"""Random pairs of token ids, and a tiny random model to train on them."""

from __future__ import annotations

import random

import torch

from dpo_engine.data import DataReport, PairData, PreferenceRow, TokenizedTree

VOCABULARY = 199


def random_pairs(count: int, seed: int = 0, longest: int = 14) -> PairData:
    """`count` pairs with prompts and completions of 1 to `longest` tokens."""
    draw = random.Random(seed)

    def ids() -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest))]

    trees = []
    while len(trees) < count:
        chosen, rejected = ids(), ids()
        if chosen != rejected:
            origin = f"row {len(trees) + 1}"
            trees.append(TokenizedTree(prompt_ids=ids(), completions=(chosen, rejected), origin=origin))
    rows = [PreferenceRow(prompt="p", completions=("c", "r"), origin=tree.origin) for tree in trees]
    report = DataReport(source="random", format="random ids", rows_read=count, rows_used=count)
    return PairData(trees=trees, rows=rows, report=report)


def tiny_llama(seed: int = 0, **changes: object) -> torch.nn.Module:
    """A two-layer Llama of a few thousand parameters, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))
