"""How much arithmetic does a training step need, and how fast could this device do it? The two sides of a utilisation.

Model FLOPs of frozen weights under LoRA, 2 for each multiplication and its addition:

    linear layers    tokens * 4 * (weights of the decoder's linear layers)      forward, and the gradient of the activations
    adapters         tokens * 6 * (trainable parameters)                        forward, and both gradients
    attention        visible (query, key) pairs * 12 * layers * heads * head_dim    QK and PV; backward counts twice
    head             scored tokens * 4 * vocabulary * hidden

Tokens and visible pairs are those that the layout cannot do without: `shared` needs a prompt once, others once a completion.
Padding, recomputation by checkpointing and reference passes are not counted, so whoever does them has a lower utilisation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch


def model_flops(config: Any, pairs: Sequence[dict[str, Any]], *, trainable: int, shared: bool) -> float:
    """FLOPs of one forward and backward over `pairs`, by the formula above.

    Args:
        config: of a Llama-like model.
        trainable: parameters of the adapters.
        shared: whether each prompt is computed once a pair.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    linear = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    tokens = visible = scored = 0
    for pair in pairs:
        prompt = len(pair["prompt_ids"])
        completions = [len(pair["chosen_ids"]) - 1, len(pair["rejected_ids"]) - 1]  # the last token is a label only
        prompts = 1 if shared else len(completions)
        tokens += prompts * prompt + sum(completions)
        visible += prompts * prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in completions)
        scored += sum(completions) + len(completions)
    return float(
        tokens * (4 * linear + 6 * trainable)
        + visible * 12 * config.num_hidden_layers * config.num_attention_heads * head_dim
        + scored * 4 * config.vocab_size * config.hidden_size
    )


def gemm_tflops(device: str, dtype: torch.dtype, size: int, rounds: int = 12) -> float:
    """TFLOP/s of a square product of random matrices: what the vendor's library reaches here, the median of `rounds`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(rounds + 3):
        _synchronize(device)
        begin = time.perf_counter()
        a @ b
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds[3:]) * 1e-12


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
