"""Are Liger's kernels right under a forest's positions, and is the setting never transformers' to act on?"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.errors import ConfigError
from dpo_engine.model.liger import choose_liger
from support.imports import ROOT
from support.tiny_pairs import random_pairs, tiny_llama


def config(folder: Path, **changes: Any) -> DPOConfig:
    settings: dict[str, Any] = {"output_dir": str(folder), "use_cpu": True, "dataloader_pin_memory": False}
    return DPOConfig(**(settings | changes))


def test_a_shared_prompts_log_probs_and_gradients_are_those_without_liger() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-m", "support.liger_case"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layout"] == "shared" and found["marked"]
    assert found["replaced"] == ["LigerRMSNorm.forward", "LigerSwiGLUMLP.forward"]
    assert found["line"].startswith("liger kernels: rope, rms_norm, swiglu of llama (liger-kernel ")
    assert 0 < found["logps"] <= 2e-5 and found["gradients"] <= 1e-5
    assert found["space"] == ["compute.liger: True here, nothing there"]


@pytest.mark.parametrize(
    ("given", "meant"), [(True, "on"), (False, "off"), ("on", "on"), ("false", "off"), ("True", "on"), ("auto", "auto")]
)
def test_the_setting_is_a_word_that_transformers_takes_for_no(tmp_path: Path, given: Any, meant: str) -> None:
    args = config(tmp_path, use_liger_kernel=given)
    assert args.use_liger_kernel == meant and not args.use_liger_kernel
    for copy in (replace(args), pickle.loads(pickle.dumps(args))):
        assert copy.use_liger_kernel == meant and not copy.use_liger_kernel
    assert json.loads(args.to_json_string())["use_liger_kernel"] == meant


def test_yaml_and_flags_say_it_alike(tmp_path: Path) -> None:
    from dpo_engine.cli.options import parse
    from dpo_engine.train.run import TrainConfig

    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: d\noutput_dir: o\nuse_liger_kernel: off\n")
    assert parse(TrainConfig, [str(path)]).use_liger_kernel == "off"
    assert parse(TrainConfig, [str(path), "--use_liger_kernel"]).use_liger_kernel == "on"


def test_what_cannot_be_is_refused_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="use_liger_kernel='perhaps'"):
        config(tmp_path, use_liger_kernel="perhaps")
    with pytest.raises(ConfigError, match="no cross_entropy or fused_linear_cross_entropy"):
        config(tmp_path, liger_kernel_config={"rope": True, "fused_linear_cross_entropy": True})
    model: Any = tiny_llama()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "liger_kernel" else object())
    with pytest.raises(ConfigError, match="use_liger_kernel=on, but liger-kernel is not installed"):
        choose_liger(model, "on", torch.device("cuda"))
    used = choose_liger(model, "auto", torch.device("cuda"))
    assert not used.on and used.line is not None and "liger-kernel is not installed" in used.line
    monkeypatch.undo()
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    with pytest.raises(ConfigError, match="for CUDA devices, and this run is on cpu; set it to auto or off"):
        DPOTrainer(model=model, args=config(tmp_path, use_liger_kernel="on"), train_dataset=random_pairs(4))


def test_on_a_cpu_auto_changes_nothing_and_says_nothing(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    trainer = DPOTrainer(model=model, args=config(tmp_path), train_dataset=random_pairs(4))
    assert not trainer.liger.on and not any("liger" in line for line in trainer.lines())
    assert "Liger" not in model.model.layers[0].mlp.forward.__func__.__qualname__ + repr(model.model.norm)
