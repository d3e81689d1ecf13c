"""Which model is trained on a card without any download? One of Llama-3.1-8B's shape, with random weights made there.

The weights are drawn on the card in their own dtype. For NF4 the decoder's linear layers are quantised one after the other,
as loading with bitsandbytes would leave them: embedding and head stay as they are.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHTS = ("bf16", "nf4")


def llama_config(*, tiny: bool) -> LlamaConfig:
    """Llama-3.1-8B's shape (its rope scaling left out), or two small layers for a trial on a CPU."""
    if tiny:
        return LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )


def make_model(config: LlamaConfig, weights: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A frozen model with random weights, one layer's at a time: for NF4 no more than one is ever there in `dtype`.

    Raises:
        ImportError: `weights` is nf4 and bitsandbytes is not installed.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if weights == "nf4" and type(module) is nn.Linear and module is not head:
            model.set_submodule(name, _nf4(_drawn(module, config, device), dtype))
        else:
            _drawn(module, config, device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are computed, not drawn
    model.requires_grad_(False)
    if weights == "nf4":
        model.is_loaded_in_4bit = True  # what peft and TRL ask a quantised model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return model.eval()


def _drawn(module: Any, config: LlamaConfig, device: str) -> Any:
    """The module with parameters of its own on the device: norms of ones, anything else as transformers draws it."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            made = made.fill_(1.0) if parameter.ndim == 1 else made.normal_(std=config.initializer_range)
            module._parameters[name] = nn.Parameter(made, requires_grad=False)
    return module


def _nf4(module: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """An NF4 layer with double quantisation, of a linear layer's weights."""
    import bitsandbytes

    layer: Any = bitsandbytes.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = module.weight.data
    layer.weight = bitsandbytes.nn.Params4bit(  # quantised as it is moved
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(weight.device)
    return layer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Two words: TRL asks a tokenizer for the id to pad with, and the pairs are ids already."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
