"""How does a reference follow its policy? Every so many steps it takes on a share of it, as in TR-DPO.

    theta_reference <- alpha * theta + (1 - alpha) * theta_reference

Of a model that trains as a whole, the reference is a frozen copy of it; under LoRA an adapter named "reference" beside the one
that trains, whose factors are mixed one by one: the mixed product is not the mixture of the products, but for alpha = 1.

Source: Gorbatovski et al. 2024, "Learn your reference model for real good alignment", arXiv:2404.09656, eq. 6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_engine.errors import ConfigError
from dpo_engine.losses import Method
from dpo_engine.model.adapters import is_peft_model
from dpo_engine.model.existing_adapters import twin_parameters
from dpo_engine.train.refusals import refuse_sharded

REFERENCE_FILE = "dpo_engine_reference.safetensors"
"""Beside a checkpoint's weights: what the reference was by then."""


def moving_reference(
    method: Method, args: Any, policy: nn.Module, reference: nn.Module | None, accelerator: Accelerator
) -> MovingReference:
    """The reference of a run whose method moves it.

    Raises:
        ConfigError: weights are sharded over ranks, or `reference` is another model than the policy.
    """
    refuse_sharded(accelerator, f"method {method.name}, whose reference is mixed with the policy")
    settings = method.settings(args)
    return MovingReference(
        policy, reference, every=settings["ref_model_sync_steps"], alpha=settings["ref_model_mixup_alpha"]
    )


class MovingReference(TrainerCallback):
    """Moves the reference after every `every` optimiser steps.

    Args:
        policy: the model that trains.
        reference: its copy; None where an adapter named "reference" lies beside the policy's.
        alpha: what share of the policy the reference takes on, in (0, 1].
    """

    def __init__(self, policy: nn.Module, reference: nn.Module | None, *, every: int, alpha: float) -> None:
        self.every, self.alpha = int(every), float(alpha)
        if reference is None:
            assert is_peft_model(policy)
            self.pairs = twin_parameters(policy)
        else:
            self.pairs = _by_name(policy, reference)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move it, if it is time."""
        if state.global_step % self.every == 0:
            self.move()

    def move(self) -> None:
        """Mix a share of the policy into the reference."""
        with torch.no_grad():
            for mine, its in self.pairs.values():
                its.lerp_(mine.detach().to(its.dtype), self.alpha)

    def save(self, folder: Path) -> None:
        """Keep what the reference is now beside a checkpoint."""
        from safetensors.torch import save_file

        tensors = {name: its.detach().cpu().clone().contiguous() for name, (_, its) in self.pairs.items()}
        save_file(tensors, str(folder / REFERENCE_FILE))

    def load(self, folder: Path) -> None:
        """Be what was kept.

        Raises:
            ConfigError: the checkpoint has no reference, or another model's.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / REFERENCE_FILE
        try:
            tensors = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}): the reference of method tr_dpo moves, and without it this "
                "checkpoint cannot be gone on from; take another checkpoint"
            ) from error
        shapes = {name: tuple(its.shape) for name, (_, its) in self.pairs.items()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise ConfigError(f"{path} is the reference of another model; take a checkpoint of this run")
        with torch.no_grad():
            for name, (_, its) in self.pairs.items():
                its.copy_(tensors[name])


def _by_name(policy: nn.Module, reference: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The parameters of both, which must be the same model.

    Raises:
        ConfigError: they are not.
    """
    mine, its = dict(policy.named_parameters()), dict(reference.named_parameters())
    if {name: p.shape for name, p in mine.items()} != {name: p.shape for name, p in its.items()}:
        raise ConfigError(
            "method tr_dpo mixes the policy into its reference, but ref_model has other parameters; expected a model of the same "
            "architecture, or None"
        )
    return {name: (mine[name], its[name]) for name in mine}
