"""Does a loss that couples examples see the whole optimiser step, however its trees are packed and accumulated?"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig
from torch.nn.functional import logsigmoid

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.data import PairData
from dpo_engine.errors import TrainingError
from dpo_engine.train import whole_step
from support.gradients import GradientRecorder, assert_same_gradients
from support.naive_dpo import completion_logps
from support.tiny_pairs import random_pairs, tiny_llama

BETA = 0.4
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(
    folder: Path, data: PairData, *, model: torch.nn.Module | None = None, lora: bool = False, **changes: Any
) -> tuple[DPOTrainer, GradientRecorder]:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "method": "bco",
        "beta": BETA,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    seen = GradientRecorder()
    run = DPOTrainer(
        model=model or tiny_llama(),
        args=DPOConfig(**(settings | changes)),
        train_dataset=data,
        peft_config=LORA if lora else None,
        callbacks=[seen],
    )
    return run, seen


def logged(run: DPOTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def naive_bco(model: torch.nn.Module, steps: Sequence[Any]) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Each step in one piece, in plain torch: delta is the mean reward of all completions seen so far."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    losses, gradients, rewards_seen = [], [], torch.empty(0)
    for pairs in steps:
        rewards = BETA * (completion_logps(model, pairs) - completion_logps(reference, pairs))
        rewards_seen = torch.cat([rewards_seen, rewards.detach()])
        delta = rewards_seen.mean()
        loss = (-logsigmoid(rewards[0::2] - delta) - logsigmoid(delta - rewards[1::2])).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
    return losses, gradients


@pytest.mark.parametrize(
    "packing",
    [
        {},
        {"max_tokens_per_forest": 60},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens_per_forest": 45},
        {"max_tokens_per_forest": 60, "gradient_checkpointing": True},
    ],
    ids=["one forest", "several", "accumulated", "checkpointed"],
)
def test_bco_trains_as_if_the_step_were_one_piece(tmp_path: Path, packing: dict[str, Any]) -> None:
    data = random_pairs(24)
    losses, gradients = naive_bco(tiny_llama(), [data.trees[i : i + 8] for i in (0, 8, 16)])
    run, seen = trainer(tmp_path, data, **packing)
    run.train()
    assert logged(run) == pytest.approx(losses, rel=1e-5)
    assert losses[0] == pytest.approx(2 * math.log(2)) and abs(losses[2] - losses[0]) > 1e-2
    assert_same_gradients(seen.steps, gradients)


def test_the_packing_of_these_steps_matters_to_a_loss_that_sees_only_its_forest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above could not fail if the mean reward of a forest were near that of its step."""
    data = random_pairs(24)
    losses, _ = naive_bco(tiny_llama(), [data.trees[i : i + 8] for i in (0, 8, 16)])
    monkeypatch.setattr("dpo_engine.train.method_arguments.get_method", _forest_by_forest)
    run, _ = trainer(tmp_path, data, max_tokens_per_forest=60)
    run.train()
    assert logged(run)[1:] != pytest.approx(losses[1:], rel=1e-4)


def _forest_by_forest(name: str, weights: Any) -> Any:
    from dataclasses import replace

    from dpo_engine.losses import get_method

    return replace(get_method(name, weights), whole_step=False, baseline=None)


def test_dropout_draws_the_same_masks_in_both_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_pairs(16)
    compared = []
    own = whole_step.StepPart.objective

    def compare(self: Any, stats: Any) -> torch.Tensor:
        compared.append(torch.equal(stats.chosen_logps, self.stats.chosen_logps))
        return own(self, stats)

    monkeypatch.setattr(whole_step.StepPart, "objective", compare)
    model = tiny_llama(attention_dropout=0.3)
    run, _ = trainer(tmp_path, data, model=model, max_tokens_per_forest=60, max_steps=2)
    run.train()
    assert len(compared) >= 4 and all(compared)


def test_a_resumed_run_goes_on_with_the_running_mean_of_its_checkpoint(tmp_path: Path) -> None:
    data = random_pairs(32)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_tokens_per_forest": 60, "lora": True}
    whole, _ = trainer(tmp_path, data, **settings)
    whole.train()
    resumed, _ = trainer(tmp_path, data, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.judge.running.count == whole.judge.running.count == 32
    assert logged(resumed) == logged(whole)
    forgetful, _ = trainer(tmp_path, data, **settings)
    forgetful.restore_run = lambda _: None  # type: ignore[method-assign]
    forgetful.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(forgetful) != logged(whole)


def test_evaluation_judges_a_data_set_as_one_step_whatever_its_batches(tmp_path: Path) -> None:
    data, held_out = random_pairs(8), random_pairs(9, seed=3)
    policy, reference = tiny_llama(seed=1), tiny_llama(seed=2)
    found = []
    for changes in ({"per_device_eval_batch_size": 9}, {"per_device_eval_batch_size": 2, "max_tokens_per_forest": 45}):
        args = DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, method="bco", beta=BETA, dataloader_pin_memory=False, **changes
        )
        run = DPOTrainer(model=policy, ref_model=reference, args=args, train_dataset=data, eval_dataset=held_out)
        found.append(run.evaluate()["eval_loss"])
    with torch.no_grad():
        rewards = BETA * (completion_logps(policy, held_out.trees) - completion_logps(reference, held_out.trees))
    delta = rewards.mean()
    expected = (-logsigmoid(rewards[0::2] - delta) - logsigmoid(delta - rewards[1::2])).mean().item()
    assert found == pytest.approx([expected] * 2, rel=1e-5)


def test_a_start_other_than_two_log_two_is_refused(tmp_path: Path) -> None:
    run, _ = trainer(tmp_path, random_pairs(8), max_tokens_per_forest=60)
    with torch.no_grad():
        next(run.model.parameters()).add_(0.1)  # the policy is no longer the copy that is its reference
    with pytest.raises(TrainingError, match=r"a bco loss of the first batch must be 1\.386294"):
        run.train()
