"""Does every parameter that is to train get a gradient? Asked once, in the first step: what gets none never trains, in silence."""

from __future__ import annotations

from torch import Tensor, nn

from dpo_engine.errors import TrainingError

_SHOWN = 5
_EXPERT = ".experts."
"""In the name of a parameter that only the tokens routed to it give a gradient."""


def check_graph(objective: Tensor, model: nn.Module) -> None:
    """Refuse an objective that no parameter takes part in, before its backward pass.

    Raises:
        TrainingError: it has no gradient.
    """
    if not objective.requires_grad:
        raise _refusal([name for name, parameter in model.named_parameters() if parameter.requires_grad], model)


def check_gradients(model: nn.Module) -> None:
    """Refuse a model of which parameters that require a gradient have none, after the backward passes of a step.

    Experts of a mixture are excused: that no token of a step was routed to one is no fault.

    Raises:
        TrainingError: names some of them, and what to do.
    """
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and _EXPERT not in name
    ]
    if without:
        raise _refusal(without, model)


def _refusal(without: list[str], model: nn.Module) -> TrainingError:
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    shown = ", ".join(without[:_SHOWN]) + (", ..." if len(without) > _SHOWN else "")
    return TrainingError(
        f"{len(without)} of {trainable} trainable parameters got no gradient in the first step, and would never train: "
        f"{shown or 'nothing requires a gradient'}; expected one for each. If their layers are not used in scoring, give "
        "lora_target_modules without them, or freeze them; if layers are checkpointed, use the kind that needs no inputs with "
        "gradients: gradient_checkpointing_kwargs: {use_reentrant: false}"
    )
