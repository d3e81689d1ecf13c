"""How does any causal model, in anyone's training loop, give the log-probs of its labels without building logits?

    linear_logps_head(model)
    out = model(input_ids=..., attention_mask=..., labels=...)
    out.token_logps     # (B, L) float32: [b, t] is log p(labels[b, t] | input_ids[b, :t]), 0 where the label is -100
    out.loss            # what transformers would have called the loss: their mean, negative
    remove_linear_logps_head(model)

It happens inside the model's own forward, so DDP, FSDP2, PEFT, autocast and gradient checkpointing see an ordinary call. A
call without labels is the model's own forward, and generation goes on working.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model.forest_attention import forest_form
from dpo_engine.model.probe import probe_head
from dpo_engine.model.scoring import (
    Exact,
    bind_scoring,
    decoder_output,
    exact_under_fsdp,
    head_logps,
    is_bound,
    restore,
    unbind_scoring,
)
from dpo_engine.ops import BACKENDS
from dpo_engine.ops.statistics import EXTRAS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IGNORED = -100


@dataclass
class TokenLogps(ModelOutput):
    """What a call with labels returns."""

    loss: Tensor | None = None
    """() mean of `-token_logps` over the labels that count, or their sum over `num_items_in_batch` where that is given; None
    for a model whose own loss is another one."""
    token_logps: Tensor | None = None
    """(B, L) float32, aligned with the labels; natural logarithm."""
    entropy: Tensor | None = None
    """(B, L) of the distribution that each label was drawn from, nats, without gradient; None where it was not asked for."""
    log_sum_squares: Tensor | None = None
    """(B, L) `log sum_v p_v**2`, likewise."""
    is_top1: Tensor | None = None
    """(B, L) bool, whether no other token was likelier, likewise."""
    hidden_states: tuple[Tensor, ...] | None = None
    """As the decoder gives them, where the caller asks with `output_hidden_states=True`."""
    attentions: tuple[Tensor, ...] | None = None
    exact: Exact | None = None
    """Under FSDP2, whose `output_dtype` would round the numbers, what they are put back from; else None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        restore(self)


def linear_logps_head(model: nn.Module, *, extras: Sequence[str] = (), backend: str = "auto") -> None:
    """Make `model(..., labels=...)` return `TokenLogps`. Calling it again changes `extras` and `backend`.

    `labels` are those of transformers: `labels[b, t]` is the token at t, -100 is not scored, position 0 never is.
    Install it before `accelerator.prepare`, DDP or `fully_shard`; PEFT may come before or after.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        extras: names of what `linear_logps` can compute beside: "entropy", "log_sum_squares", "is_top1".
        backend: as for `linear_logps`.

    Raises:
        ModelError: it computes its logits in a way the engine does not (a few tokens are scored both ways; the message holds
            both numbers), it is no causal language model, or it was wrapped already.
        ConfigError: an unknown extra or backend.
    """
    if isinstance(extras, str) or any(name not in EXTRAS for name in extras):
        raise ConfigError(f"extras={extras!r}; expected a tuple of names among {', '.join(EXTRAS)}")
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}; expected one of {', '.join(BACKENDS)}")
    causal = _causal_model(model)
    was_bound = is_bound(causal)
    if was_bound and hasattr(causal, "label_answer"):
        causal.label_answer = replace(causal.label_answer, extras=tuple(extras), backend=backend)
        return
    probe_head(causal)
    bind_scoring(causal)
    # An ordinary attribute, so that copies of the model have it too.
    causal.label_answer = _Answer(extras=tuple(extras), backend=backend, unbind=not was_bound)


def remove_linear_logps_head(model: nn.Module) -> None:
    """A call with labels is the model's own again. A model without the head is left alone."""
    causal = _causal_model(model)
    if not hasattr(causal, "label_answer"):
        return
    unbind = causal.label_answer.unbind
    del causal.label_answer
    if unbind and forest_form(causal) is None:  # it was not prepared for forests since
        unbind_scoring(causal)


def _causal_model(model: Any) -> Any:
    """The causal language model itself, out of PEFT's and DDP's wrappers."""
    inner = model
    while isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner.module
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in inner.peft_config.values()):
            raise ModelError(
                f"{type(inner).__name__} learns a prompt, which puts tokens of its own before the labels; expected LoRA or "
                "another adapter of layers"
            )
        inner = inner.get_base_model()
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise ModelError(
            f"{type(model).__name__} is no causal language model of transformers; expected AutoModelForCausalLM or a PeftModel "
            "around one: call linear_logps_head before other wrappers"
        )
    if hasattr(inner, "_original_forward") and not is_bound(inner):
        raise ModelError(
            f"{type(inner).__name__} was prepared by accelerate with mixed precision, which a head put on top would lose; "
            "call linear_logps_head before accelerator.prepare"
        )
    return inner


@dataclass(frozen=True)
class _Answer:
    """What a call with labels does; no function, so that a model with it can be pickled."""

    extras: tuple[str, ...]
    backend: str
    unbind: bool
    """Whether the forward was bound for this alone."""

    def __call__(self, model: PreTrainedModel, **arguments: Any) -> Any:
        labels = arguments.pop("labels")
        items, as_dict = arguments.pop("num_items_in_batch", None), arguments.pop("return_dict", None)
        _check(model, arguments)
        decoded = decoder_output(model, **arguments)
        hidden = decoded[0]  # (B, L, D)
        if labels.ndim != 2 or hidden.shape[:2] != labels.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)} and the hidden states {tuple(hidden.shape)}; expected labels (B, L) of the "
                "tokens given"
            )
        row, place = (labels[:, 1:] != _IGNORED).nonzero(
            as_tuple=True
        )  # hidden state [row, place] predicts [row, place + 1]
        rows = hidden.reshape(-1, hidden.shape[-1])
        rows = rows.index_select(0, (row * labels.shape[1] + place).to(hidden.device))
        logps, others = head_logps(model, rows, labels[row, place + 1], self.backend, self.extras)

        def aligned(values: Tensor | None) -> Tensor | None:
            """(B, L), and no view: FSDP2 hooks what a forward returns."""
            if values is None:
                return None
            values = values.to(labels.device)
            return values.new_zeros(labels.shape).index_put((row, place + 1), values)

        loss = None
        if _has_the_ordinary_loss(model):
            count: Any = len(logps) if items is None else items
            # Not a Python division: without labels that count it is NaN, as transformers' is.
            loss = -logps.sum() / torch.as_tensor(count, device=logps.device)
        numbers = {"loss": loss, "token_logps": aligned(logps)}
        numbers |= {name: aligned(getattr(others, name)) for name in self.extras}
        found = TokenLogps(
            hidden_states=getattr(decoded, "hidden_states", None),
            attentions=getattr(decoded, "attentions", None),
            exact=exact_under_fsdp(model, **numbers),
            **numbers,
        )
        if as_dict is not False:
            return found
        return tuple(value for value in found.to_tuple() if value is not found.exact)


def _check(model: Any, arguments: dict[str, Any]) -> None:
    """Refuse what a model's own answer to labels would have heeded and this one does not."""
    for name in ("logits_to_keep", "num_logits_to_keep"):
        kept = arguments.get(name)
        if kept is not None and (isinstance(kept, Tensor) or kept != 0):
            raise ValueError(
                f"{name}={kept!r} came with labels; expected none: every label is scored where it is not -100"
            )
    if arguments.get("shift_labels") is not None:
        raise ValueError("shift_labels came with labels; expected labels alone, as the tokens stand")
    router = arguments.get("output_router_logits")
    if router or (router is None and getattr(model.config.get_text_config(), "output_router_logits", False)):
        raise ModelError(
            f"{type(model).__name__} adds a router loss (output_router_logits) to its own, which is not computed here; "
            "set model.config.output_router_logits = False"
        )


def _has_the_ordinary_loss(model: Any) -> bool:
    function = getattr(model, "loss_function", None)
    return function is None or getattr(function, "__name__", "") == "ForCausalLMLoss"
