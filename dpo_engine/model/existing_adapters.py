"""How does training go on from an adapter that exists?

policy = continue_adapter(model, folder)      it trains on; a frozen copy of it, named "reference", is the reference
model = merge_adapter(model, folder)          it becomes part of the base, for a new adapter on top
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model.adapters import REFERENCE, adapters_are_zero, has_reference_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(folder: str | Path) -> LoraConfig:
    """The config of a LoRA adapter in a folder; its weights are not read.

    Raises:
        ModelError: the folder holds none that can be used.
    """
    from peft import LoraConfig

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ModelError(f"adapter={folder}: no such folder; expected one with {CONFIG} and {WEIGHTS}")
    try:
        raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = raw["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"adapter={folder}: is not an adapter ({CONFIG}: {type(error).__name__}); expected a folder that PEFT or this engine "
            "saved an adapter to"
        ) from error
    if kind != "LORA":
        raise ModelError(
            f"adapter={folder}: is an adapter of kind {kind}; expected LORA: merge it into its model first"
        )
    if not (path / WEIGHTS).is_file():
        raise ModelError(f"adapter={folder}: has no {WEIGHTS}; other formats are not read (a pickle can run code)")
    try:
        return LoraConfig.from_pretrained(str(path))
    except (TypeError, ValueError, ImportError) as error:
        raise ModelError(f"adapter={folder}: its {CONFIG} cannot be used ({_one_line(error)})") from error


def continue_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The model with the adapter on it, to train on, and a frozen copy of the adapter as the reference.

    Raises:
        ModelError: it is no adapter, or not one for this model.
    """
    begun = read_adapter(folder).init_lora_weights
    if begun not in (True, False, "gaussian"):
        raise ModelError(
            f"adapter={folder}: began by changing the model's own weights (init_lora_weights={begun!r}), which a second adapter "
            "beside it would do again; expected one that began at zero: merge it first (dpo-engine export ADAPTER --merge)"
        )
    policy = _with_adapter(model, folder)
    policy.add_adapter(REFERENCE, copy.deepcopy(policy.peft_config["default"]))
    _load(policy, folder, REFERENCE)
    freeze_reference_adapter(policy)
    return policy


def merge_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The model with the adapter added to its weights, layer by layer, in their dtype; frozen.

    Raises:
        ModelError: it is no adapter, not one for this model, or its weights are not finite.
    """
    try:
        merged: Any = _with_adapter(model, folder).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"adapter={folder}: cannot be merged ({_one_line(error)})") from error
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(False).eval()


def freeze_reference_adapter(model: nn.Module) -> None:
    """See to it that an adapter named "reference" is the reference, and does not train.

    Raises:
        ConfigError: it is the one that trains.
    """
    if not has_reference_adapter(model):
        return
    if REFERENCE in model.active_adapters:  # type: ignore[operator]
        raise ConfigError(
            f"the adapter {REFERENCE!r} is the reference by its name, and it is active; call set_adapter with the one that trains"
        )
    for name, parameter in model.named_parameters():
        if _is_of(name, REFERENCE):
            parameter.requires_grad_(False)


def starts_at_reference(model: nn.Module) -> bool:
    """Whether a PeftModel says what its reference says: its adapters are zero, or equal the one named "reference"."""
    if not has_reference_adapter(model):
        return adapters_are_zero(model)
    policy: Any = model
    active = list(policy.active_adapters)
    if len(active) != 1:
        return False
    mine, its = _adapter_parameters(model, active[0]), _adapter_parameters(model, REFERENCE)
    alike = mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    configs = policy.peft_config
    scales = [[getattr(configs[of], key) for key in ("r", "lora_alpha", "use_rslora")] for of in (active[0], REFERENCE)]
    return alike and scales[0] == scales[1]


def add_reference_adapter(model: nn.Module) -> None:
    """Put a frozen copy of the adapter that trains beside it, named "reference", unless there is one.

    Raises:
        ConfigError: several adapters are active, or the one that is changed the model's own weights when it began.
    """
    policy: Any = model
    active = list(policy.active_adapters)
    if len(active) != 1:
        raise ConfigError(
            f"the adapters {', '.join(active) or '(none)'} are active; expected one, of which the reference is a copy"
        )
    if has_reference_adapter(model):
        return
    config = copy.deepcopy(policy.peft_config[active[0]])
    if getattr(config, "init_lora_weights", None) not in (True, False, "gaussian"):
        raise ConfigError(
            f"the adapter began by changing the model's own weights ({config.init_lora_weights=}), which a second "
            "one beside it would do again; expected one that began at zero"
        )
    policy.add_adapter(REFERENCE, config)
    with torch.no_grad():
        for mine, its in twin_parameters(policy).values():
            its.data = mine.detach().clone()  # its dtype and device too
    policy.set_adapter(active[0])
    freeze_reference_adapter(policy)


def twin_parameters(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The parameters of the adapter that trains, each with that of the adapter named "reference".

    Raises:
        ConfigError: the two are not built alike.
    """
    policy: Any = model
    [active] = policy.active_adapters
    mine, its = _adapter_parameters(model, active), _adapter_parameters(model, REFERENCE)
    if {name: p.shape for name, p in mine.items()} != {name: p.shape for name, p in its.items()}:
        raise ConfigError(f"the adapters {active!r} and {REFERENCE!r} are not built alike; expected a copy")
    return {name: (mine[name], its[name]) for name in mine}


def _adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """By name, a star in the place of the adapter's own."""
    return {
        ".".join("*" if part == adapter else part for part in name.split(".")): parameter
        for name, parameter in model.named_parameters()
        if _is_of(name, adapter)
    }


@contextmanager
def without_reference_adapter(model: nn.Module | None) -> Iterator[None]:
    """Within it, PEFT saves the other adapters only."""
    if model is None or not has_reference_adapter(model):
        yield
        return
    policy: Any = model
    others = [name for name in policy.peft_config if name != REFERENCE]
    # Its entry must stay where it is: PEFT leaves out the weights of adapters that it knows by name.
    policy.save_pretrained = partial(policy.save_pretrained, selected_adapters=others)
    try:
        yield
    finally:
        del policy.save_pretrained


_OF_ADAPTERS = ("modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")


def _is_of(name: str, adapter: str) -> bool:
    """Whether a parameter is one of an adapter's."""
    parts = name.split(".")
    return any(
        parts[at + 1] == adapter and (parts[at].startswith("lora_") or parts[at] in _OF_ADAPTERS)
        for at in range(len(parts) - 1)
    )


def _with_adapter(model: PreTrainedModel, folder: str | Path) -> Any:
    from peft import get_peft_model

    config = read_adapter(folder)
    config.inference_mode = False
    try:
        policy = get_peft_model(model, config)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise _misfit(folder, model, _one_line(error)) from error
    _load(policy, folder, "default")
    return policy


def _load(policy: Any, folder: str | Path, name: str) -> None:
    """The adapter's weights, every one of which must have its place."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(Path(folder).expanduser() / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapter={folder}: its {WEIGHTS} cannot be read ({_one_line(error)})") from error
    frozen = dict(policy.named_parameters())
    for key in [key for key in found if key in frozen]:  # peft saves a layer of embeddings, or a head, with its adapter
        if not _equal(found.pop(key), frozen[key]):
            raise _misfit(folder, policy.get_base_model(), f"{key} is another than the model's")
    wanted = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    for key in sorted({*found, *wanted}):
        has, needs = (tuple(some[key].shape) if key in some else None for some in (found, wanted))
        if has != needs:
            how = (
                "is not in the adapter"
                if has is None
                else "has no place"
                if needs is None
                else f"is {has}, not {needs}"
            )
            raise _misfit(folder, policy.get_base_model(), f"{key} {how}")
    set_peft_model_state_dict(policy, found, adapter_name=name)


def _equal(saved: Tensor, own: Tensor) -> bool:
    """Whether two tensors are one, of which either may have been loaded in a narrower dtype."""
    narrow = min(saved.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return saved.shape == own.shape and torch.equal(saved.to(own.device, narrow), own.to(narrow))


def _misfit(folder: str | Path, model: Any, why: str) -> ModelError:
    return ModelError(
        f"adapter={folder}: does not fit {type(model).__name__} ({why}); expected an adapter of this very model: give the model "
        "that it was trained on"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
