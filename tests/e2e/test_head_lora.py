"""Does the trainer train LoRA on the head as plain DPO does, and save what it trained?"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.model.adapters import add_lora
from support.gradients import GradientRecorder
from support.naive_dpo import completion_logps, train_naively
from support.tiny_pairs import random_pairs, tiny_llama


def trained(folder: Path, model: torch.nn.Module, data: Any, **changes: Any) -> tuple[DPOTrainer, GradientRecorder]:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    recorder = GradientRecorder()
    args = DPOConfig(**(settings | changes))
    trainer = DPOTrainer(model=model, args=args, train_dataset=data, callbacks=[recorder])
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj", "lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head only", "head and layers", "whole head"],
)
def test_losses_and_gradients_equal_a_naive_trainer(tmp_path: Path, config: dict[str, Any]) -> None:
    data = random_pairs(16)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config))
    naive_model = copy.deepcopy(model)
    naive = train_naively(naive_model, [data.trees[i : i + 4] for i in range(0, 16, 4)], beta=0.1, lr=1e-2)
    trainer, recorder = trained(tmp_path, model, data)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(naive.losses, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] != pytest.approx(losses[0], abs=1e-3)
    for mine, its in zip(recorder.steps, naive.gradients, strict=True):
        assert mine.keys() == its.keys() and any("lm_head" in name for name in mine)
        scale = torch.stack([gradient.norm() for gradient in its.values()]).norm().item()
        for name in mine:
            error = (mine[name] - its[name]).norm().item()
            assert error <= 1e-5 * max(its[name].norm().item(), 0.1 * scale), name


def test_a_saved_adapter_on_the_head_gives_the_same_model_apart_and_merged(tmp_path: Path) -> None:
    data = random_pairs(8)
    base = tiny_llama()
    policy = add_lora(copy.deepcopy(base), r=4, alpha=8, target_modules=["q_proj", "lm_head"])
    trainer, _ = trained(tmp_path, policy, data)
    trainer.save_model(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = completion_logps(trainer.model, data.trees)
        apart = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        torch.testing.assert_close(completion_logps(apart, data.trees), expected)
        merged = apart.merge_and_unload()
        torch.testing.assert_close(completion_logps(merged, data.trees), expected, rtol=1e-5, atol=1e-4)
        assert not torch.allclose(completion_logps(base, data.trees), expected, atol=1e-2)


def test_checkpointing_trains_the_same_adapter_on_the_head(tmp_path: Path) -> None:
    data = random_pairs(8)
    runs = [
        trained(
            tmp_path,
            add_lora(tiny_llama(), r=4, alpha=8, target_modules=["q_proj", "lm_head"]),
            data,
            max_steps=2,
            gradient_checkpointing=checkpointing,
        )[1]
        for checkpointing in (False, True)
    ]
    for plain, saving in zip(runs[0].steps, runs[1].steps, strict=True):
        for name in plain:
            torch.testing.assert_close(plain[name], saving[name], rtol=1e-4, atol=1e-6, msg=name)
