"""How are LoRA adapters put on a model, and what lies under them?

policy = add_lora(model, r=16, alpha=32, target_modules="all-linear", dropout=0.0)
with reference_of(policy) as reference:         # the model that the adapters started from
    out = reference(...)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_engine.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
REFERENCE = "reference"
"""The adapter of this name is the reference, where a PeftModel has one."""


def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: float = 32,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    head: bool = False,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> PeftModel:
    """`x @ W.T + (alpha / r) * dropout(x) @ A.T @ B.T` in the chosen layers; A and B train in float32, W is frozen.

    B starts at zero, so the model's outputs are unchanged until the first step.

    Args:
        model: a causal language model; its weights are frozen and keep their dtype.
        r: rank, at least 1.
        alpha: numerator of the scale `alpha / r`.
        target_modules: names of linear layers (`q_proj`, ..., `lm_head`), or "all-linear" for every one of the decoder: not
            the head, and no image tower, which no pair of text goes through.
        dropout: probability in [0, 1).
        head: an adapter on the head too.
        use_dora: the sum's columns are scaled to lengths that train (peft's DoRA); not on the head.
        use_rslora: the scale is `alpha / sqrt(r)`.

    Raises:
        ConfigError: a value out of range, a layer that the model does not have, or a head that is tied to the embeddings.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if r < 1:
        raise ConfigError(f"lora_r={r}; expected at least 1 (0 trains every parameter, without LoRA)")
    if not alpha > 0:
        raise ConfigError(f"lora_alpha={alpha}; expected a positive number")
    if not 0 <= dropout < 1:
        raise ConfigError(f"lora_dropout={dropout}; expected a number in [0, 1)")
    if head:
        layers = _all_linear(model) if target_modules == ALL_LINEAR else target_modules
        target_modules = [*([layers] if isinstance(layers, str) else layers), _head_name(model)]
    named_by = "lora_head" if head else "lora_target_modules"
    targets = target_modules if target_modules == ALL_LINEAR else _checked_targets(model, target_modules, named_by)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        use_dora=use_dora,
        use_rslora=use_rslora,
        exclude_modules=(_beside_decoder(model) or None) if targets == ALL_LINEAR else None,
    )
    return get_peft_model(model, config)  # casts the adapters to float32


def _all_linear(model: PreTrainedModel) -> list[str]:
    """The full names of every linear layer of the decoder."""
    head, beside = model.get_output_embeddings(), set(_beside_decoder(model))
    return [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and name not in beside
    ]


def _beside_decoder(model: PreTrainedModel) -> list[str]:
    """The full names of linear layers that are neither of the text decoder nor the head: those of an image tower, say."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(module) for module in ([] if decoder is None else decoder.modules())}
    found = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    outside = [name for name in found if id(model.get_submodule(name)) not in inside]
    return outside if len(outside) < len(found) else []  # a model that names no decoder of its own


def _head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head and head is not None]
    if not names:
        raise ConfigError(f"lora_head: {type(model).__name__} has no head that an adapter can be put on; leave it out")
    return names[0]


def _checked_targets(model: PreTrainedModel, target_modules: str | Sequence[str], named_by: str) -> list[str]:
    """The names as a list, each one the end of a linear layer's path. peft itself is content if any one of them is found."""
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    head = model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if not names:
        raise ConfigError(f"lora_target_modules is empty; expected names of layers, or {ALL_LINEAR!r}")
    for name in names:
        hit = [module for path, module in found.items() if path == name or path.endswith(f".{name}")]
        if any(module is head for module in hit) and head.weight is model.get_input_embeddings().weight:
            raise ConfigError(
                f"{named_by} names the head ({name!r}), and this model's head is tied to its input embeddings: merging "
                "such an adapter would change both, and the merged model would be another one; leave the head out"
            )
        if not hit:
            known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in found}))
            raise ConfigError(
                f"lora_target_modules names {name!r}, which is no linear layer of this model; it has {known}"
            )
    return names


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


@contextmanager
def reference_of(model: nn.Module) -> Iterator[nn.Module]:
    """The reference policy: `model` without its adapters, or with the one named "reference" in place of those that train; in eval
    mode (dropout off), without gradients.

    On the way out, also after an exception, every submodule is in the mode it was in, every parameter requires grad as it
    did, and adapters are enabled and active if they were.

    Args:
        model: a PeftModel; or a model of which no parameter trains, which is a reference already.

    Raises:
        ModelError: a parameter trains that is not an adapter: what lies under the adapters would move with it.
    """
    disable = getattr(model, "disable_adapter", nullcontext)
    training = [(module, module.training) for module in model.modules()]
    # disable_adapter freezes the adapters and, on its way out, unfreezes all of the active one, also what was frozen before.
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        beside = _reference_adapter(model) if has_reference_adapter(model) else nullcontext()
        with disable(), torch.no_grad():
            moving = next((name for name, parameter in model.named_parameters() if parameter.requires_grad), None)
            if moving is not None:
                raise ModelError(
                    f"{type(model).__name__} trains {moving}, which is no adapter, so no fixed reference lies under it; "
                    "freeze it, or give a frozen copy of the model as the reference"
                )
            with beside:
                yield model
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, flag in required_grad:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def _reference_adapter(model: Any) -> Iterator[None]:
    """Where adapters are off: within it, the one named "reference" is on, and no other."""
    tuner = model.base_model
    active, named = list(tuner.active_adapters), tuner.active_adapter
    tuner.enable_adapter_layers()
    tuner.set_adapter(REFERENCE)
    try:
        yield
    finally:
        tuner.set_adapter(active)
        tuner.active_adapter = named
        tuner.disable_adapter_layers()  # as around this


def has_reference_adapter(model: nn.Module) -> bool:
    """Whether `model`, a PeftModel or the model in one, has an adapter that is the reference."""
    return REFERENCE in getattr(model, "peft_config", {})


def is_peft_model(model: nn.Module) -> bool:
    """Whether `model` carries adapters that can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def refuse_prompt_learning(model: nn.Module) -> None:
    """Adapters that put tokens before the prompt, or switch on at some token, do not know where a forest's prompts begin.

    Raises:
        ModelError: the model has such adapters.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None):
            raise ModelError(
                f"the adapter {name!r} is a {type(config).__name__} that depends on where a prompt begins in its row; the engine "
                "lays many prompts in one row: use LoRA or another adapter of weights"
            )


def adapters_are_zero(model: nn.Module) -> bool:
    """Whether the active LoRA adapters change nothing yet, so that the policy is its own reference.

    False too for adapters of another kind, of which that cannot be read.
    """
    second = [
        parameter for name, parameter in model.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name
    ]
    others = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    return bool(second) and not others and not any(bool(parameter.any()) for parameter in second)
