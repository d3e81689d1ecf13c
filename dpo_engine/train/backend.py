"""Which backend does a run use, and how does a resumed run come to use the same?

`backend: auto` becomes a name once, at the start, by what `dpo-engine doctor` measured. The name is kept in every
checkpoint (`state`): two backends differ in the last bits, and a resumed run must have those of the run it continues,
whatever was measured meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dpo_engine.errors import BackendError, ConfigError
from dpo_engine.model.head import head_of
from dpo_engine.ops.backends import OPERATOR_VERSION, possible_backends
from dpo_engine.ops.choice import choose_backend, measured
from dpo_engine.train.state import RunState


@dataclass(frozen=True)
class RunBackend:
    """The backend of a run."""

    name: str
    """One of `BACKENDS`, never "auto"."""
    why: str
    """Where the name comes from, for people."""

    def line(self) -> str:
        """What is said at the start."""
        return f"log-probs by the backend {self.name} ({self.why})"


def run_backend(requested: str, model: nn.Module, device: torch.device, dtype: torch.dtype) -> RunBackend:
    """The backend of a new run.

    Args:
        requested: one of `BACKENDS`.
        model: the causal language model, whose head decides.
        device: where it computes.
        dtype: what the head multiplies.

    Raises:
        BackendError: the one that is asked for cannot run here.
    """
    if requested != "auto":
        reason = possible_backends(device, dtype)[requested]
        if reason:
            raise BackendError(f"backend={requested} cannot run here: {reason}; use backend: auto, or tiled")
        return RunBackend(requested, "as asked for")
    head = head_of(model)  # type: ignore[arg-type]
    vocabulary, hidden_size = head.shape
    what = device, dtype, hidden_size, vocabulary, "trainable" if head.trains else "frozen"
    name = choose_backend(*what)
    if measured(*what):
        return RunBackend(name, "the fastest measured on this machine")
    return RunBackend(name, "nothing was measured for such a head on this machine; dpo-engine doctor does")


def resumed_backend(
    requested: str, state: RunState, checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> RunBackend:
    """The backend that a checkpoint was trained with, for the run that goes on from it.

    Args:
        state: what `checkpoint` keeps.

    Raises:
        ConfigError: another backend is asked for although the checkpoint's can run.
        BackendError: the checkpoint's backend cannot run here, and no other is asked for.
    """
    name, operator = state.backend, state.operator
    changed = (
        "" if operator == OPERATOR_VERSION else f"; its operator was version {operator}, this is {OPERATOR_VERSION}"
    )
    reason = possible_backends(device, dtype)[name]
    if requested in ("auto", name):
        if reason:
            raise BackendError(
                f"{checkpoint} was trained with backend={name}, which cannot run here: {reason}; "
                "to go on with other last bits, name another with --backend, such as --backend tiled"
            )
        return RunBackend(name, f"as in {checkpoint.name}{changed}")
    if reason is None:
        raise ConfigError(
            f"backend={requested}, but {checkpoint} was trained with backend={name}, and a resumed run has the same bits; "
            f"leave backend out (auto), or start anew without resuming"
        )
    return RunBackend(
        requested, f"as asked for; {checkpoint.name} was trained with {name}, which cannot run here: {reason}"
    )
