"""How does the name of a model become a model that the engine may train?

    path = resolve_model(name)                              a folder, a hub id, or the word smollm2
    config = check_model(path)                              cheap: reads the config, refuses what cannot work
    model = load_model(path, dtype=..., trainable=...)      reads the weights
    tokenizer = load_tokenizer(path)

Nothing that comes with a model is run: weights are safetensors, and a config that needs code of its own is refused.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model.smollm2 import smollm2_folder
from dpo_engine.ops.plan import cpu_multiplies_bfloat16

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "smollm2"
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_ATTENTIONS = ("eager", "sdpa", "flex_attention")  # others can fetch a kernel
_IMPLEMENTATIONS = {
    f"{underscore}{kind}_implementation{internal}"
    for underscore in ("", "_")
    for kind in ("attn", "experts")
    for internal in ("", "_internal")
}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json", "*.tiktoken")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def resolve_model(name: str, *, progress: Callable[[str], object] = print) -> str:
    """What `from_pretrained` should be given for `name`.

    Args:
        name: a model folder, a hub id (`owner/model`), or the word `smollm2` for the packaged SmolLM2-135M-Instruct (a folder
            of that name is `./smollm2`).
        progress: called with a line of text if the packaged model must be made first.

    Returns:
        The folder's path, or the hub id as it was given: whether the hub has it is known when its config is read.

    Raises:
        ModelError: no such folder, a file, or a folder that is not a model.
    """
    if name == PACKAGED:
        return str(smollm2_folder(progress=progress))
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_file():
        raise ModelError(f"model {name!r} is a file; expected a model folder, a hub id, or {PACKAGED!r}")
    if name.startswith((".", "~")) or path.is_absolute() or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model {name!r}: no such folder; give a model folder, a hub id (owner/model), or {PACKAGED!r}"
        )
    return name


def _check_folder(folder: Path) -> None:
    """A folder must hold a config.json, and no adapter: transformers would follow that to another model."""
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        raise ModelError(
            f"model folder {folder} holds a PEFT adapter (adapter_config.json); "
            "give the model it was trained from, or merge it into that model first"
        )
    if "config.json" not in names:
        shown = _first(names, 8) or "nothing"
        raise ModelError(f"model folder {folder} has no config.json; it holds {shown}; expected a saved model")


def check_model(path: str) -> PreTrainedConfig:
    """The config of a causal language model, before any weight is read.

    Args:
        path: what `resolve_model` returned.

    Raises:
        ModelError: the config cannot be read, asks for remote code or a fetched kernel, or is not of a causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        raw, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(_unreadable(path, "config", error)) from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise ModelError(
            f"model {path}: its config.json names no model_type; expected the config of a transformers model"
        )
    if model_type not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise ModelError(
                f"model {path} needs code of its own to be run (auto_map in its config.json); the engine runs no code that "
                "comes with a model: use a model that transformers implements"
            )
        raise ModelError(
            f"model {path}: model_type {model_type!r} is not one that the installed transformers knows; upgrade it"
        )
    _refuse_fetched_kernels(path, raw)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(_unreadable(path, "config", error)) from error
    _check_causal(path, config)
    return config


def _refuse_fetched_kernels(path: str, raw: dict[str, Any]) -> None:
    """An attention or expert implementation can name a repository, whose code transformers would fetch and run."""
    for key, value in raw.items():
        if key in _IMPLEMENTATIONS:
            named = (
                value.values() if isinstance(value, dict) else [value]
            )  # a dict names one for each part of the model
            if any("/" in str(name) for name in named):
                raise ModelError(
                    f"model {path}: its config.json asks for {key} {value!r}, a repository whose code would be fetched and run; "
                    f"remove that entry, or name one of {', '.join(_ATTENTIONS)}"
                )
        elif isinstance(value, dict):
            _refuse_fetched_kernels(path, value)


def _check_causal(path: str, config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    architectures = list(config.architectures or [])
    found = (
        f"model {path} is not a causal language model (model_type {config.model_type!r}, architectures {architectures})"
    )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{found}; expected one that AutoModelForCausalLM can load")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{found}: it is an encoder-decoder; expected a decoder-only model")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(
            f"{found}: it is an encoder, its config does not say is_decoder; expected a decoder-only model"
        )
    causal = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update([names] if isinstance(names, str) else names)
    if architectures and not any(name in causal or name.endswith("ForCausalLM") for name in architectures):
        raise ModelError(f"{found}; expected a checkpoint that was saved with its language-model head")


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype that `name` means: float32/fp32, bfloat16/bf16, float16/fp16, or auto.

    `auto` is bfloat16 where the hardware multiplies it (a CUDA device, else the CPU), and float32 elsewhere.

    Raises:
        ConfigError: another name.
    """
    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported(False) if torch.cuda.is_available() else cpu_has_bf16()
        return torch.bfloat16 if has_bf16 else torch.float32
    if name not in DTYPES:
        near = difflib.get_close_matches(str(name), ["auto", *DTYPES], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"dtype {name!r} is unknown; expected one of auto, {', '.join(DTYPES)}{hint}")
    return DTYPES[name]


def cpu_has_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions that torch uses."""
    return cpu_multiplies_bfloat16()


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    trainable: bool,
    in_4bit: bool = False,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The causal language model at `path`, in eval mode.

    Args:
        path: what `resolve_model` returned, accepted by `check_model`.
        dtype: of frozen weights. Weights that train are float32 whatever this says, and computed under autocast: in bfloat16
            an update smaller than 1/256 of a weight would be lost.
        trainable: True for full fine-tuning; False freezes every parameter.
        in_4bit: linear layers but the head become NF4 with double quantisation, multiplied in `dtype`; not with `trainable`.
        device: where 4-bit weights are put as they are read; other models are loaded on the CPU.

    Raises:
        ConfigError: `in_4bit` without bitsandbytes, or with `trainable`.
        ModelError: no safetensors, weights missing for part of the model, or files that cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    _refuse_pickles(path)
    more = _four_bit(path, dtype, trainable, device) if in_4bit else {}
    model: PreTrainedModel
    report: dict[str, Any]
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config._attn_implementation not in _ATTENTIONS:
            config._attn_implementation = None  # transformers chooses; flash_attention_2 would be fetched where missing
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            path,
            config=config,
            dtype=torch.float32 if trainable else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, in one line, instead of raised without a name
            output_loading_info=True,
            **more,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if "allocate memory" in str(error):  # as torch says it of the host's
            raise
        raise ModelError(_unreadable(path, "weights", error)) from error
    _check_report(path, report)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"model {path} is a PEFT adapter; give the model it was trained from, or merge it first")
    model.requires_grad_(trainable)
    return model.eval()


def _four_bit(path: str, dtype: torch.dtype, trainable: bool, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` is told for NF4 weights."""
    if trainable:
        raise ConfigError("load_in_4bit: 4-bit weights cannot train; put adapters on them (lora_r above 0)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit needs bitsandbytes, which is not installed; pip install bitsandbytes")
    from transformers import AutoConfig, BitsAndBytesConfig

    if getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "quantization_config", None) is not None:
        raise ConfigError(
            f"load_in_4bit: model {path} is quantised already; leave load_in_4bit out, or give its full weights"
        )
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "device_map": {"": str(device)},
    }


def _check_report(path: str, report: dict[str, Any]) -> None:
    """What a checkpoint does not hold would be random numbers."""
    mismatched = [
        f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
    ]
    if mismatched:
        raise ModelError(
            f"model {path}: the checkpoint does not fit its config.json: {_first(mismatched)}; expected the files of one model"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"model {path}: the checkpoint has no weights for {_first(missing)}; they would be random numbers, so it is refused: "
            "expected a checkpoint that was saved with its language-model head"
        )


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _refuse_pickles(path: str) -> None:
    """A folder with weights in another format gets a line that says which, rather than one that says that a file is missing."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    found = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(pattern))
    raise ModelError(
        f"model folder {folder} has no .safetensors file"
        + (f", only {', '.join(found[:4])}" if found else "")
        + "; other formats are not read (a pickle can run code): load it where you trust it and call save_pretrained"
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`.

    Raises:
        ModelError: there is none, or it asks for remote code.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(
            f"model folder {folder} has no tokenizer (such as tokenizer.json); save the tokenizer beside the model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(_unreadable(path, "tokenizer", error)) from error
    if len(tokenizer) == 0:
        raise ModelError(f"model {path}: its tokenizer has no vocabulary; save the tokenizer beside the model")
    return tokenizer


def _unreadable(path: str, what: str, error: BaseException) -> str:
    """One line for whatever a library said in several."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
    where = f"model {path}:" if Path(path).is_dir() else f"model {path} is no folder here, and as a hub id"
    return f"{where} its {what} cannot be read ({said}); expected a saved model folder or a hub id that can be reached"
