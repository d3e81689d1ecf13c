"""What must a run remember, beside transformers' own files, to be gone on from as the same run?

`dpo_engine_state.json` lies in every checkpoint and beside the final weights:

    backend                 which one computed the log-probs: two differ in the last bits
    operator                the version of the operator's arithmetic
    max_tokens_per_forest   the packing decides the order in which gradients are added up
    baseline                count and sum of what a method's running mean is over
    method                  of which the run is
    health                  the first log-probs and accuracies, which later ones are compared with
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_engine.errors import ConfigError
from dpo_engine.ops import BACKENDS
from dpo_engine.ops.backends import OPERATOR_VERSION

STATE_FILE = "dpo_engine_state.json"
SCHEMA = 3


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What `dpo_engine_state.json` holds."""

    backend: str
    """One of `BACKENDS`, never "auto"."""
    max_tokens_per_forest: int
    baseline_count: int = 0
    """Pairs that the running mean is over."""
    baseline_sum: float = 0.0
    health: dict[str, float] = field(default_factory=dict)
    """What warnings compare with (`Health.state`)."""
    method: str = ""
    operator: int = OPERATOR_VERSION


@dataclass
class RunningMean:
    """The mean of everything added since a run began; it stays on the device until it is read."""

    count: int = 0
    total: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Count `values` (B,) in."""
        self.total = self.total + values.detach().double().sum()
        self.count += len(values)

    def mean(self) -> Tensor | None:
        """() float32; None before anything was added."""
        return (torch.as_tensor(self.total) / self.count).float() if self.count else None


def write_state(folder: Path, state: RunState) -> None:
    """Keep a run's state beside its weights; the file is whole or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{STATE_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"schema": SCHEMA, **asdict(state)}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / STATE_FILE)


def read_state(folder: Path) -> RunState | None:
    """What `write_state` kept; None where there is no such file: the checkpoint was not written by this engine.

    Raises:
        ConfigError: the file is broken, or of another version.
    """
    path = folder / STATE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}); take another checkpoint") from error
    if not _fits(found):
        raise ConfigError(
            f"{path} holds {str(found)[:100]}; expected schema {SCHEMA} with a backend of "
            f"{', '.join(name for name in BACKENDS if name != 'auto')} and the run's numbers: it was written by another "
            "version, or altered; take another checkpoint"
        )
    return RunState(**{name: value for name, value in found.items() if name != "schema"})


def _fits(found: Any) -> bool:
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return False
    if set(found) != {"schema", *RunState.__dataclass_fields__}:
        return False
    whole = [found[name] for name in ("operator", "max_tokens_per_forest", "baseline_count")]
    total = found["baseline_sum"]
    return (
        found["backend"] in BACKENDS
        and found["backend"] != "auto"
        and all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in whole)
        and found["max_tokens_per_forest"] > 0
        and isinstance(total, float)
        and math.isfinite(total)
        and isinstance(found["method"], str)
        and isinstance(found["health"], dict)
        and all(isinstance(value, int | float) for value in found["health"].values())
    )
