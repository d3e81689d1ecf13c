"""Does every method train as its formula says, through the real trainer, however a step is split into forests?"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.batch import Tree
from dpo_engine.losses import LOSSES, ListStats, UnpairedStats, get_method
from support.gradients import GradientRecorder, assert_same_gradients
from support.naive_methods import train_naively
from support.tiny_pairs import VOCABULARY, random_pairs, tiny_llama

CASES: dict[str, dict[str, Any]] = {name: {"method": name} for name in LOSSES} | {
    "tr_dpo": {"method": "tr_dpo", "ref_model_sync_steps": 2},
    "dpo of ranked lists": {"method": "dpo"},
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


def trees_for(case: str, count: int, seed: int = 1) -> list[Any]:
    """Random pairs; labelled completions, alone or two of a prompt; lists of three or four, with ties."""
    pairs, needs = random_pairs(count, seed=seed).trees, get_method(CASES[case]["method"]).needs
    draw = random.Random(seed)
    if needs is UnpairedStats:
        return [
            Tree(prompt_ids=tree.prompt_ids, completions=tree.completions, desirable=(True, False))
            if index % 3 == 0
            else Tree(prompt_ids=tree.prompt_ids, completions=tree.completions[:1], desirable=(index % 3 == 1,))
            for index, tree in enumerate(pairs)
        ]
    if needs is not ListStats and "lists" not in case:
        return pairs
    lists = []
    for index, tree in enumerate(pairs):
        more = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 9))] for _ in range(1 + index % 2)]
        ranks = ((0, 1, 1) if index % 4 == 0 else (0, 1, 2)) if len(more) == 1 else (0, 1, 1, 2)
        lists.append(Tree(prompt_ids=tree.prompt_ids, completions=[*tree.completions, *more], ranks=ranks))
    return lists


def trainer(folder: Path, case: str, trees: list[Any], **changes: Any) -> DPOTrainer:
    options = {key: changes.pop(key, None) for key in ("ref_model", "peft_config", "eval_dataset", "callbacks")}
    model = changes.pop("model", None) or tiny_llama()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "learning_rate": 1e-2,
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
    trees = trees_for(case, 24)
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=5)
    needs_reference = get_method(CASES[case]["method"]).needs_reference
    seen = GradientRecorder()
    run = trainer(
        tmp_path, case, trees, model=tiny_llama(seed=0), ref_model=tiny_llama(seed=5) if needs_reference else None,
        max_steps=3, callbacks=[seen], **SPLITS[split],
    )  # fmt: skip
    prepared = list(run.train_dataset)
    naive = train_naively(run.method, run.config, policy, reference, [prepared[i : i + 8] for i in (0, 8, 16)], lr=1e-2)
    run.train()
    assert logged(run) == pytest.approx(naive.losses, rel=2e-5)
    assert_same_gradients(seen.steps, naive.gradients)
    if case == "kto":
        assert max(naive.baselines) > 1 and logged(run, "kl/baseline") == pytest.approx(
            naive.baselines, rel=1e-4, abs=1e-4
        )


def success(case: str, run: DPOTrainer) -> tuple[float, float]:
    """The method's own measure before and after, larger is better."""
    method = run.method.name
    name = {"sft": "logps/chosen", "discopop": "loss"}.get(method, "rewards/margins")
    sign = -1.0 if name == "loss" else 1.0
    before, after = (sign * entry[f"eval_{name}"] for entry in run.state.log_history if f"eval_{name}" in entry)
    return before, after


@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_move_its_own_measure_and_a_resumed_run_is_the_same_run(tmp_path: Path, case: str) -> None:
    trees = trees_for(case, 12)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "max_steps": 30, "save_strategy": "steps", "save_steps": 22, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_tokens_per_forest": 70, "learning_rate": 5e-3, "peft_config": lora,
        "train_sampling_strategy": "random",
    }  # fmt: skip
    whole = trainer(tmp_path, case, trees, eval_dataset=trees, **settings)
    whole.evaluate()
    whole.train()
    whole.evaluate()
    before, after = success(case, whole)
    assert after > before + 1e-3 * abs(before), f"{before} -> {after}"
    again = trainer(tmp_path, case, trees, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-22"))
    assert logged(again)[22:] == logged(whole)[22:] and len(logged(whole)) == 30
    if whole.method.baseline is not None:
        assert again._baseline.count == whole._baseline.count > 0
    assert torch.equal(*(torch.cat([p.flatten() for p in run.model.parameters()]) for run in (again, whole)))
