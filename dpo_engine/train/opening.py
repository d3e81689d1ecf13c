"""What does `DPOTrainer` make of the arguments that a script hands it, before any data is looked at?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model.loading import DTYPES, check_model, load_tokenizer, resolve_model
from dpo_engine.train.config import DPOConfig
from dpo_engine.train.trl_names import trl_name
from dpo_engine.train.trl_settle import say_once

ADAPTER_WARNING = (
    "the model has adapters that are not zero, and none named 'reference': the reference is the model below them, as in TRL up to "
    "0.28; TRL from 0.29 on takes a frozen copy of the adapter, which is load_adapter(FOLDER, adapter_name='reference') here"
)
_REFUSED = {
    "data_collator": "batches are forests, which the trainer lays out itself; give rows, of text or token ids",
    "compute_metrics": "it is not used: metrics are the method's own",
    "preprocess_logits_for_metrics": "it is not used: no logits are built",
    "compute_loss_func": "it is not used: the loss is args.method",
    "tokenizer": "use processing_class",
    "model_init": "give the model, or its name",
    "max_target_length": "use max_completion_length in DPOConfig",
    "padding_value": "use pad_token in DPOConfig",
    "label_pad_token_id": "leave it out: there are no labels to pad",
    "is_encoder_decoder": "leave it out: the engine trains causal language models",
    "dataset_map_kwargs": "leave it out: rows are tokenised in one pass",
}
_ELSEWHERE = ("revision", "subfolder", "config")
"""Where one of these is given, the config is not the one that `check_model` would read."""


def refuse_arguments(given: dict[str, Any]) -> None:
    """Raise a `ConfigError` for the first of these arguments that is not None."""
    for name, value in given.items():
        if value is None:
            continue
        if name in _REFUSED:
            raise ConfigError(f"DPOTrainer: {name} is given; {_REFUSED[name]}")
        in_config = name in DPOConfig.__dataclass_fields__ or trl_name(name) is not None
        hint = f"it is one of DPOConfig's: args=DPOConfig({name}=...)" if in_config else "leave it out"
        raise ConfigError(f"DPOTrainer: {name} is not an argument; {hint}")


def checked_args(args: Any, model: Any) -> DPOConfig:
    """The configuration; for None one that writes to `MODEL-DPO` in the working folder, as TRL's.

    Raises:
        ConfigError: it is something else.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        return DPOConfig(output_dir=f"{str(name).rstrip('/').split('/')[-1] or 'model'}-DPO")
    if not isinstance(args, DPOConfig):
        kind = type(args)
        raise ConfigError(
            f"DPOTrainer: args is a {kind.__module__.split('.')[0]}.{kind.__name__}; expected the DPOConfig of dpo_engine: "
            "from dpo_engine import DPOConfig, DPOTrainer"
        )
    return args


def open_models(
    model: nn.Module | str, ref_model: nn.Module | str | None, args: DPOConfig, quantization_config: Any
) -> tuple[nn.Module, nn.Module | None]:
    """Policy and reference, of which those that are names are loaded.

    Raises:
        ConfigError: a model is neither, or what is for loading it is given beside a model object.
        ModelError: there is no such model.
    """
    options = args.model_init_kwargs
    assert not isinstance(options, str) and not isinstance(
        args.ref_model_init_kwargs, str
    )  # TrainingArguments parsed them
    if isinstance(model, str):
        model = open_model(model, options, quantization_config)
    elif not isinstance(model, nn.Module):
        raise ConfigError(f"DPOTrainer: model is {model!r}; expected a model object, or the name of one")
    else:
        for name, value in (("model_init_kwargs", options), ("quantization_config", quantization_config)):
            if value is not None:
                raise ConfigError(
                    f"DPOTrainer: {name} is given, and model is loaded already; load it with them, or give its name"
                )
    if isinstance(ref_model, str):
        return model, open_model(ref_model, args.ref_model_init_kwargs)
    if args.ref_model_init_kwargs is not None:
        raise ConfigError(
            "DPOTrainer: ref_model_init_kwargs are given, and ref_model is no name; expected ref_model='...'"
        )
    return model, ref_model


def say_of_routers(model: PreTrainedModel) -> None:
    """A mixture's balancing loss, which TRL adds, is not part of any method."""
    config = model.config.get_text_config()
    if getattr(config, "router_aux_loss_coef", 0.0) and hasattr(config, "output_router_logits"):
        say_once(
            f"the router's balancing loss is not added (TRL from 1.8 on adds {config.router_aux_loss_coef} of it unless "
            "router_aux_loss_coef is 0)"
        )


def open_model(name: str, options: dict[str, Any] | None, quantization_config: Any = None) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained(name, **options)`, in float32 unless `options` has a dtype.

    Args:
        name: a model folder, a hub id, or the word smollm2.
        options: what `from_pretrained` is told: `dtype` (or `torch_dtype`) as a torch dtype or its name, `revision`, ...
        quantization_config: one more of them.

    Raises:
        ConfigError: an option that `from_pretrained` does not take, a dtype that is none, or code from elsewhere is asked for.
        ModelError: there is no such model, or it is not a causal language model.
    """
    options = {name: value for name, value in (options or {}).items() if value is not None}
    if "torch_dtype" in options:
        options.setdefault("dtype", options.pop("torch_dtype"))
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ConfigError(
                "DPOTrainer: quantization_config is given twice, also in model_init_kwargs; expected it once"
            )
        options["quantization_config"] = quantization_config
    options["dtype"] = _dtype(options.get("dtype", torch.float32))
    if options.pop("trust_remote_code", False):
        raise ConfigError(
            "model_init_kwargs: trust_remote_code=True; expected false: the engine runs no code that comes with a model; where "
            "you trust it, load the model yourself and pass it"
        )
    if options.get("use_kernels") or "/" in str(options.get("attn_implementation", "")):
        raise ConfigError(
            "model_init_kwargs: use_kernels, or an attn_implementation from a repository, would fetch code and run it; expected "
            "neither: where you trust it, load the model yourself and pass it"
        )
    path = resolve_model(name)
    if not any(key in options for key in _ELSEWHERE):
        check_model(path)
    try:
        return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, trust_remote_code=False, **options)
    except TypeError as error:
        raise ConfigError(f"model_init_kwargs={sorted(options)}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error


def open_tokenizer(model: nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model, as its config names the place; None where it names none.

    Raises:
        ModelError: the place has no tokenizer.
    """
    place = getattr(getattr(model, "config", None), "_name_or_path", "")
    return load_tokenizer(place) if place else None


def set_pad_token(tokenizer: PreTrainedTokenizerBase | None, pad_token: str | None) -> None:
    """Give the tokenizer this padding token.

    Raises:
        ConfigError: it is not in its vocabulary.
    """
    if pad_token is None or tokenizer is None:
        return
    if pad_token not in tokenizer.get_vocab():
        raise ConfigError(
            f"pad_token={pad_token!r} is not in the tokenizer's vocabulary; expected one of its tokens, or none"
        )
    tokenizer.pad_token = pad_token


def without_dropout(*models: nn.Module | None) -> int:
    """Set the probability of every `nn.Dropout` to 0; how many it was above 0 in."""
    found = 0
    for model in models:
        for module in [] if model is None else model.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                module.p = 0.0
                found += 1
    return found


def _dtype(given: Any) -> Any:
    if given == "auto" or isinstance(given, torch.dtype):
        return given
    if given not in DTYPES:
        raise ConfigError(
            f"model_init_kwargs: dtype={given!r}; expected a torch dtype, auto, or one of {', '.join(DTYPES)}"
        )
    return DTYPES[given]
