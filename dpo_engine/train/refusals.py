"""What can a method not be trained with? Said before anything is trained."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from dpo_engine.errors import ConfigError
from dpo_engine.losses import Method
from dpo_engine.model.head import head_of, read_head_transform
from dpo_engine.train.config import DPOConfig


def refuse_reference(method: Method, ref_model: Any, reference_cache: Any, args: DPOConfig) -> None:
    """Refuse what a method without a reference, or with one that cannot be known beforehand, would not use.

    Raises:
        ConfigError: a second model for a method that asks none, or a cache that would hold nothing.
    """
    if ref_model is not None and not method.needs_reference:
        raise ConfigError(f"DPOTrainer: ref_model came to method {method.name}, which needs no reference; leave it out")
    if method.known_beforehand or not method.needs_reference:
        return
    why = "moves with the policy" if method.moving_reference else "is asked for whole distributions"
    asked = {
        "reference_cache": reference_cache
        or (args.reference_cache if args.reference_cache not in ("auto", "off") else None),
        "precompute_ref_log_probs": args.precompute_ref_log_probs or None,
    }
    for name, given in asked.items():
        if given is not None:
            raise ConfigError(
                f"{name}={given!r}, but the reference of method {method.name} {why}, so nothing of it can be kept; leave it out"
            )


def check_token_kl(model: PreTrainedModel, reference: PreTrainedModel | None, accelerator: Accelerator) -> None:
    """Refuse models whose heads cannot be met in one operator call, before a method that needs that is trained.

    Raises:
        ConfigError: the head has an adapter, the reference's is of another size or makes other logits, or weights are sharded.
    """
    if head_of(model).branches or (reference is not None and head_of(reference).branches):
        raise ConfigError(
            "method tdpo compares whole distributions, and cannot follow an adapter on the LM head; set lora_head: false, or "
            "leave the head out of lora_target_modules"
        )
    if reference is not None:
        heads = [(vocabulary_of(one), read_head_transform(one.config)) for one in (model, reference)]
        if heads[0] != heads[1]:
            raise ConfigError(
                f"method tdpo meets two heads in one call; model's is {heads[0]}, ref_model's {heads[1]}; expected the same"
            )
    refuse_sharded(accelerator, "method tdpo, which meets the heads of policy and reference in one operator call")


def refuse_sharded(accelerator: Accelerator, what: str) -> None:
    """Raise a `ConfigError` where ranks hold parts of the weights."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError(
            f"weights are sharded ({accelerator.distributed_type.value}); expected one process or DDP with {what}"
        )


def vocabulary_of(model: PreTrainedModel) -> int:
    """Rows of the head."""
    head = head_of(model)
    return int(model.config.get_text_config().vocab_size if head.is_quantised else head.weight.shape[0])
