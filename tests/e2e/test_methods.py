"""Does every method train as its formula says, through the real trainer, however a step is split into forests?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.losses import LOSSES, get_method
from support.gradients import GradientRecorder, assert_same_gradients
from support.method_trees import trees_for
from support.naive_methods import train_naively
from support.tiny_pairs import tiny_llama

CASES: dict[str, dict[str, Any]] = {name: {"method": name} for name in LOSSES} | {
    "tr_dpo": {"method": "tr_dpo", "ref_model_sync_steps": 2},
    "f_dpo, js": {"method": "f_dpo", "f_divergence_type": "js_divergence"},
    "dpo of ranked lists": {"method": "dpo"},
    "wpo of ranked lists": {"method": "wpo"},
    "ld_dpo of ranked lists, adjacent": {"method": "ld_dpo", "ranked_pairs": "adjacent"},
    "bco of ranked lists, best and worst": {"method": "bco", "ranked_pairs": "best_worst"},
    "a mixture": {"method": "dpo+bco+sft", "loss_weights": [0.8, 0.2, 1.0]},
    "a mixture of what needs most": {"method": "wpo+ld_dpo+tdpo+aot"},
}
SPLITS: dict[str, dict[str, Any]] = {
    "one forest": {"per_device_train_batch_size": 8},
    "accumulated in several": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_tokens_per_forest": 70,
    },
}


def data_for(case: str, count: int) -> list[Any]:
    return trees_for(CASES[case]["method"], count, ranked="lists" in case)


def trainer(folder: Path, case: str, trees: list[Any], **changes: Any) -> DPOTrainer:
    options = {key: changes.pop(key, None) for key in ("ref_model", "peft_config", "eval_dataset", "callbacks")}
    model = changes.pop("model", None) or tiny_llama()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "learning_rate": 1e-3,  # Adam makes much of what rounding did to small gradients
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "reference_cache": "off",
    }
    args = DPOConfig(**(settings | CASES[case] | changes))
    return DPOTrainer(model=model, args=args, train_dataset=trees, **options)


def logged(run: DPOTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_whole_steps_in_plain_torch(tmp_path: Path, case: str, split: str) -> None:
    trees = data_for(case, 24)
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=5)
    needs_reference = get_method(CASES[case]["method"]).needs_reference
    seen = GradientRecorder()
    run = trainer(
        tmp_path, case, trees, model=tiny_llama(seed=0), ref_model=tiny_llama(seed=5) if needs_reference else None,
        max_steps=3, callbacks=[seen], **SPLITS[split],
    )  # fmt: skip
    prepared = list(run.train_dataset)
    naive = train_naively(run.method, run.config, policy, reference, [prepared[i : i + 8] for i in (0, 8, 16)], lr=1e-3)
    run.train()
    assert logged(run) == pytest.approx(naive.losses, rel=2e-5)
    assert_same_gradients(seen.steps, naive.gradients)
    if case == "kto":
        assert max(naive.baselines) > 0.1 and logged(run, "kl/baseline") == pytest.approx(
            naive.baselines, rel=1e-4, abs=1e-4
        )


def success(run: DPOTrainer) -> float:
    """The method's own measure, larger is better."""
    name = {"sft": "logps/chosen", "discopop": "loss"}.get(run.method.name, "rewards/margins")
    return (-1.0 if name == "loss" else 1.0) * run.evaluate()[f"eval_{name}"]


@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_move_its_own_measure_and_a_resumed_run_is_the_same_run(tmp_path: Path, case: str) -> None:
    trees = data_for(case, 12)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "max_steps": 30, "save_strategy": "steps", "save_steps": 22, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_tokens_per_forest": 70, "learning_rate": 5e-3, "peft_config": lora,
        "train_sampling_strategy": "random",
    }  # fmt: skip
    whole = trainer(tmp_path, case, trees, eval_dataset=trees, **settings)
    before = success(whole)
    whole.train()
    after = success(whole)
    assert after > before + 1e-3 * abs(before), f"{before} -> {after}"
    again = trainer(tmp_path, case, trees, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-22"))
    assert logged(again)[22:] == logged(whole)[22:] and len(logged(whole)) == 30
    if whole.method.baseline is not None:
        assert again.judge.running.count == whole.judge.running.count > 0
    assert torch.equal(*(torch.cat([p.flatten() for p in run.model.parameters()]) for run in (again, whole)))
