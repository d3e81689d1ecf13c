"""Does this model compute what the engine computes in its place?

Its config is only read; the model itself is asked. Three questions, on a few tokens, in eval mode, without gradients:

    the head      known hidden states, spread so that logits reach from 0.1 to 300, are put in the place of the decoder's
                  output, and the model's own logits are compared with softcap(scale * (hidden @ weight.T + bias)), adapters
                  on the head included: so a scale, a softcap or a bias that was misread shows even with random weights
    the scores    token_logps of the scoring forward against the log-softmax of the model's own logits
    the order     logits must not depend on tokens that come later
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_engine.errors import ModelError
from dpo_engine.model.head import HeadTransform, ModelHead, head_of, read_head_transform
from dpo_engine.model.scoring import bind_scoring, decoder_of, is_bound, unbind_scoring
from dpo_engine.ops.weights import quantised_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How far a number may be off, in units of 1 + the largest logit beside it. Eight roundings; float32 allows for reordered sums.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 8 * 2.0**-8, torch.float16: 8 * 2.0**-11, torch.float64: 1e-9}
# bitsandbytes' 8-bit product rounds the hidden states to 8 bits as well, which the engine does not: the probe can tell a
# wrong scale from that, but nothing finer.
EIGHT_BITS = 0.05
LARGEST_LOGITS = (0.1, 1.0, 10.0, 30.0, 100.0, 300.0)  # one probed row each
_SLAB = 4096
LENGTH, SHARED = 12, 8  # tokens of a probe sequence, and how many of them the two sequences share


def probe_head(model: PreTrainedModel) -> None:
    """Compare the model's own logits with what the engine computes; return in silence if they agree.

    Args:
        model: the causal language model itself, bound (`bind_scoring`) or not; adapters may be on it. Left as it was.

    Raises:
        ModelError: they differ; the message holds both numbers.
    """
    was_bound = is_bound(model)
    training = [(module, module.training) for module in model.modules()]
    input_ids = _probe_tokens(model)  # (2, LENGTH)
    try:
        bind_scoring(model)
        model.eval()
        with torch.no_grad():
            _probe_transform(model, input_ids[:1])
            logits = _own_logits(model, input_ids)
            _probe_order(model, logits)
            _probe_scores(model, input_ids, logits)
    finally:
        for module, mode in training:
            module.training = mode
        if not was_bound:
            unbind_scoring(model)


def _probe_transform(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Hidden states of our choosing in, logits out."""
    transform = read_head_transform(model.config)
    for decoder in (decoder_of(model), model.get_decoder()):  # OPT goes past the former, straight to the latter
        with _decoder_output_replaced(decoder, head_of(model)) as injected:
            given = _own_logits(model, input_ids)[0]  # (LENGTH, V)
        if injected:
            break
    else:
        raise ModelError(
            f"{_name(model)} does not take its hidden states from {type(decoder_of(model)).__name__}, so the engine cannot; refused"
        )
    expected = _transformed(_products(head_of(model), injected[0], with_adapters=True), transform)
    if given.shape != expected.shape:
        raise ModelError(
            f"{_name(model)} returns {given.shape[-1]} logits from a head of {expected.shape[-1]} rows: "
            "it changes its logits in a way the engine does not read from its config; refused"
        )
    error = (given - expected).abs() / (1 + expected.abs().amax(-1, keepdim=True))
    at = int(error.nan_to_num(nan=math.inf).argmax())
    if not float(error.flatten()[at]) <= _tolerance(model):
        row, token = divmod(at, expected.shape[1])
        _refuse(model, "logit", float(given[row, token]), float(expected[row, token]), f"token {token}", transform)


@contextmanager
def _decoder_output_replaced(decoder: nn.Module, head: ModelHead) -> Iterator[list[Tensor]]:
    """Within, the decoder returns random directions scaled to the `LARGEST_LOGITS` in turn; the list holds them, (L, D)."""
    injected: list[Tensor] = []

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0]  # (1, L, D)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(hidden.shape[1:], generator=generator).to(hidden.device, _dtype(head, hidden))
        sizes = torch.tensor([LARGEST_LOGITS[i % len(LARGEST_LOGITS)] for i in range(len(rows))]).to(rows)
        rows = rows * (sizes / _products(head, rows, with_adapters=False).abs().amax(-1).clamp_min(1e-6))[:, None]
        injected.append(rows)
        hidden.copy_(rows)
        return output

    handle = decoder.register_forward_hook(replace)
    try:
        yield injected
    finally:
        handle.remove()


def _products(head: ModelHead, hidden: Tensor, *, with_adapters: bool) -> Tensor:
    """(L, V) `hidden @ weight.T + bias`, and what LoRA adds; a quantised weight a slab at a time."""
    if head.is_quantised:
        weight = quantised_weight(head.weight)
        slabs = (weight.slab(i, min(i + _SLAB, head.shape[0])) for i in range(0, head.shape[0], _SLAB))
        products = torch.cat([hidden @ slab.to(hidden.dtype).T for slab in slabs], -1)
    else:
        products = nn.functional.linear(hidden, head.weight)
    if with_adapters:
        if head.bias is not None:
            products = products + head.bias.to(products.dtype)
        if (lora := head.lora(hidden)) is not None:
            products = products + lora[0] @ lora[1].T
    return products


def _dtype(head: ModelHead, hidden: Tensor) -> torch.dtype:
    """What the head multiplies: its own dtype, or where it is quantised that of what it is given."""
    return hidden.dtype if head.is_quantised else head.weight.dtype


def _transformed(products: Tensor, transform: HeadTransform) -> Tensor:
    logits = products.float() * transform.logit_scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def _probe_scores(model: PreTrainedModel, input_ids: Tensor, logits: Tensor) -> None:
    """The whole way: every position of both sequences predicts the next token."""
    count, length = input_ids.shape
    rows = torch.arange(count * length, device=input_ids.device).view(count, length)[:, :-1].reshape(-1)
    labels = input_ids[:, 1:].reshape(-1)
    given = logits.flatten(0, 1)[rows].log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    everything = torch.ones_like(input_ids)
    scored = model(input_ids=input_ids, attention_mask=everything, score_from=rows, labels=labels).token_logps
    error = (given - scored).abs() / (1 + logits.abs().max())
    at = int(error.nan_to_num(nan=math.inf).argmax())
    if not float(error[at]) <= _tolerance(model):
        transform = read_head_transform(model.config)
        _refuse(model, "log-prob", float(given[at]), float(scored[at]), f"token {int(labels[at])}", transform)


def _probe_order(model: PreTrainedModel, logits: Tensor) -> None:
    """The two sequences differ from token `SHARED` on only, so their logits agree before it."""
    first, second = logits[:, :SHARED]
    error = (first - second).abs() / (1 + first.abs().amax(-1, keepdim=True))
    at = int(error.nan_to_num(nan=math.inf).argmax())
    if not float(error.flatten()[at]) <= _tolerance(model):
        was, became = float(first.flatten()[at]), float(second.flatten()[at])
        raise ModelError(
            f"{_name(model)} is not causal: a logit is {was:.6g}, and {became:.6g} with other tokens further on; "
            "expected a model that sees earlier tokens only; refused"
        )


def _own_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """(B, L, V) float32 by the model's own forward."""
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits.float()


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    """Two random sequences that start alike, without the tokens that a config gives a meaning (padding, images, ...)."""
    config = model.config.get_text_config()
    named = {**model.config.to_dict(), **config.to_dict()}
    special = {v for k, v in named.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    ids = torch.tensor([i for i in range(min(config.vocab_size, 4096)) if i not in special] or [0])
    picked = ids[torch.randint(len(ids), (2, LENGTH), generator=torch.Generator().manual_seed(0))]
    picked[1, :SHARED] = picked[0, :SHARED]
    return picked.to(head_of(model).weight.device)


def _tolerance(model: PreTrainedModel) -> float:
    head = head_of(model)
    weight = head.weight
    if weight.dtype == torch.int8:
        return EIGHT_BITS
    dtype = model.dtype if head.is_quantised else weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    if weight.is_cuda and dtype == torch.float32:  # TF32 may be on, with the significand of float16
        return TOLERANCES[torch.float16]
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


def _refuse(
    model: PreTrainedModel, what: str, given: float, expected: float, where: str, transform: HeadTransform
) -> None:
    raise ModelError(
        f"{_name(model)}: the head gives a {what} of {given:.6g} where the engine gives {expected:.6g} ({where}): "
        "this model changes its logits in a way the engine does not read from its config "
        f"(it read logit_scale={transform.logit_scale:g}, softcap={transform.softcap}); refused"
    )


def _name(model: PreTrainedModel) -> str:
    return f"model {model.config.name_or_path or type(model).__name__}"
