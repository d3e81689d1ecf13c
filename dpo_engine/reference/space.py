"""Which model, computed how, do log-probs belong to? A space: everything but the tokens that decides the numbers.

    address = blake2b(weights, buffers, config as loaded, adapters if the reference has some, head transform, compute dtype,
                      operator)

Learning rate, beta, loss, seed, LoRA rank, output folder, batch size, order, packing, backend and device are not in it: they
change nothing, or the last bits, for which the guard (`guard.py`) allows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from dpo_engine.model.head import read_head_transform
from dpo_engine.model.liger import has_liger
from dpo_engine.ops.backends import OPERATOR_VERSION
from dpo_engine.reference.weights import buffers_digest, saved_tensors, weights_digest

SCHEMA = 1

# Of a config, at any depth: what changes no log-prob (names, ids that mark text, what is returned, how attention is
# implemented, which moves the last bits at most), and what is read off the weights instead (dtypes).
_NOT_THE_NUMBERS = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "base_model_name_or_path",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "inference_mode",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "peft_version",
    "problem_type",
    "return_dict",
    "revision",
    "sep_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class ReferenceSpace:
    """A reference and how it is computed."""

    parts: dict[str, Any]
    """What the address is the hash of, readable: JSON values."""

    @property
    def address(self) -> str:
        """32 hex digits."""
        text = json.dumps(self.parts, sort_keys=True)
        return blake2b(text.encode(), digest_size=16, person=b"dpo-space-1").hexdigest()

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What is not as in the parts `other`, as `name: here, there`; at most a few."""
        here, there = dict(_leaves(self.parts)), dict(_leaves(other))
        names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        return [f"{name}: {_short(here.get(name))} here, {_short(there.get(name))} there" for name in sorted(names)[:8]]


def reference_space(
    model: nn.Module, *, mixed_precision: str = "no", with_adapters: bool = False, adapter: str | None = None
) -> ReferenceSpace:
    """The space of a model's log-probs.

    Args:
        model: the causal language model itself, not a wrapper around it (`get_base_model()` of a PeftModel).
        mixed_precision: "no", or the dtype that autocast computes in: "bf16", "fp16".
        with_adapters: whether the reference has the adapters that are on in `model`; False: they are switched off when it is asked.
        adapter: the one that the reference has, of several in `model`, whichever is on now; with `with_adapters`.

    Raises:
        CacheError: the weights cannot be read.
    """
    config: Any = model.config
    transform = read_head_transform(config)
    return ReferenceSpace(
        {
            "schema": SCHEMA,
            "model": type(model).__name__,
            "weights": weights_digest(model, with_adapters=with_adapters, adapter=adapter),
            "buffers": buffers_digest(model, with_adapters=with_adapters),
            "config": _plain(config.to_dict()),
            "adapters": (_adapters(model, adapter) or None) if with_adapters else None,
            "head": dataclasses.asdict(transform),
            "compute": {
                "dtypes": sorted(
                    {_name_of(tensor.dtype) for _, tensor in saved_tensors(model, with_adapters, adapter)}
                ),
                "autocast": mixed_precision,
                "float32_products": torch.get_float32_matmul_precision(),
                **({"liger": True} if has_liger(model) else {}),  # not named without, so that earlier addresses stay
            },
            "operator": OPERATOR_VERSION,
        }
    )


def _adapters(model: nn.Module, adapter: str | None) -> list[Any]:
    """What adapters do, beside their weights: how they are configured, and which are on and how strongly, layer by layer."""
    configs = getattr(model, "peft_config", {})
    if not configs:
        return []
    if adapter is not None:
        return [{adapter: _plain(configs[adapter].to_dict())}]
    from peft.tuners.tuners_utils import BaseTunerLayer

    states = [
        [
            name,
            list(layer.active_adapters),
            bool(layer.disable_adapters),
            bool(layer.merged),
            _plain(getattr(layer, "scaling", None)),
        ]
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    return [{name: _plain(configs[name].to_dict()) for name in sorted(configs)}, states]


def _plain(value: Any) -> Any:
    """JSON values, the same for the same config in every process."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key not in _NOT_THE_NUMBERS}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
