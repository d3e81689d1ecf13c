"""Which sizes of a model does memory depend on? Those of its config.json, read without transformers.

    shape = read_shape(json.loads(Path("config.json").read_text()), name="my-model")
    shape = shipped_shape("llama-3.1-8b")

Sizes are in elements; a `Linear` is `(in_features, out_features)`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dpo_engine.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """One kind of linear layer; there is one of it in every decoder layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder with gated MLPs."""

    name: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the head is the input embedding."""
    longest: int
    """Positions that the model was made for."""
    inner_norms: int
    """Norms of a layer whose input is the residual stream, and whose output goes into linear layers."""
    outer_norms: int
    """Norms of a layer that follow attention or MLP."""
    head_norms: bool
    """Whether queries and keys of each head are normalised."""
    fused: bool
    """Whether queries, keys and values are one product, and gate and up another."""
    biases: tuple[str, ...] = ()
    """Linear layers that have one."""
    extra_linear: int = 0
    """Weights of linear layers outside the decoder (an image tower), which no pair of text goes through."""
    extra_other: int = 0
    """Other parameters outside the decoder."""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer."""
        wide, query, key, inner = self.hidden, self.query_width, self.key_width, self.intermediate
        if self.fused:
            sizes = {"qkv_proj": (wide, query + 2 * key), "o_proj": (query, wide)}
            sizes |= {"gate_up_proj": (wide, 2 * inner), "down_proj": (inner, wide)}
        else:
            sizes = {"q_proj": (wide, query), "k_proj": (wide, key), "v_proj": (wide, key), "o_proj": (query, wide)}
            sizes |= {"gate_proj": (wide, inner), "up_proj": (wide, inner), "down_proj": (inner, wide)}
        return tuple(Linear(name, *size, bias=name in self.biases) for name, size in sizes.items())

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers but the head, without biases."""
        return self.layers * sum(linear.weights for linear in self.linears) + self.extra_linear

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def other_weights(self) -> int:
        """Parameters that are never quantised: embedding, head, norms, biases."""
        norms = (self.inner_norms + self.outer_norms) * self.hidden + 2 * self.head_dim * self.head_norms
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        embeddings = self.embedding * (1 if self.tied else 2)
        return embeddings + self.layers * (norms + biases) + self.hidden + self.extra_other

    @property
    def parameters(self) -> int:
        return self.linear_weights + self.other_weights


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How models of one `model_type` are built, and what their configs leave out."""

    inner_norms: int = 2
    outer_norms: int = 0
    head_norms: bool = False
    fused: bool = False
    tied: bool = False
    biases: tuple[str, ...] = ()
    defaults: Mapping[str, int] | None = None


_QKV = ("q_proj", "k_proj", "v_proj")
_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
FAMILIES: dict[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(),
    "granite": _Family(),
    "smollm3": _Family(tied=True),
    "qwen2": _Family(biases=_QKV),
    "qwen3": _Family(head_norms=True),
    "gemma": _Family(tied=True),
    "gemma2": _Family(outer_norms=2, tied=True),
    "gemma3_text": _Family(outer_norms=2, head_norms=True, tied=True, defaults={**_GEMMA3, "vocab_size": 262208}),
    "phi3": _Family(fused=True),
}
_TEXT_OF = {"gemma3": "gemma3_text"}  # models with an image tower: the type of their text part
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def shipped_names() -> list[str]:
    """Short names of the models whose shapes come with the engine."""
    folder = resources.files("dpo_engine.memory") / "configs"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def shipped_shape(name: str) -> ModelShape:
    """The shape of a model that comes with the engine, by its short name.

    Raises:
        ModelError: there is none of that name.
    """
    return read_shape(shipped_config(name), name)


def shipped_config(name: str) -> dict[str, Any]:
    """The config that a short name stands for: its sizes, as its maker's config.json has them."""
    if name not in shipped_names():
        close = difflib.get_close_matches(name, shipped_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ModelError(f"model {name!r} is none of the shapes that come along ({', '.join(shipped_names())}){hint}")
    file = resources.files("dpo_engine.memory") / "configs" / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read_shape(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a config.json describes.

    Args:
        config: what the file holds.
        name: for messages.

    Raises:
        ModelError: another kind of model, or a size that is missing or no positive number.
    """
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise ModelError(f"model {name}: text_config is {type(text).__name__}; expected the config of a text model")
    if config.get("quantization_config") or text.get("quantization_config"):
        raise ModelError(
            f"model {name}: it is stored quantised (quantization_config), for which memory is not planned; give the model of "
            "full weights, and load_in_4bit"
        )
    model_type = text.get("model_type") or config.get("model_type")
    model_type = _TEXT_OF.get(str(model_type), str(model_type))
    family = FAMILIES.get(model_type)
    if family is None or any(text.get(key) for key in _EXPERTS):
        raise ModelError(
            f"model {name}: memory is not planned for model_type {model_type!r}; expected one of {', '.join(FAMILIES)}: "
            "train without a plan, and lower max_tokens_per_forest where memory runs out"
        )
    given = {**(family.defaults or {}), **{key: value for key, value in text.items() if value is not None}}
    hidden, intermediate, layers, heads, vocabulary = (_size(given, key, name) for key in _SIZES)
    kv_heads = _size({"num_key_value_heads": heads, **given}, "num_key_value_heads", name)
    if "head_dim" not in given and hidden % heads:
        raise ModelError(f"model {name}: hidden_size {hidden} is no multiple of its {heads} heads; expected head_dim")
    if heads % kv_heads:
        raise ModelError(f"model {name}: {heads} heads are no multiple of num_key_value_heads={kv_heads}")
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    for key, value in (
        ("tie_word_embeddings", tied),
        *((key, given.get(key)) for key in ("attention_bias", "mlp_bias")),
    ):
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"model {name}: {key} is {value!r} in its config; expected true or false")
    biases = family.biases
    if given.get("attention_bias"):
        biases = (*_QKV, "o_proj")
    if given.get("mlp_bias"):
        biases = (*biases, "gate_proj", "up_proj", "down_proj")
    linear, other = _image_tower(config["vision_config"], hidden, name) if "vision_config" in config else (0, 0)
    return ModelShape(
        name=name,
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_size({"head_dim": hidden // heads, **given}, "head_dim", name),
        vocabulary=vocabulary,
        tied=family.tied if tied is None else bool(tied),
        longest=_size({"max_position_embeddings": 131072, **given}, "max_position_embeddings", name),
        inner_norms=family.inner_norms,
        outer_norms=family.outer_norms,
        head_norms=family.head_norms,
        fused=family.fused,
        biases=biases,
        extra_linear=linear,
        extra_other=other,
    )


def _size(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        said = "is missing" if value is None else f"is {value!r}"
        raise ModelError(f"model {name}: {key} {said} in its config; expected a whole number above 0")
    return value


def _image_tower(tower: Any, hidden: int, name: str) -> tuple[int, int]:
    """`(weights of linear layers, other parameters)` of a SigLIP tower and its projection into the decoder."""
    if not isinstance(tower, Mapping):
        raise ModelError(
            f"model {name}: vision_config is {type(tower).__name__}; expected the config of an image tower"
        )
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    wide, inner, layers, image, patch = (_size(tower, key, f"{name} (vision_config)") for key in keys)
    linear = layers * (4 * wide * wide + 2 * wide * inner)
    biases, norms = layers * (5 * wide + inner), (2 * layers + 1) * 2 * wide
    patches = tower.get("num_channels", 3) * patch**2 * wide + wide
    projection = wide * hidden + wide
    return linear, biases + norms + patches + (image // patch) ** 2 * wide + projection
