"""What is small enough to see in seconds whether a benchmark runs? A random model and random pairs."""

from __future__ import annotations

import random
from pathlib import Path

WHY = "smoke: sizes so small that no figure means anything"
VOCABULARY = 199


def tiny_model(folder: Path) -> Path:
    """A random Llama of a few thousand parameters as a folder, with a tokenizer of two words; returns the folder."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def tiny_pairs(count: int) -> list[dict[str, list[int]]]:
    """Token ids of pairs of 3 to 12 tokens each, neither padding nor end among them."""
    draw = random.Random(0)

    def ids() -> list[int]:
        return [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(3, 12))]

    return [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()} for _ in range(count)]
