"""What turns a model's hidden states into its logits?

    logits = softcap(logit_scale * (hidden @ weight.T + bias))        softcap(x) = softcap * tanh(x / softcap)

The weight and the bias are the model's output embeddings, and LoRA on them adds to the products. The scale and the softcap
are read from its config, under the names that transformers' causal models give them. Reading can be wrong (a new model, a
new name), so `probe` checks it against the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_engine.errors import ModelError
from dpo_engine.ops.weights import is_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class HeadTransform:
    """What is done to `hidden @ weight.T + bias`."""

    logit_scale: float = 1.0
    """Multiplies, before the softcap."""
    softcap: float | None = None
    """None for no softcap."""


# Every name under which a causal model of transformers 5.23 scales its logits.
MULTIPLIERS = (
    "logit_scale",  # Cohere, Cohere2, Cohere2-MoE, Cohere Compass
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
)
DIVISORS = (
    "logits_scaling",  # Granite and its MoE, hybrid, shared and vision kin; MiniCPM3, where it divides the hidden state
    "logits_mup_width_multiplier",  # Inkling, where it divides the hidden state
)
SOFTCAPS = (
    "final_logit_softcapping",  # Gemma 2, 3, 3n, 4, VaultGemma, NanoChat, Beam, Inkling 2, Muse, Mistral Large 4
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)
# Models that use one of these names for something else, by model_type: the factor they multiply by.
EXCEPTIONS = {
    ("hyperclovax", "logits_scaling"): lambda value: float(value),  # multiplies where Granite divides
    ("mpt", "logit_scale"): lambda value: 1.0,  # kept in the config, used by nothing
}


def read_head_transform(config: PreTrainedConfig) -> HeadTransform:
    """The scale and the softcap that `config` names; of its text part, where it has several.

    Raises:
        ModelError: a value that is not a positive number.
    """
    text = config.get_text_config()
    scale = 1.0
    for name in (*MULTIPLIERS, *DIVISORS):
        value = getattr(text, name, None)
        if value is None:
            continue
        if (exception := EXCEPTIONS.get((text.model_type, name))) is not None:
            scale *= exception(value)
        else:
            number = _positive(text, name, value)
            scale *= number if name in MULTIPLIERS else 1.0 / number
    softcaps = [(name, getattr(text, name)) for name in SOFTCAPS if getattr(text, name, None) is not None]
    return HeadTransform(logit_scale=scale, softcap=_positive(text, *softcaps[0]) if softcaps else None)


def _positive(config: PreTrainedConfig, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ModelError(f"model config {config.model_type!r} has {name}={value!r}; expected a positive number")
    return float(value)


@dataclass(frozen=True)
class LoraBranch:
    """One active LoRA adapter on the head: adds `scaling * B(A(dropout(hidden)))` to the products."""

    a: nn.Module  # (D) -> (r)
    b: nn.Module  # (r) -> (V)
    dropout: nn.Module
    scaling: float


@dataclass(frozen=True)
class ModelHead:
    """A model's output embeddings: the parameters themselves, not copies."""

    weight: Tensor
    """(V, D); or as bitsandbytes packs it."""
    bias: Tensor | None
    """(V,)."""
    shape: tuple[int, int]
    """(V, D)."""
    branches: tuple[LoraBranch, ...] = ()
    """The adapters that are on."""

    @property
    def is_quantised(self) -> bool:
        return is_quantised(self.weight)

    @property
    def trains(self) -> bool:
        """Whether the weight or the bias takes a gradient; adapters do not count."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def lora(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `linear_logps` adds: `(scaling * A(dropout(hidden)), B)`, adapters side by side; None without any.

        Args:
            hidden: (N, D).

        Returns:
            (N, r) and (V, r), r over all adapters; in the dtype of `hidden`, or under autocast in that of A's product.
        """
        if not self.branches:
            return None
        autocast = torch.is_autocast_enabled(hidden.device.type)
        inner: list[Tensor] = []
        outer: list[Tensor] = []
        for branch in self.branches:
            weight: Any = branch.b.weight
            # As PEFT does: the adapter's own dtype, unless autocast chooses; then widening first would change nothing.
            as_it_is = autocast and len(self.branches) == 1 and isinstance(branch.dropout, nn.Identity)
            product = branch.a(branch.dropout(hidden if as_it_is else hidden.to(weight.dtype))) * branch.scaling
            inner.append(product if autocast else product.to(hidden.dtype))
            outer.append(weight if autocast else weight.to(hidden.dtype))
        return torch.cat(inner, -1), torch.cat(outer, -1)


def head_of(model: PreTrainedModel) -> ModelHead:
    """The model's output embeddings as they are now: with the adapters that are active, without those that are disabled.

    Raises:
        ModelError: the output embeddings are not a linear layer (several heads, an adapter other than LoRA).
    """
    layer: Any = model.get_output_embeddings()
    branches: tuple[LoraBranch, ...] = ()
    if hasattr(layer, "original_module"):
        layer = _trained_copy(model, layer)
    if hasattr(layer, "base_layer"):
        branches = _branches(model, layer)
        layer = layer.base_layer
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear) and weight is not None:
        state: Any = getattr(layer, "state", None)
        if state is not None and getattr(weight, "SCB", None) is None:
            weight.SCB = state.SCB  # the first forward of an 8-bit layer moves its scales from the weight to there
        if is_quantised(weight):
            return ModelHead(weight, layer.bias, (layer.out_features, layer.in_features), branches)
        if weight.ndim == 2 and weight.is_floating_point():
            return ModelHead(weight, layer.bias, (weight.shape[0], weight.shape[1]), branches)
    given = "nothing" if layer is None else type(layer).__name__
    kind = "" if weight is None else f" with a weight of {weight.dtype} {tuple(weight.shape)}"
    raise ModelError(
        f"{type(model).__name__}: its head is {given}{kind}; expected torch.nn.Linear with a floating-point (V, D) weight, "
        "or one that bitsandbytes quantised: use a model with such a head"
    )


def modules_to_call(model: PreTrainedModel) -> list[nn.Module]:
    """The head's modules whose parameters are there only while they are called, outermost first; mostly none.

    Those that `fully_shard` wrapped on their own, whose parameters DeepSpeed's third stage shares out, or that accelerate
    offloads. Any other head is read without calling it: a hook on it would be given log-probs instead of logits.
    """
    layer: Any = model.get_output_embeddings()
    return [
        part
        for name, part in layer.named_modules()
        # `ModelHead.lora` calls these itself.
        if not {"lora_A", "lora_dropout"} & set(name.split(".")) and _comes_with_a_call(part)
    ]


def called_through(modules: Sequence[nn.Module], function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """`function(hidden)` while each of `modules` is being called, hooks and all, with `function` for their own forward.

    The hooks bring the parameters before it, and before its backward pass, and reduce the gradients after that.
    """
    if not modules:
        return function(hidden)
    module: Any = modules[0]
    # accelerate's own replacement of forward, which does what its hooks are for, calls this attribute.
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    before = vars(module).get(name)
    setattr(module, name, lambda rows: called_through(modules[1:], function, rows))
    try:
        return module(hidden)
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _comes_with_a_call(module: nn.Module) -> bool:
    if hasattr(module, "_hf_hook") or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
        return True
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _trained_copy(model: PreTrainedModel, wrapper: Any) -> Any:
    """The copy that PEFT's `modules_to_save` trains in place of the head; the head itself where adapters are off."""
    if not hasattr(wrapper, "modules_to_save"):
        raise ModelError(
            f"{type(model).__name__}: its head is wrapped in a {type(wrapper).__name__}, which the engine cannot follow; "
            "leave the head out of trainable_token_indices"
        )
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[wrapper.active_adapters[0]]


def _branches(model: PreTrainedModel, layer: Any) -> tuple[LoraBranch, ...]:
    """The adapters of a PEFT layer that add to the products of its base layer."""
    if not hasattr(layer, "lora_A"):
        raise ModelError(
            f"{type(model).__name__}: its head carries an adapter of another kind than LoRA "
            f"({type(layer).__module__.split('.')[-2]}); leave lm_head out of its target_modules"
        )
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward does
    if layer.disable_adapters or layer.merged:
        return ()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        variant = layer.lora_variant.get(name)
        special = "lora_bias" if layer.lora_bias.get(name) else None if variant is None else type(variant).__name__
        if special:
            raise ModelError(
                f"{type(model).__name__}: the adapter {name!r} on its head is not plain LoRA ({special}): it does more than "
                "add B A x to the products, which the engine cannot follow; set lora_head: false (leave lm_head out of its "
                "target_modules), or use_dora: false"
            )
    return tuple(
        LoraBranch(layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], float(layer.scaling[name]))
        for name in names
    )
