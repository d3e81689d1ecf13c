"""How much memory does a training step take at its fullest, counted storage by storage, without a byte being allocated?

The real step (`forest_token_logps`, a loss, backward, an optimiser's step) of a real model runs on fake tensors: each
knows its shape and dtype and holds nothing, so a 9B model is traced in seconds on a laptop. A dispatch mode follows every
storage that an operation returns until it is freed, and remembers what was alive when most was.

What happens inside one operation is not seen. For bitsandbytes that is the weight which it dequantises before it multiplies,
for `linear_logps` the tiles: both are made in the open here, beside the operation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_engine.batch import build_forest
from dpo_engine.model.forest_attention import use_forest_attention
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from dpo_engine.ops import linear_logps

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256


class LiveBytes(TorchDispatchMode):
    """Follows storages from the operation that made them to their end."""

    def __init__(self, *, detailed: bool = False) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.phase = "setup"
        self.peaks: Counter[str] = Counter()
        """Most bytes alive in each phase."""
        self.at_peak: Counter[str] = Counter()
        """Bytes alive at the peak by what made them, where `detailed`."""
        self._detailed = detailed
        self._alive: dict[int, tuple[Any, int, str]] = {}

    def adopt(self, tensor: Tensor, name: str) -> None:
        """Count a storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, lambda _: self._freed(key)), size, name
            self.live += size
            self.peaks[self.phase] = max(self.peaks[self.phase], self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._alive.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.adopt(leaf, f"{self.phase}: {func} {tuple(leaf.shape)} {leaf.dtype}")
        if self.live > self.peak:
            self.peak = self.live
            if self._detailed:
                self.at_peak = Counter()
                for _, size, name in self._alive.values():
                    self.at_peak[name] += size
        return result


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Bytes of a step."""

    static: int
    """Weights, adapters and what describes the quantisation."""
    peak: int
    """At the fullest moment, static included."""
    peaks: dict[str, int]
    """At the fullest moment of each phase."""
    at_peak: Counter[str]


@dataclass(frozen=True)
class _Tree:
    prompt_ids: list[int]
    completions: list[list[int]]


def trace_step(
    config: Any,
    *,
    tokens: int,
    in_4bit: bool,
    dtype: torch.dtype = torch.bfloat16,
    autocast: bool = True,
    lora: dict[str, Any] | None,
    checkpointing: bool,
    sharing: bool = False,
    optimiser: Any = None,
    detailed: bool = False,
) -> Traced:
    """The memory of an optimiser step over the last of several forests of `tokens` tokens: gradients and state are there.

    Args:
        config: of a transformers model.
        in_4bit: linear layers of the decoder are NF4 with double quantisation.
        dtype: of weights that do not train; weights that train are float32.
        autocast: whether the forward runs under autocast to bfloat16.
        lora: arguments of `LoraConfig`; None trains every parameter.
        sharing: a pair that shares a third of the tokens as its prompt; otherwise one sequence, which on a CPU too is
            attended to in one piece, as the kernel for forests does it on a card.
        optimiser: of the trainable parameters -> an optimiser; AdamW without it.
    """
    with _attention_as_on_a_card(config, sharing=sharing):
        model = _model_of(config, in_4bit=in_4bit, dtype=torch.float32 if lora is None else dtype, lora=lora)
        base = model.get_base_model() if lora is not None else model
        bind_scoring(base)
        assert use_forest_attention(base, "trees")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    third = tokens // 3
    if sharing:  # in the shared layout a completion's last token is no input
        tree = _Tree([1] * third, [[1] * (third + 1)] * 2)
    else:
        tree = _Tree([1] * third, [[1] * (tokens - third + 1)])
    built = build_forest([tree], "shared")
    assert abs(built.tokens - tokens) <= 3, built.tokens
    live = LiveBytes(detailed=detailed)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        _materialise(model, fakes)
        forest = built._map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made = torch.optim.AdamW(trainable, foreach=False) if optimiser is None else optimiser(trainable)
        with live:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                live.adopt(tensor, f"weights: {'adapters' if 'lora_' in name else 'model'}")
            static = live.live
            for parameter in trainable:  # as an earlier forest of the step, and earlier steps, left them
                parameter.grad = torch.empty_like(parameter)
            made.step()
            live.phase = "forward"
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                with _tiles_in_the_open():
                    token_logps = forest_token_logps(model, forest)
            loss = -torch.nn.functional.logsigmoid(token_logps.sum())
            live.phase = "backward"
            loss.backward()
            del loss, token_logps
            live.phase = "optimiser"
            torch.nn.utils.clip_grad_norm_(trainable, 1.0, foreach=False)
            made.step()
            made.zero_grad(set_to_none=True)
    return Traced(static=static, peak=live.peak, peaks=dict(live.peaks), at_peak=live.at_peak)


@contextmanager
def _attention_as_on_a_card(config: Any, *, sharing: bool) -> Iterator[None]:
    """On a card one kernel has windows and softcap in it, and keeps what plain causal attention keeps. Here sdpa stands for it."""
    from transformers import AutoModelForCausalLM

    from dpo_engine.model import forest_attention

    def no_masks(shape: Any, **_: Any) -> Any:
        return forest_attention._Stretches(stretches=shape.stretches, masks=(None,) * len(shape.stretches))

    if sharing:
        yield
        return
    config._attn_implementation = "sdpa"
    if getattr(config, "attn_logit_softcapping", None):
        config.attn_logit_softcapping = None
    says = next(
        cls for cls in AutoModelForCausalLM._model_mapping[type(config)].__mro__ if "_supports_sdpa" in vars(cls)
    )
    with patch.object(says, "_supports_sdpa", True), patch.object(forest_attention, "_stretch_masks", no_masks):
        yield


def _model_of(config: Any, *, in_4bit: bool, dtype: torch.dtype, lora: dict[str, Any] | None) -> Any:
    """The model on the meta device, with adapters."""
    from transformers import AutoModelForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    if in_4bit:
        _put_nf4(model, dtype)
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return model


@contextmanager
def _tiles_in_the_open() -> Iterator[None]:
    """The largest tile of a card's plan, and the rows and sums beside it, exist while the operator runs."""
    from dpo_engine.ops.plan import TILE_COLUMNS, TILE_ROWS

    def with_tiles(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = min(TILE_ROWS["cuda"], hidden.shape[0])
        columns = min(TILE_COLUMNS["cuda"], weight.shape[0])
        wide = [
            torch.empty(rows, columns, dtype=torch.float32),
            *(torch.empty(rows, hidden.shape[1]) for _ in range(2)),
        ]
        narrow = [torch.empty(rows, hidden.shape[1], dtype=hidden.dtype) for _ in range(2)]
        if hidden.dtype != torch.float32:
            narrow.append(torch.empty(rows, columns, dtype=hidden.dtype))
        token_logps = linear_logps(hidden, weight, *args, **kwargs)
        del wide, narrow
        return token_logps

    with patch("dpo_engine.model.scoring.linear_logps", with_tiles):
        yield


def _put_nf4(model: Any, dtype: torch.dtype) -> None:
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, _nf4_linear(module, dtype))
    model.is_loaded_in_4bit = True


def _nf4_linear(module: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    class _NF4Linear(bnb.nn.Linear4bit):
        """A `Linear4bit` whose quantisation is described by tensors of the right sizes."""

        def forward(self, x: Tensor) -> Tensor:
            state2 = bnb.functional.QuantState(
                self.absmax2, code=self.code2, blocksize=NF4_NESTED_BLOCK, dtype=torch.float32
            )
            state = bnb.functional.QuantState(
                self.absmax, shape=torch.Size((self.out_features, self.in_features)), code=self.code, dtype=dtype,
                blocksize=NF4_BLOCK, quant_type="nf4", offset=self.offset, state2=state2,
            )  # fmt: skip
            bias = None if self.bias is None else self.bias.to(x.dtype)
            opened = torch.empty(self.out_features, self.in_features, dtype=dtype)  # what the product makes inside
            product = bnb.matmul_4bit(x.to(dtype), self.weight.data, quant_state=state, bias=bias)
            del opened
            return product.to(x.dtype)

    layer: Any = _NF4Linear(
        module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    size = module.weight.numel()
    blocks = -(-size // NF4_BLOCK)
    packed = torch.empty(-(-size // 2), 1, dtype=torch.uint8, device="meta")
    layer.weight = bnb.nn.Params4bit(packed, requires_grad=False, compress_statistics=True, quant_type="nf4")
    if module.bias is not None:
        layer.bias = module.bias
    for name, shape, kind in (
        ("absmax", (blocks,), torch.uint8), ("absmax2", (-(-blocks // NF4_NESTED_BLOCK),), torch.float32),
        ("offset", (), torch.float32), ("code", (16,), torch.float32), ("code2", (256,), torch.float32),
    ):  # fmt: skip
        layer.register_buffer(name, torch.empty(shape, dtype=kind, device="meta"))
    return layer


def _materialise(model: nn.Module, fakes: FakeTensorMode) -> None:
    """Put fake tensors in the place of those on the meta device; tied ones stay tied."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    fake = torch.empty(tensor.shape, dtype=torch.float32 if tensor.requires_grad else tensor.dtype)
                    known[id(tensor)] = (
                        nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else fake
                    )
                kind[name] = known[id(tensor)]
