"""Which gradients did a training run have, step by step, and are they those of another?"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class GradientRecorder(TrainerCallback):
    """Every trainable parameter's gradient just before each optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def assert_same_gradients(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    """Within 1e-5 of each parameter's norm, or 1e-6 of the norm of all; as much again for each step behind it.

    Adam divides by what may be small, so that what rounding changed in one step is larger in the next: in five steps that
    only the number of threads told apart, 0.08, 0.4, 0.5, 0.5 and 1.6 times 1e-5.
    """
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        scale = torch.stack([g.norm() for g in other.values()]).norm()
        for name in mine:
            difference = (mine[name] - other[name]).norm()
            assert difference <= (1 + step) * 1e-5 * max(other[name].norm().item(), 0.1 * scale.item()), name
