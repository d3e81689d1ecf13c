"""What do the ranks of a data-parallel run agree on, so that they compute what one process would?

Each has trees of its own, so the numbers of trees and of forests differ. A rank that has fewer forests runs idle ones,
whose gradient is zero, because every forward and backward of a sharded or replicated model is a meeting of all ranks. A data
set whose length is no multiple of what the ranks take together is filled up with empty rows: accelerate would repeat rows. They
come last, whatever the order of the others, so that every step has the rows that it would have in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, Sampler

from dpo_engine.batch import PreferenceForest, Tree, build_forest


class EvenRows(Dataset):
    """The rows of a data set, then None until their number is a multiple of `multiple`."""

    def __init__(self, rows: Sequence[Any], multiple: int) -> None:
        self.rows = rows
        self.length = len(rows) + -len(rows) % multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.rows[index] if index < len(self.rows) else None


class _EvenSampler(Sampler[int]):
    """The rows in the order of another sampler, then the empty ones."""

    def __init__(self, order: Sampler[int], rows: EvenRows) -> None:
        self.order, self.rows = order, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from range(len(self.rows.rows), len(self.rows))

    def set_epoch(self, epoch: int) -> None:
        """What accelerate calls, so that every epoch has an order of its own."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)


def even_sampler(rows: EvenRows, *, order: Callable[[Any], Any], seed: int | None) -> Any:
    """The sampler that `order` makes of the rows, with the empty rows last; None where it makes none.

    Args:
        seed: of the shuffling that accelerate puts in the place of a random sampler's; None: torch's.
    """
    sampler = order(rows.rows)
    if isinstance(sampler, RandomSampler):  # accelerate does this to a sampler that it sees
        sampler = SeedableRandomSampler(data_source=rows.rows, num_samples=len(rows.rows), data_seed=seed)
    return None if sampler is None else _EvenSampler(sampler, rows)


def idle_forest(layout: str, completions: int, with_reference: bool) -> PreferenceForest:
    """The smallest forest there is: one tree of token 0, which counts as none.

    Args:
        completions: of the tree.
        with_reference: whether it brings reference log-probs, so that the reference is not asked.
    """
    logps = torch.zeros(1)
    tree = Tree(
        prompt_ids=[0],
        completions=[[0]] * completions,
        reference_token_logps=[logps] * completions if with_reference else None,
    )
    return replace(build_forest([tree], layout), trees=0)


def sum_and_most(accelerator: Accelerator, trees: int, forests: int) -> tuple[int, int]:
    """Trees of all ranks together, and the most forests that any of them has."""
    if accelerator.num_processes == 1:
        return trees, forests
    mine = torch.tensor([[trees, forests]], device=accelerator.device)
    by_rank = accelerator.gather(mine)
    return int(by_rank[:, 0].sum()), int(by_rank[:, 1].max())


def joined_over_ranks(accelerator: Accelerator, values: Tensor) -> tuple[Tensor, slice]:
    """`(all, mine)`: (F, B_r) of every rank side by side, (F, B), in the order of ranks; `all[:, mine]` is what this rank gave."""
    if accelerator.num_processes == 1:
        return values, slice(0, values.shape[1])
    counts = accelerator.gather(torch.tensor([values.shape[1]], device=values.device)).tolist()
    padded = torch.nn.functional.pad(values, (0, max(counts) - values.shape[1]))
    by_rank = accelerator.gather(padded[None].contiguous())  # (ranks, F, most)
    begin = sum(counts[: accelerator.process_index])
    whole = torch.cat([part[:, :count] for part, count in zip(by_rank, counts, strict=True)], 1)
    return whole, slice(begin, begin + values.shape[1])


def gradients_are_apart(accelerator: Accelerator) -> bool:
    """Whether a rank may see no gradient although there is one: partitioned by DeepSpeed, or flattened by FSDP's first version."""
    kind = accelerator.distributed_type
    return kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2)
