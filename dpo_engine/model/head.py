"""What turns a model's hidden states into its logits?

    logits = softcap(logit_scale * (hidden @ weight.T + bias))        softcap(x) = softcap * tanh(x / softcap)

The weight and the bias are the model's output embeddings. The scale and the softcap are read from its config, under the names
that transformers' causal models give them. Reading can be wrong (a new model, a new name), so `probe` checks it against the
model's own logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dpo_engine.errors import ModelError

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


def head_of(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """`(weight (V, D), bias (V,) or None)` of the model's output embeddings: the parameters themselves, not copies.

    Raises:
        ModelError: the output embeddings are not a plain linear layer (adapters on the head, a quantised head, several heads).
    """
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise ModelError(
            f"{type(model).__name__}: its head carries an adapter ({type(head).__name__}); "
            "adapters on the head are not supported yet: leave lm_head out of target_modules and modules_to_save"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or weight is None or weight.ndim != 2 or not weight.is_floating_point():
        given = "nothing" if head is None else type(head).__name__
        kind = "" if weight is None else f" with a weight of {weight.dtype} {tuple(weight.shape)}"
        raise ModelError(
            f"{type(model).__name__}: its head is {given}{kind}; expected torch.nn.Linear with a floating-point (V, D) weight: "
            "use a model with a plain, unquantised head"
        )
    return weight, head.bias
