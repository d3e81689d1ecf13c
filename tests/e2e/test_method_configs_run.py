"""Does the config of every method run as it stands, on the real small model?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("gguf")

from dpo_engine.errors import ModelError
from dpo_engine.model.smollm2 import smollm2_folder
from dpo_engine.train.run import TrainConfig, run_training

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "methods").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return str(smollm2_folder())
    except ModelError as error:
        pytest.skip(f"the packaged model cannot be had here: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains_two_steps_to_another_finite_loss(
    path: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    keys = yaml.safe_load(path.read_text("utf-8"))
    keys |= {"model": folder, "output_dir": str(tmp_path / "run"), "max_steps": 2, "warmup_steps": 0, "picture": False}
    # Two trees a step, the same in both, so that losses can be compared.
    keys |= {"max_pairs": 2, "per_device_train_batch_size": 2, "disable_tqdm": True}
    result = run_training(TrainConfig(**keys), lambda line: None)
    assert result["steps"] == 2 and (tmp_path / "run" / "adapter_model.safetensors").exists()
    losses = [entry["loss"] for entry in _log(tmp_path / "run") if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[0] != losses[1]


def _log(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text("utf-8"))["log_history"]
