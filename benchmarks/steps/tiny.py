"""On what does `--smoke` train? A random model of two small layers, a tokenizer of two words, and random pairs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

VOCABULARY = 128


def tiny_model(folder: Path) -> str:
    """Saved there with its tokenizer, of which TRL needs the padding token's number."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def tiny_pairs(count: int) -> list[dict[str, Any]]:
    """Token ids of unlike lengths; no completion is a part of another."""
    draw = random.Random(0)

    def ids(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(shortest, longest))]

    return [
        {"prompt_ids": ids(4, 12), "chosen_ids": [2, *ids(3, 9)], "rejected_ids": [3, *ids(3, 9)]} for _ in range(count)
    ]
