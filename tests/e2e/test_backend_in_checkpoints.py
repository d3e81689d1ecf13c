"""Does a resumed run go on with the backend it was begun with, whatever was measured or asked meanwhile?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.errors import BackendError, ConfigError, DataError
from dpo_engine.ops import choice
from dpo_engine.ops.backends import OPERATOR_VERSION
from dpo_engine.train.state import SCHEMA, STATE_FILE
from support.imports import ROOT
from support.resumable_runs import logged, stored, trainer
from support.tiny_pairs import random_pairs, tiny_llama


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DPO_ENGINE_CACHE", str(tmp_path / "cache"))
    choice.forget_stored()
    yield
    choice.forget_stored()


def scoring_backend(run: DPOTrainer) -> str:
    return run.model.get_base_model().scoring_backend


def test_the_name_is_in_every_checkpoint_and_in_the_output_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path / "out")
    run.train()
    run.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-4"):
        found = stored(folder)
        assert found == {
            "schema": SCHEMA,
            "backend": "tiled",
            "operator": OPERATOR_VERSION,
            "max_tokens_per_forest": run.budget.tokens,
            "baseline_count": 0,
            "baseline_sum": 0.0,
            "health": {},
            "method": "dpo",
        }
        assert not list(folder.glob("*.partial"))
    assert "nothing was measured" in run.backend.line()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_backend_that_is_asked_for_scores_policy_and_reference(tmp_path: Path, backend: str) -> None:
    lora = trainer(tmp_path / "out", backend=backend)
    assert lora.backend.name == scoring_backend(lora) == backend
    full = DPOTrainer(
        model=tiny_llama(),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, backend=backend),
        train_dataset=random_pairs(4),
    )
    assert full.model.scoring_backend == full.reference.scoring_backend == backend


def test_a_resumed_run_keeps_the_backend_of_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "out", backend="reference", precompute_ref_log_probs=True)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = trainer(tmp_path / "out", precompute_ref_log_probs=True)  # auto, which means tiled here
    assert resumed.backend.name == "tiled"
    resumed.know_reference()  # as an evaluation before training would
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.backend.name == scoring_backend(resumed) == "reference"
    assert "as in checkpoint-2" in resumed.backend.line()
    assert logged(resumed) == logged(whole)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_true_means_the_last_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path / "out", backend="reference", max_steps=2).train()
    resumed = trainer(tmp_path / "out")
    resumed.restore_run(True)
    assert resumed.backend.name == "reference"


def test_asking_for_another_backend_on_resume_is_refused_with_what_to_do(tmp_path: Path) -> None:
    trainer(tmp_path / "out", backend="reference", max_steps=2).train()
    with pytest.raises(
        ConfigError, match=r"backend=tiled, but .*checkpoint-2 was trained with backend=reference.*auto"
    ):
        trainer(tmp_path / "out", backend="tiled").train(resume_from_checkpoint=True)
    trainer(tmp_path / "out", backend="reference").train(resume_from_checkpoint=True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs on a CPU here")
def test_a_backend_that_cannot_run_here_is_named_and_can_be_replaced(tmp_path: Path) -> None:
    trainer(tmp_path / "out", max_steps=2).train()
    file = tmp_path / "out" / "checkpoint-2" / STATE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"backend": "triton"}))
    with pytest.raises(BackendError, match=r"trained with backend=triton, which cannot run here: .*--backend tiled"):
        trainer(tmp_path / "out").train(resume_from_checkpoint=True)
    resumed = trainer(tmp_path / "out", backend="tiled")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.backend.name == "tiled" and "was trained with triton" in resumed.backend.line()
    with pytest.raises(BackendError, match="backend=triton cannot run here"):
        trainer(tmp_path / "new", backend="triton")


def test_a_checkpoint_without_a_name_goes_on_with_what_a_new_run_would_use(tmp_path: Path) -> None:
    trainer(tmp_path / "out", max_steps=2).train()
    (tmp_path / "out" / "checkpoint-2" / STATE_FILE).unlink()
    resumed = trainer(tmp_path / "out", backend="reference")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.backend.name == "reference"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 1},
        {"backend": "auto"},
        {"backend": ["tiled"]},
        {"operator": "2"},
        {"max_tokens_per_forest": 0},
        {"max_tokens_per_forest": True},
        {"baseline_sum": float("nan")},
        {"baseline_count": -1},
        {"other": 1},
    ],
    ids=str,
)
def test_an_altered_state_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run = trainer(tmp_path / "out")
    run.save_model(str(tmp_path / "checkpoint-2"))
    file = tmp_path / "checkpoint-2" / STATE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=STATE_FILE):
        run.restore_run(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2, "backend": "tiled"}'])
def test_a_broken_state_is_refused(tmp_path: Path, text: str) -> None:
    run = trainer(tmp_path / "out")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / STATE_FILE).write_text(text)
    with pytest.raises(ConfigError, match=STATE_FILE):
        run.restore_run(str(tmp_path / "checkpoint-2"))


def test_a_resumed_run_packs_to_the_budget_of_its_checkpoint_unless_told_otherwise(tmp_path: Path) -> None:
    trainer(tmp_path / "out", max_steps=2, max_tokens_per_forest=70).train()
    resumed = trainer(tmp_path / "out")
    assert resumed.budget.tokens != 70
    resumed.restore_run(True)
    assert resumed.budget.tokens == 70 and "as in checkpoint-2" in resumed.budget.line()
    told = trainer(tmp_path / "out", max_tokens_per_forest=80)
    told.restore_run(True)
    assert told.budget.tokens == 80


def test_a_pair_larger_than_a_checkpoints_budget_is_named(tmp_path: Path) -> None:
    trainer(tmp_path / "out", max_steps=2, max_tokens_per_forest=70).train()
    with pytest.raises(DataError, match=r"row \d+: the pair takes \d+ tokens, more than max_tokens_per_forest=70"):
        trainer(tmp_path / "out", longest=60).train(resume_from_checkpoint=True)


def test_an_unknown_backend_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backend='cuda' is out of range; expected one of auto, reference"):
        DPOConfig(output_dir=str(tmp_path), backend="cuda")


def test_a_new_measurement_does_not_change_a_resumed_run() -> None:
    """In a process of its own, where Triton's kernels run as Python, so that two backends can take turns."""
    pytest.importorskip("triton")
    more = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/support/resumed_backend_cases.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-W", "ignore::RuntimeWarning"],
        cwd=ROOT,
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout, done.stdout
