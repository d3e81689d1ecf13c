"""How many bytes does a training step take at its fullest, part by part?

    parts = step_parts(shape, settings, tokens=4096)
    parts.total

A step is fullest in one of four moments, and a plan counts the fullest of them:

    head        the last layer is behind; the head's tiles and what its backward pass keeps are there
    layer       the backward pass of the last layer, computed again or kept: its MLP is the widest place of most models
    embedding   the end of the backward pass, where the embedding trains
    optimiser   nothing of the batch, but what the optimiser needs for a moment

With b bytes an element of the compute dtype, w wide (hidden), i wide (intermediate), q and k the widths of queries and keys,
a decoder layer keeps for its backward pass, in bytes a token:

    each inner norm       4 w (its input in float32)  +  b w (its output: what adapters in front of linear layers keep)
    each outer norm       4 w
    attention             b (q + k + k) queries, keys, values;  b q output;  b q the same, made contiguous
    MLP                   3 b i (gate, its activation, up)  +  b i (their product)

and when gradients come back to the MLP, its product is gone and three more of size b i are there: two gradients and their sum.
A weight that is kept in 4 bits is opened before it is multiplied: one of them at a time.

Held against a trace of the real step for every model that comes along (`tests/unit/test_memory_traced.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dpo_engine.memory.shapes import Linear, ModelShape

MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WEIGHTS = ("nf4", *BYTES)
# What `ops.plan` cuts the head into; a test holds these to it.
HEAD_TILE = {"cuda": (1024, 8192), "cpu": (1024, 2048)}
STATE_BYTES = {  # of an optimiser, for a parameter that trains
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2.0 + 8 / 256,
    "adamw_8bit": 2.0 + 8 / 256,
    "paged_adamw_32bit": 8.0,
    "paged_adamw_8bit": 2.0 + 8 / 256,
    "sgd": 0.0,
}
_NF4_BLOCK, _NESTED_BLOCK = 64, 256


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What of a run's settings memory depends on."""

    weights: str = "nf4"
    """Of frozen linear layers: one of `WEIGHTS`."""
    compute: str = "bfloat16"
    """What is multiplied, and the dtype of frozen weights that are not quantised."""
    lora_r: int = 16
    """0 trains every parameter."""
    lora_targets: tuple[str, ...] | None = None
    """Names of linear layers; None for all of them."""
    lora_head: bool = False
    lora_dropout: float = 0.0
    optimiser: str = "paged_adamw_8bit"
    """One of `STATE_BYTES`."""
    checkpointing: bool = True
    offload: bool = False
    """Checkpoints lie in host memory."""
    reference: str = "adapters_off"
    """Where the reference comes from: "adapters_off", "adapter_copy" (a frozen adapter) or "model_copy"."""
    device: str = "cuda"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes at the fullest moment of a step."""

    weights: int
    """Frozen, or trained in float32; with what describes their quantisation."""
    adapters: int
    gradients: int
    optimiser: int
    reference: int
    """A reference of its own: a copy of the model, or of an adapter."""
    activations: int
    """What layers keep for the backward pass; with checkpointing, each layer's input, and all of one layer."""
    attention: int
    """Of that, what attention keeps."""
    head: int
    """Tiles of the head and what it keeps."""
    opened: int
    """The largest 4-bit weight, opened."""
    allocator: int
    """Context of the device, its libraries' workspaces, and what the allocator cannot use."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def allocated(self) -> int:
        """What an allocator counts as given out: all but its own."""
        return self.total - self.allocator

    def in_mb(self) -> dict[str, float]:
        """MiB of each part."""
        return {name: round(value / MIB, 1) for name, value in asdict(self).items()}


def step_parts(shape: ModelShape, settings: StepSettings, tokens: int) -> Parts:
    """Bytes of a step over forests of `tokens` tokens, at its fullest moment.

    Args:
        tokens: computed at once: `max_tokens_per_forest`, all of them taken to be scored.
    """
    moment = max(
        (
            _in_layer(shape, settings, tokens),
            _in_head(shape, settings, tokens),
            _in_embedding(shape, settings),
            _in_optimiser(shape, settings),
        ),
        key=lambda found: sum(found.values()),
    )
    trainable = trained_parameters(shape, settings)
    static = {
        "weights": weight_bytes(shape, settings),
        "adapters": 4 * trainable if settings.lora_r else 0,
        "gradients": 4 * trainable,
        "optimiser": int(STATE_BYTES[settings.optimiser] * trainable + moment.pop("optimiser_moment", 0)),
        "reference": _reference_bytes(shape, settings),
    }
    dynamic = {name: int(moment.get(name, 0)) for name in ("activations", "attention", "head", "opened")}
    allocator = allocator_bytes(settings, sum(dynamic.values()))
    return Parts(**static, **dynamic, allocator=allocator)


# ---- what is there all the time ----


def weight_bytes(shape: ModelShape, settings: StepSettings) -> int:
    """The model's own weights."""
    if not settings.lora_r:
        return 4 * shape.parameters
    wide = BYTES[settings.compute]
    if settings.weights != "nf4":
        return BYTES[settings.weights] * shape.parameters
    blocks = shape.linear_weights / _NF4_BLOCK  # one byte each, and four bytes for each block of those
    return int(shape.linear_weights / 2 + blocks + 4 * blocks / _NESTED_BLOCK + wide * shape.other_weights)


def adapted(shape: ModelShape, settings: StepSettings) -> tuple[Linear, ...]:
    """The linear layers of a decoder layer that get adapters."""
    if not settings.lora_r:
        return ()
    targets = settings.lora_targets
    return tuple(linear for linear in shape.linears if targets is None or linear.name in targets)


def trained_parameters(shape: ModelShape, settings: StepSettings) -> int:
    """Parameters that take a gradient."""
    if not settings.lora_r:
        return shape.parameters
    each = sum(linear.inputs + linear.outputs for linear in adapted(shape, settings))
    head = shape.hidden + shape.vocabulary if settings.lora_head else 0
    return settings.lora_r * (shape.layers * each + head)


def _reference_bytes(shape: ModelShape, settings: StepSettings) -> int:
    if settings.reference == "model_copy":
        return 4 * shape.parameters
    return 4 * trained_parameters(shape, settings) if settings.reference == "adapter_copy" else 0


def allocator_bytes(settings: StepSettings, dynamic: int) -> int:
    """What a card loses beside what is asked of it: an assumption, to be replaced by what is measured.

    600 MiB for the context, the kernels loaded into it and the libraries' workspaces, and a twentieth of what comes and goes.
    """
    return 600 * MIB + dynamic // 20 if settings.device == "cuda" else 0


# ---- what comes and goes ----


def _in_layer(shape: ModelShape, settings: StepSettings, tokens: int) -> dict[str, float]:
    """The backward pass of the last decoder layer, at the widest of its moments."""
    layers, stream = shape.layers, _stream(shape, settings)
    stored: float
    kept, attended = _kept_by_layer(shape, settings), _kept_by_attention(shape, settings)
    if settings.checkpointing:
        stored = (min(2, layers) if settings.offload else layers) * stream  # the first layer's input stays
    else:
        stored = (layers - 1) * (kept + _kept_by_mlp(shape, settings))
        attended *= layers
    in_mlp, opened = max(_mlp_moments(shape, settings, tokens), key=sum)
    casts = _casts(shape, settings) / (layers if settings.checkpointing else 1)
    return {
        "activations": tokens * (stored + kept + stream) + in_mlp + casts,
        "attention": tokens * attended + _trees_on_cpu(shape, settings, tokens),
        "opened": opened,
    }


def _mlp_moments(shape: ModelShape, settings: StepSettings, tokens: int) -> list[tuple[float, float]]:
    """`(bytes of the MLP, of an opened weight)` when each could be the most. `inner` is b i for all tokens."""
    b = BYTES[settings.compute]
    inner, wide = b * shape.intermediate * tokens, 4 * shape.hidden * tokens
    in_4bit = settings.lora_r > 0 and settings.weights == "nf4"
    largest = {linear.name: b * linear.weights * in_4bit for linear in shape.linears}
    down, up = largest["down_proj"], max(largest.get("gate_up_proj", 0), largest.get("up_proj", 0))
    gradients = 2 if _keeps_input(shape, settings, "down_proj") and settings.lora_r else 1
    moments: list[tuple[float, float]] = [
        (3 * inner + (gradients + (gradients > 1)) * inner, 0.0),  # the gradients of down's input, and their sum
        (3 * inner + gradients * inner, down),
        (6 * inner, 0.0),  # of gate and up, beside the three kept and that sum
        (2 * inner, up),
        # The MLP is behind: gradients come through a norm in float32, of which its input is gone.
        (4 * wide, 0.0),
    ]
    if shape.outer_norms:  # gradients come through a norm first, in float32: five of them
        moments.append((_kept_by_mlp(shape, settings) * tokens + 5 * wide, 0.0))
    return moments


def _in_head(shape: ModelShape, settings: StepSettings, tokens: int) -> dict[str, float]:
    """The head's forward pass, after all layers: every token is taken to be scored."""
    b, wide, stream = BYTES[settings.compute], shape.hidden, _stream(shape, settings)
    final_norm = (4 * wide if b < 4 else 0) + b * wide
    activations: float
    if settings.checkpointing:
        stored = 1 if settings.offload else shape.layers + 1
        activations, attended = stored * stream, 0.0
    else:
        activations = shape.layers * (_kept_by_layer(shape, settings) + _kept_by_mlp(shape, settings))
        attended = shape.layers * _kept_by_attention(shape, settings)
    rows, columns = HEAD_TILE.get(settings.device, HEAD_TILE["cuda"])
    rows, columns = min(rows, tokens), min(columns, shape.vocabulary)
    tiles = rows * columns * (4 + (b if b < 4 else 0)) + rows * wide * (8 + 2 * b)
    head = 2 * b * wide * tokens + tiles  # the rows that predict, and the gradient that waits for its factor
    if not settings.lora_r:
        head += 4 * shape.embedding  # the gradient of the head's weight, before it is added to that of other forests
    return {
        "activations": tokens * (activations + final_norm) + _casts(shape, settings),
        "attention": tokens * attended,
        "head": head,
    }


def _stream(shape: ModelShape, settings: StepSettings) -> int:
    """Bytes a token of the residual stream: in the dtype of the embedding."""
    return (BYTES[settings.compute] if settings.lora_r else 4) * shape.hidden


def _in_embedding(shape: ModelShape, settings: StepSettings) -> dict[str, float]:
    """Gradients of a vocabulary's rows on their way to where they are added up: of the head and the embedding, and their sum."""
    if settings.lora_r:
        return {}
    return {"head": 4.0 * (3 if shape.tied else 1) * shape.embedding}


def _in_optimiser(shape: ModelShape, settings: StepSettings) -> dict[str, float]:
    """torch's AdamW makes two numbers for each of the largest tensor; on CUDA, unless fused, one for every parameter."""
    if settings.optimiser != "adamw_torch":
        return {}
    trained = trained_parameters(shape, settings)
    if settings.device == "cuda" and not settings.lora_r:
        return {"optimiser_moment": 4.0 * trained}
    largest = max(shape.embedding, *(linear.weights for linear in shape.linears)) if not settings.lora_r else 0
    return {"optimiser_moment": 8.0 * largest}


def _kept_by_layer(shape: ModelShape, settings: StepSettings) -> float:
    """Bytes a token that a layer keeps for its backward pass, attention and MLP left out."""
    b, wide = BYTES[settings.compute], shape.hidden
    norms = (shape.inner_norms + shape.outer_norms) * 4 * wide  # of a 16-bit input a copy; a float32 input itself
    if not settings.lora_r:  # a weight that trains asks for what it multiplies; autocast casts for each layer by itself
        outputs = sum(
            b * linear.inputs for linear in shape.linears if linear.inputs == wide and linear.name != "o_proj"
        )
        return 2 * norms + (outputs if b < 4 else shape.inner_norms * 4 * wide)
    outputs = sum(b * wide for name in ("q_proj", "gate_proj") if _keeps_input(shape, settings, name))
    return norms + outputs + settings.lora_r * b * len(adapted(shape, settings)) + _dropped(shape, settings)


def _dropped(shape: ModelShape, settings: StepSettings) -> float:
    """Bytes a token of what dropout leaves of each adapter's input, and of its mask; but of the MLP's product."""
    if settings.lora_dropout <= 0:
        return 0.0
    widths = sum(linear.inputs for linear in adapted(shape, settings) if linear.name != "down_proj")
    return float((BYTES[settings.compute] + 2) * widths)


def _kept_by_mlp(shape: ModelShape, settings: StepSettings) -> float:
    """Bytes a token: gate, its activation, up; and their product, where what multiplies it next trains."""
    return (3 + _keeps_input(shape, settings, "down_proj")) * BYTES[settings.compute] * shape.intermediate


def _kept_by_attention(shape: ModelShape, settings: StepSettings) -> float:
    """Bytes a token that attention keeps: queries, keys, values, output."""
    b, query, key = BYTES[settings.compute], shape.query_width, shape.key_width
    kept = b * (query + 2 * key) + b * query + 4 * shape.heads
    if shape.fused:
        kept += b * (query + key)  # values are a view, which keeps all of the product
    if shape.head_norms:
        kept += 4 * (query + key)
    if _keeps_input(shape, settings, "o_proj"):
        kept += b * query
    return kept


def _keeps_input(shape: ModelShape, settings: StepSettings, name: str) -> bool:
    """Whether the input of that layer, or of one that is fused with it or shares its input, is kept."""
    if not settings.lora_r:
        return True
    together = {
        "q_proj": {"q_proj", "k_proj", "v_proj", "qkv_proj"},
        "gate_proj": {"gate_proj", "up_proj", "gate_up_proj"},
    }.get(name, {name})
    return any(linear.name in together for linear in adapted(shape, settings))


def _casts(shape: ModelShape, settings: StepSettings) -> float:
    """What autocast keeps of the weights that train, in the compute dtype."""
    b = BYTES[settings.compute]
    return float(b * trained_parameters(shape, settings)) if b < 4 else 0.0


def _trees_on_cpu(shape: ModelShape, settings: StepSettings, tokens: int) -> float:
    """On a CPU attention goes completion by completion, and each keeps its prompt's keys and values, one for every head."""
    if settings.device != "cpu":
        return 0.0
    return 2.0 * BYTES[settings.compute] * shape.query_width * tokens * (1 if settings.checkpointing else shape.layers)
