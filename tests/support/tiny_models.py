"""Which causal models are small enough to be made anew in every test?

Random weights, a vocabulary of 97, two layers. Initial weights are drawn wide, so that logits differ by several nats and a
wrong head shows.
"""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 97
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = dict(
    {key: value for key, value in _LLAMA.items() if key != "head_dim"},
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
}

# By name of the config class without "Config". Scales and softcaps are set where the family has them.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": dict(_LLAMA, tie_word_embeddings=False),
    "Qwen3": dict(_LLAMA, tie_word_embeddings=True),
    "GPT2": dict(_GPT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "GPTJ": dict(_GPT, rotary_dim=8),  # the head has a bias
    "Phi": dict(_LLAMA),  # so has this one
    "OPT": dict(_OPT, dropout=0.0),  # its forward goes past its base model
    "Gemma2": dict(_LLAMA, final_logit_softcapping=5.0),
    "Cohere": dict(_LLAMA, logit_scale=0.25),
    "Granite": dict(_LLAMA, logits_scaling=4.0),
    "HyperCLOVAX": dict(_LLAMA, logits_scaling=0.5),  # multiplies where Granite divides
    "MiniCPM3": dict(_LATENT, dim_model_base=8),  # divides the hidden state
    "NanoChat": dict(_LLAMA, final_logit_softcapping=4.0),
    "Mixtral": dict(_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "FalconH1": dict(
        _LLAMA,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
        lm_head_multiplier=0.3,
    ),
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The config called `name` in `CONFIGS`, with some values changed."""
    import transformers

    return getattr(transformers, f"{name}Config")(**{**CONFIGS[name], **changes})


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A causal language model with random float32 weights, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes)).eval()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(10)
        if head.bias is not None:
            head.bias.normal_()
    return model


def naive_token_logps(
    model: Any, input_ids: torch.Tensor, score_from: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """(N,) by the model's own logits: `log_softmax(logits.reshape(-1, V)[score_from])[labels]`."""
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits.float()
    return logits.flatten(0, 1)[score_from].log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
