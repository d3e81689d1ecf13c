"""Does a resumed run keep its backend although a measurement would now choose another?

Run by `tests/e2e/test_backend_in_checkpoints.py` in a process with TRITON_INTERPRET=1, where a CPU has two backends.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_engine.ops.choice import Choice, record
from support.resumable_runs import logged, stored, trainer
from support.tiny_pairs import VOCABULARY


def measured(backend: str) -> None:
    """As if `dpo-engine doctor` had found `backend` the fastest for the tiny model's head."""
    found = Choice(
        backend=backend,
        shape=(8, 32, VOCABULARY),
        floor_seconds=1.0,
        seconds={backend: 1.0},
        ratios={backend: 1.0},
        left_out={},
        date="2026-11-21",
    )
    record(torch.device("cpu"), torch.float32, "frozen", found)


@pytest.mark.parametrize(("first", "then"), [("tiled", "triton"), ("triton", "tiled")])
def test_the_resumed_run_has_the_bits_of_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, then: str
) -> None:
    monkeypatch.setenv("DPO_ENGINE_CACHE", str(tmp_path / "cache"))
    few = {
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "longest": 4,
    }  # interpreted kernels are slow
    measured(first)
    whole = trainer(tmp_path, **few)
    whole.train()
    assert whole.backend.name == stored(tmp_path / "checkpoint-1")["backend"] == first
    assert "fastest measured" in whole.backend.line()
    measured(then)
    resumed = trainer(tmp_path, **few)
    assert resumed.backend.name == then
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.backend.name == first
    assert logged(resumed) == logged(whole)
