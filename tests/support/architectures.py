"""Which kinds of causal models does a forest have to be right on? Tiny random ones, windows and chunks shorter than a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97


def config_of(name: str, **changes: Any) -> Any:
    """A tiny config of a model type that names its sizes as Llama does."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return AutoConfig.for_model(name, **{**sizes, **changes})


def _gemma(name: str, **changes: Any) -> Any:
    return config_of(name, head_dim=8, sliding_window=7, query_pre_attn_scalar=8, **changes)


def _old(name: str, **sizes: Any) -> Any:
    return AutoConfig.for_model(name, vocab_size=VOCABULARY, **sizes)


_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}

SHARING: dict[str, Callable[[], Any]] = {
    "llama": lambda: config_of("llama"),
    "qwen2": lambda: config_of("qwen2"),
    "qwen3": lambda: config_of("qwen3", head_dim=8),
    "mistral with a window": lambda: config_of("mistral", sliding_window=7),
    "gemma2": lambda: _gemma("gemma2", attn_logit_softcapping=0.02, final_logit_softcapping=3.0),
    "gemma3": lambda: _gemma("gemma3_text"),
    "phi3": lambda: config_of("phi3"),
    "olmo2": lambda: config_of("olmo2"),
    "gpt_neox": lambda: config_of("gpt_neox"),
    "gpt2": lambda: _old(
        "gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "mixtral": lambda: config_of("mixtral", num_local_experts=4, **_EXPERTS),
    "qwen2_moe": lambda: config_of(
        "qwen2_moe", num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24, **_EXPERTS
    ),
    "cohere2": lambda: config_of("cohere2", sliding_window=7, head_dim=8),
    "granite": lambda: config_of(
        "granite", attention_multiplier=0.3, logits_scaling=2.0, residual_multiplier=0.7, embedding_multiplier=2.0
    ),
    "gpt_oss": lambda: config_of("gpt_oss", head_dim=8, sliding_window=7, num_local_experts=4, **_EXPERTS),
    "llama4 with chunks": lambda: config_of(
        "llama4_text",
        head_dim=8,
        attention_chunk_size=8,
        num_local_experts=2,
        intermediate_size_mlp=48,
        attn_temperature_tuning=False,
    ),
    "ministral3 beyond its first length": lambda: config_of(
        "ministral3",
        head_dim=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 6,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    ),
    "opt": lambda: _old(
        "opt",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
    ),
}
"""Models whose tokens may share a prompt: attention does all of the mixing, and goes through transformers' interface."""

MASKED: dict[str, Callable[[], Any]] = {
    "falcon": lambda: _old(
        "falcon", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=False, hidden_dropout=0.0
    ),
    "gptj": lambda: _old(
        "gptj", n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "codegen": lambda: _old(
        "codegen",
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        n_ctx=64,
        rotary_dim=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
}
"""Models that may share a prompt too, but keep their attention to themselves: they take the forest as one mask."""

PADDED: dict[str, Callable[[], Any]] = {
    "mamba": lambda: _old("mamba", hidden_size=32, num_hidden_layers=2),
    "lfm2": lambda: config_of(
        "lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "qwen3_next": lambda: config_of(
        "qwen3_next", head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        **_EXPERTS,
    ),
    "bloom": lambda: _old("bloom", hidden_size=32, n_layer=2, n_head=4),
    "falcon with alibi": lambda: _old("falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "falcon_h1": lambda: config_of(
        "falcon_h1", head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    "gpt_neo with a window": lambda: _old(
        "gpt_neo", hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=64, max_position_embeddings=256, resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    ),
    "llama4 with tempered queries": lambda: config_of(
        "llama4_text", head_dim=8, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48,
        attn_temperature_tuning=True, floor_scale=64, no_rope_layers=[1, 0, 1, 0],
    ),
}  # fmt: skip
"""Models that mix tokens in another way too (state, convolution), or count the row's indices: they fall back."""


def tiny_model(name: str, *, seed: int = 1) -> PreTrainedModel:
    """The named model in float32 with random weights, without dropout."""
    return tiny_from({**SHARING, **MASKED, **PADDED}[name](), seed=seed)


def tiny_from(config: Any, *, seed: int = 1) -> PreTrainedModel:
    """A model of that config in float32 with random weights.

    Norms and sinks are moved off their neutral start, and matrices are twice as large as transformers makes them: at 0.02
    a convolution or a state that leaks from a neighbour would hardly show.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(2.0)
    return model
