"""What do two ranks make of a model with `linear_logps_head`: DDP, FSDP2 in several cuts, accelerate?

`run` starts the ranks as processes (gloo, on the CPU). Every rank trains on rows of its own, so the gradients that all of
them should end with are the means over ranks of `alone(case, rank)`, which knows logits only.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from dpo_engine import linear_logps_head
from support.rank_processes import start_ranks
from support.tiny_pairs import VOCABULARY, tiny_llama

RANKS, ROWS, WIDTH = 2, 3, 9
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    wrap: Callable[[nn.Module], nn.Module]
    tied: bool = False
    lora: bool = False
    empty: bool = False
    """Whether the second rank has no label that counts."""
    prepared: bool = True
    """Whether the head is installed before it is wrapped."""
    checkpointing: bool = False


def _ddp(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: nn.parallel.DistributedDataParallel(model, **settings)


def _fsdp(*names: str, **settings: Any) -> Callable[[nn.Module], nn.Module]:
    """The modules whose names end so, and the whole, each a unit of FSDP2."""

    def wrap(model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        for name, module in reversed(list(model.named_modules())):  # inner ones first
            if name and name.endswith(names):
                fully_shard(module, **settings)
        fully_shard(model, **settings)
        return model

    return wrap


def _accelerate(model: nn.Module) -> nn.Module:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model)


_LAYERS = "layers.0", "layers.1"
CASES = {
    "ddp": Case(_ddp()),
    "ddp, unused parameters": Case(_ddp(find_unused_parameters=True)),
    "ddp, installed afterwards": Case(_ddp(), prepared=False),
    "ddp, tied": Case(_ddp(), tied=True),
    "ddp, lora on the head": Case(_ddp(), lora=True),
    "ddp, no labels on one rank": Case(_ddp(), empty=True),
    "ddp, checkpointing": Case(_ddp(), checkpointing=True),
    "accelerate": Case(_accelerate),
    "fsdp2, root": Case(_fsdp("-")),
    "fsdp2, layers": Case(_fsdp(*_LAYERS)),
    # What accelerate sets for every run in 16 bits: log-probs must not be rounded on the way out.
    "fsdp2, output in 16 bits": Case(_fsdp("-", mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))),
    "fsdp2, layers, tied": Case(_fsdp(*_LAYERS), tied=True),
    "fsdp2, head on its own": Case(_fsdp(*_LAYERS, "lm_head")),
    "fsdp2, head on its own, kept": Case(_fsdp(*_LAYERS, "lm_head", reshard_after_forward=False)),
    "fsdp2, head on its own, no labels on one rank": Case(_fsdp(*_LAYERS, "lm_head"), empty=True),
    "fsdp2, head on its own, checkpointing": Case(_fsdp(*_LAYERS, "lm_head"), checkpointing=True),
    "fsdp2, lora on a head on its own": Case(_fsdp(*_LAYERS, "lm_head"), lora=True),
    "fsdp2, lora, every module on its own": Case(_fsdp("proj", "base_layer", "default", "lm_head"), lora=True),
}


def model_of(case: Case) -> nn.Module:
    model: Any = tiny_llama(tie_word_embeddings=case.tied)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "down_proj", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model.train()


def rows_of(case: Case, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """`(a call's arguments, upstream (B, L))`: padding on either side, labels with gaps, no two ranks alike."""
    draw = torch.Generator().manual_seed(60 + rank)
    ids = torch.randint(3, VOCABULARY, (ROWS, WIDTH), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2 - rank :] = 0
    labels = ids.masked_fill((torch.rand(ROWS, WIDTH, generator=draw) < 0.3) | (mask == 0), -100)
    if case.empty and rank:
        labels[:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, torch.randn(ROWS, WIDTH, generator=draw)


def by_logits(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    """(B, L), aligned with the labels."""
    labels = arguments["labels"]
    logits = model(**{name: value for name, value in arguments.items() if name != "labels"}).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp_min(0)).squeeze(-1)
    return nn.functional.pad(logps * (labels[:, 1:] != -100), (1, 0))


def alone(name: str, rank: int) -> tuple[Tensor, Found]:
    """`(token log-probs, gradients)` of the rank's rows by itself."""
    model = model_of(CASES[name])
    arguments, upstream = rows_of(CASES[name], rank)
    logps = by_logits(model, arguments)
    (logps * upstream).sum().backward()
    zero = {key: torch.zeros_like(p) for key, p in model.named_parameters() if p.requires_grad}
    return logps.detach(), zero | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def together(name: str, rank: int) -> tuple[Tensor, Found]:
    """The same with the head, wrapped; twice, so that what the first step leaves behind would show."""
    case = CASES[name]
    model = model_of(case)
    if case.prepared:
        linear_logps_head(model)
    wrapped = case.wrap(model)
    if not case.prepared:
        linear_logps_head(wrapped)
    arguments, upstream = rows_of(case, rank)
    for _ in range(2):
        wrapped.zero_grad()
        logps = wrapped(**arguments).token_logps
        (logps * upstream).sum().backward()
    found = {}
    for key, parameter in wrapped.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            found[key.removeprefix("module.")] = (
                gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            )
    return logps.detach(), found


def run(folder: Path, names: list[str]) -> dict[str, list[tuple[Tensor, Found]]]:
    """What every rank found in each case."""
    start_ranks(_rank, (str(folder), names), RANKS)
    found = [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]
    return {name: [of[name] for of in found] for name in names}


def _rank(rank: int, folder: str, names: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # accelerate wants one; the group below is there already
        "GLOO_SOCKET_IFNAME": "lo",  # a container's own name need not resolve
        "ACCELERATE_USE_CPU": "true",
    }
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=limit)
    try:
        found = {name: together(name, rank) for name in names}
    finally:
        dist.destroy_process_group()
    torch.save(found, f"{folder}/rank{rank}.pt")
