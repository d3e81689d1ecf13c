"""What does a trainer do in each optimiser step, whoever wrote it? Seconds, and the tokens that its model computed.

One callback for both sides, so that neither is counted in a way of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class OutOfTime(RuntimeError):
    """A row cannot be done within its time."""


class Refused(RuntimeError):
    """A run is not what it was to be, so its figures may not stand beside others."""


class StepWatch(TrainerCallback):
    """A step lasts from the end of the one before to its own end: collating and logging are part of it.

    Tokens are those that the input embedding is asked for while gradients are recorded: padding and repeated prompts count,
    and passes of a reference do not.

    Args:
        embedding: `model.get_input_embeddings()`, of the model that will train.
        until: by `clock`; a step that would probably end later is not begun.
        clock: seconds.

    Raises:
        OutOfTime: within training, where the next step would not fit.
    """

    def __init__(
        self,
        embedding: nn.Module,
        *,
        until: float = float("inf"),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self._until = until
        self._clock = clock
        self._seen = 0
        self._hook = embedding.register_forward_pre_hook(self._count)

    @property
    def seconds(self) -> list[float]:
        """Of every step after the first, which pays for warm-up."""
        return [end - before for before, end in zip(self.ends, self.ends[1:], strict=False)]

    def pairs_per_s(self, batch: int) -> float | None:
        """Pairs of the timed steps over their seconds; None after a single step."""
        return len(self.seconds) * batch / sum(self.seconds) if self.seconds else None

    def close(self) -> None:
        """Leave the model alone again."""
        self._hook.remove()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._seen = 0

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the clock must not stop before the work does
        self.ends.append(self._clock())
        self.tokens.append(self._seen)
        needed = self.seconds[-1] if self.seconds else 0.0
        if state.global_step < state.max_steps and self._clock() + needed > self._until:
            raise OutOfTime(f"{len(self.ends)} of {state.max_steps} steps were done when the time was used up")

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._seen += inputs[0].numel()


def peak_cuda_mb() -> float | None:
    """Most memory that the allocator held since the process began, or since it was reset, in MiB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
