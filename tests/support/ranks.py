"""What do two ranks make of `linear_logps`, each with its own rows: a sharded weight, FSDP2, DDP?

`run` starts the ranks as processes (gloo, on the CPU) and gives what each of them found. Every rank trains on rows of its
own, so the gradient that all of them should end with is the mean over ranks of `alone(rank)`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_engine.ops import linear_logps
from support.head_distributions import normal, random_labels, upstream
from support.rank_processes import start_ranks

RANKS, N, D, V = 2, 21, 16, 90

Found = dict[str, Tensor]


class Model(nn.Module):
    """One layer and a head, which gives the log-probs of its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, bias=False)
        self.head = nn.Linear(D, V, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(normal(D, D, seed=31, scale=D**-0.5))
            self.head.weight.copy_(normal(V, D, seed=32))

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return linear_logps(torch.tanh(self.layer(inputs)), self.head.weight, labels, backend="tiled")


def rows_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(inputs, labels, upstream)` of a rank."""
    return normal(N, D, seed=40 + rank), random_labels(N, V).roll(rank), upstream(N) * (1 + rank)


def score(model: nn.Module, rank: int) -> Tensor:
    """Log-probs of the rank's rows; runs the backward."""
    inputs, labels, g = rows_of(rank)
    logps = model(inputs, labels)
    logps.backward(g)
    return logps.detach()


def alone(rank: int) -> Found:
    """What the rank would find by itself."""
    model = Model()
    logps = score(model, rank)
    return {"logps": logps, "layer": model.layer.weight.grad, "head": model.head.weight.grad}


def sharded_weight(rank: int) -> Found:
    """The head's weight in two shards, given to the operator as a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    weight = distribute_tensor(normal(V, D, seed=32), mesh, [Shard(0)]).requires_grad_()
    inputs, labels, g = rows_of(rank)
    hidden = torch.tanh(inputs @ normal(D, D, seed=31, scale=D**-0.5).T).requires_grad_()
    logps = linear_logps(hidden, weight, labels, backend="tiled")
    logps.backward(g)
    assert weight.grad is not None and weight.grad.to_local().shape == (V // RANKS, D)
    frozen = hidden.detach().requires_grad_()
    frozen_logps = linear_logps(frozen, weight.detach(), labels, backend="tiled")
    frozen_logps.backward(g)
    return {
        "logps": logps.detach(),
        "head": weight.grad.full_tensor(),
        "hidden": hidden.grad,
        "frozen logps": frozen_logps.detach(),
        "frozen hidden": frozen.grad,
    }


def fully_sharded(rank: int) -> Found:
    """Layer and head each a unit of FSDP2, the head's weight read outside of its own forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = Model()
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model.head, mesh=mesh)
    logps = score(model, rank)
    grads = [linear.weight.grad.full_tensor() for linear in (model.layer, model.head)]
    return {"logps": logps, "layer": grads[0], "head": grads[1]}


def data_parallel(rank: int) -> Found:
    model = nn.parallel.DistributedDataParallel(Model())
    logps = score(model, rank)
    return {"logps": logps, "layer": model.module.layer.weight.grad, "head": model.module.head.weight.grad}


WAYS: dict[str, Callable[[int], Found]] = {
    "sharded weight": sharded_weight,
    "fully sharded": fully_sharded,
    "data parallel": data_parallel,
}


def run(folder: Path) -> list[dict[str, Found]]:
    """What every rank found in every way."""
    start_ranks(_rank, (str(folder),), RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def _rank(rank: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a container's own name need not resolve
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        found = {name: way(rank) for name, way in WAYS.items()}
    finally:
        dist.destroy_process_group()
    torch.save(found, f"{folder}/rank{rank}.pt")
