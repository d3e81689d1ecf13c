"""How are several processes of a test started, without each of them importing torch and transformers for itself?

One process imports them and trains nothing; the ranks are forked from it. Forked from the process of the tests itself they
would find autograd's threads gone.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

IMPORTED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.trainer",
    "accelerate",
    "peft",
    "datasets",
]


def start_ranks(rank: Callable[..., None], args: tuple[Any, ...], ranks: int) -> None:
    """`rank(number, *args)` in as many processes, on one thread each; an exception of any is raised here."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(_ready, (rank, args), nprocs=ranks, start_method="forkserver")


def _ready(number: int, rank: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # transformers' trainer collects garbage after every run: imported modules are none
    rank(number, *args)
