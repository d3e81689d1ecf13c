"""How many tokens fit into one forest here?

    max_tokens_per_forest = share * memory that is free / bytes that a token keeps for backward

What a token keeps is measured, not looked up: the tensors that autograd saves while the model runs on a small forest are
counted, twice, at two sizes, so that what does not grow with the tokens drops out. The budget is rounded down, so that a
little more or less free memory gives the same one; a checkpoint keeps it all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpo_engine.batch import TokenTree, build_forest, packed_cost
from dpo_engine.data import PairData
from dpo_engine.data.streaming import PairStream
from dpo_engine.errors import DataError
from dpo_engine.model.layout import Layout
from dpo_engine.model.scoring import forest_token_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dpo_engine.train.config import DPOConfig

MOST = {"cpu": 512, "cuda": 8192}  # on a CPU up to 1536 were no faster, and took more memory; on CUDA not measured
_LEAST = 256
_SHARE = 0.5  # of free memory: gradients in flight and the allocator's waste take of the rest
_AT_MOST = 0.8  # what a single tree may take before it is refused
_MULTIPLE = 256
_PROBE = (64, 192)  # tokens
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Budget:
    """Tokens of a forest and where the number comes from."""

    tokens: int
    why: str

    def line(self) -> str:
        """What is said at the start."""
        return f"forests of up to {self.tokens} tokens ({self.why})"


def run_budget(
    config: DPOConfig,
    causal: PreTrainedModel,
    datasets: Sequence[PairData | PairStream | None],
    layout: Layout,
    device: torch.device,
) -> Budget:
    """`config.max_tokens_per_forest`, or what memory allows.

    Args:
        causal: the policy without adapters around it, bound.

    Raises:
        DataError: a tree is larger than that.
    """
    token_bytes, free = 0.0, 0
    if config.max_tokens_per_forest is None:
        token_bytes = bytes_per_token(
            causal,
            layout.name,
            checkpointing=bool(config.gradient_checkpointing or getattr(config, "activation_checkpointing", False)),
            offloaded=config.activation_offload and device.type == "cuda",
            layers=causal.config.get_text_config().num_hidden_layers,
            device=device,
        )
        free = free_bytes(device, causal)
    # Of a stream nothing is known but what it may bring: a pair of the greatest length, prompts apart.
    is_stream = any(isinstance(data, PairStream) for data in datasets)
    return forest_budget(
        config.max_tokens_per_forest,
        [None if isinstance(data, PairStream) else data for data in datasets],
        layout.name,
        layout.longest,
        token_bytes=token_bytes,
        free=free,
        device=device.type,
        to_come=2 * (config.max_length or 0) if is_stream else 0,
    )


def forest_budget(
    given: int | None,
    datasets: Sequence[Sequence[TokenTree] | None],
    layout: str,
    longest: int | None = None,
    *,
    token_bytes: float = 0.0,
    free: int = 0,
    device: str = "cpu",
    to_come: int = 0,
) -> Budget:
    """The budget of a run.

    Args:
        given: `max_tokens_per_forest` as the user set it; the rest is asked only without it.
        datasets: whose largest tree must fit.
        layout, longest: how trees are laid out (`model.layout.Layout`).
        token_bytes: what a token keeps for backward (`bytes_per_token`).
        free: bytes that are free for it (`free_bytes`).
        device: "cpu" or "cuda", ...
        to_come: tokens of the largest tree that a stream may bring.

    Raises:
        DataError: a tree is larger than the budget given, or than memory allows.
    """
    trees = [tree for data in datasets if data is not None for tree in data]
    largest = max(trees, key=lambda tree: packed_cost(tree, layout, longest), default=None)
    most = packed_cost(largest, layout, longest) if largest is not None else 0
    origin = getattr(largest, "origin", None) or "a tree"
    if given is not None:
        if most > given:
            raise DataError(
                f"{origin}: the pair takes {most} tokens, more than max_tokens_per_forest={given}; raise it, or set max_length "
                "(--max_length) to truncate: that is of the prompt and one completion, and a pair has two"
            )
        return Budget(given, "as asked for")
    if to_come > most:
        most, origin = to_come, "the largest pair that max_length allows"
    if most * token_bytes > _AT_MOST * free:
        raise DataError(
            f"{origin}: the pair takes {most} tokens, which keep about {most * token_bytes / 2**30:.1f} GiB for the backward "
            f"pass, and {free / 2**30:.1f} GiB are free; set max_length (--max_length) to truncate, or "
            "gradient_checkpointing: true, or max_tokens_per_forest to try it all the same"
        )
    fits = max(_LEAST, int(_SHARE * free / token_bytes) // _MULTIPLE * _MULTIPLE)
    cap = MOST.get(device, MOST["cuda"])
    if most >= min(fits, cap):
        return Budget(most, f"the largest pair, {origin}")
    if fits < cap:
        return Budget(fits, f"a token keeps {token_bytes / 2**20:.2f} MiB, {free / 2**30:.1f} GiB are free")
    return Budget(cap, "larger ones are not faster")


def bytes_per_token(
    model: nn.Module, layout: str, *, checkpointing: bool, layers: int, device: torch.device, offloaded: bool = False
) -> float:
    """What one more token makes autograd keep, in bytes.

    Args:
        model: bound (`bind_scoring`), with forest attention if the layout needs it.
        checkpointing: whether layers will be computed again in backward: then each keeps its input only, and one at a time
            keeps what it computes.
        layers: of the model.
        offloaded: whether checkpoints' inputs wait elsewhere; then those of two layers are here, one of them on its way.
    """
    small, large = (_saved_bytes(model, layout, length, device) for length in _PROBE)
    per_token = max(1.0, (large - small) / (_PROBE[1] - _PROBE[0]))
    if not checkpointing:
        return per_token
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    return per_token / layers * 2 + (min(2, layers) if offloaded else layers) * width * 4


def free_bytes(device: torch.device, model: nn.Module) -> int:
    """Bytes free on the device once gradients and an optimiser's two moments exist, in float32."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)  # newer than torch 2.9
        free = min(free, int(fraction * total) - torch.cuda.memory_reserved(device))
    else:
        free = host_bytes()
    return max(0, free - 12 * trainable)


def host_bytes() -> int:
    """Bytes free on the host, for this container."""
    import psutil  # accelerate brings it

    return min(psutil.virtual_memory().available, *_left_in_cgroup())


def _left_in_cgroup() -> list[int]:
    """What a container may still take: psutil sees the machine's memory only."""
    found = []
    for most, now in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int((_CGROUP / most).read_text()) - int((_CGROUP / now).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found or [2**62]


@dataclass(frozen=True)
class _Tree:
    prompt_ids: list[int]
    completions: list[list[int]]


def _saved_bytes(model: nn.Module, layout: str, length: int, device: torch.device) -> int:
    """Bytes of the tensors that autograd keeps for a forest of one tree of about `length` tokens, parameters left out."""
    tree = _Tree(prompt_ids=[1] * (length // 3), completions=[[1] * (length // 3)] * 2)
    forest = build_forest([tree], layout).to(device)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = forest_token_logps(model, forest)
    del logps
    return sum(kept.values()) * length // forest.tokens
