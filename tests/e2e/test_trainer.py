"""Does the trainer compute what plain DPO computes, and refuse to go on where it cannot be right?"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.data import PairData
from dpo_engine.errors import ConfigError, DataError, TrainingError
from support.gradients import GradientRecorder, assert_same_gradients
from support.naive_dpo import completion_logps, train_naively
from support.tiny_pairs import random_pairs, tiny_llama

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def config(folder: Path, **changes: Any) -> DPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    return DPOConfig(**(settings | changes))


def train(model: torch.nn.Module, data: PairData, args: DPOConfig, **more: Any) -> tuple[DPOTrainer, GradientRecorder]:
    recorder = GradientRecorder()
    trainer = DPOTrainer(model=model, args=args, train_dataset=data, callbacks=[recorder], **more)
    trainer.train()
    return trainer, recorder


def logged(trainer: DPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_losses_and_gradients_of_five_steps_equal_a_naive_trainer(tmp_path: Path, lora: bool) -> None:
    data = random_pairs(20)
    model = tiny_llama()
    if lora:
        model = get_peft_model(model, LORA)
    naive_model = copy.deepcopy(model)
    naive = train_naively(naive_model, [data.trees[i : i + 4] for i in range(0, 20, 4)], beta=0.1, lr=1e-2)
    trainer, recorder = train(model, data, config(tmp_path))
    assert logged(trainer, "loss") == pytest.approx(naive.losses, rel=1e-5)
    assert naive.losses[-1] != pytest.approx(math.log(2), abs=1e-3)
    assert_same_gradients(recorder.steps, naive.gradients)


def test_a_tied_head_trains_with_the_gradient_of_both_uses(tmp_path: Path) -> None:
    data = random_pairs(8)
    model = tiny_llama(tie_word_embeddings=True)
    naive = train_naively(copy.deepcopy(model), [data.trees[:4], data.trees[4:]], beta=0.1, lr=1e-2)
    _, recorder = train(model, data, config(tmp_path, max_steps=2))
    assert_same_gradients(recorder.steps, naive.gradients)


def test_gradient_accumulation_and_packing_change_nothing_but_rounding(tmp_path: Path) -> None:
    data = random_pairs(16)
    settings = [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "max_tokens_per_forest": 60},
        {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    ]
    runs = [train(tiny_llama(), data, config(tmp_path, max_steps=2, **s)) for s in settings]
    for trainer, recorder in runs[1:]:
        assert logged(trainer, "loss") == pytest.approx(logged(runs[0][0], "loss"), rel=1e-5)
        assert_same_gradients(recorder.steps, runs[0][1].steps)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_trains_the_same_adapters(tmp_path: Path, name: str) -> None:
    if name not in DPOConfig.__dataclass_fields__:
        pytest.skip(f"this transformers has no {name}")
    data = random_pairs(8)
    _, recorded = train(tiny_llama(), data, config(tmp_path, max_steps=2), peft_config=LORA)
    saving, recorded_saving = train(tiny_llama(), data, config(tmp_path, max_steps=2, **{name: True}), peft_config=LORA)
    assert_same_gradients(recorded_saving.steps, recorded.steps)
    assert max(gradient.abs().max() for gradient in recorded_saving.steps[1].values()) > 0
    assert saving.model.get_base_model().is_gradient_checkpointing


def test_a_reference_computed_beforehand_changes_nothing_but_rounding(tmp_path: Path) -> None:
    data = random_pairs(12)
    for lora in (None, LORA):
        live, recorded = train(tiny_llama(), data, config(tmp_path, max_steps=3), peft_config=lora)
        args = config(tmp_path, max_steps=3, precompute_ref_log_probs=True, max_tokens_per_forest=90)
        before, recorded_before = train(tiny_llama(), data, args, peft_config=lora)
        assert logged(before, "loss") == pytest.approx(logged(live, "loss"), rel=1e-5)
        assert logged(before, "rewards/margins") == pytest.approx(logged(live, "rewards/margins"), rel=1e-4, abs=1e-6)
        assert_same_gradients(recorded_before.steps, recorded.steps)


def test_a_last_step_with_fewer_pairs_is_the_mean_over_those_it_has(tmp_path: Path) -> None:
    data = random_pairs(6)
    args = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    naive = train_naively(tiny_llama(), [data.trees[:4], data.trees[4:]], beta=0.1, lr=1e-2)
    trainer, recorder = train(tiny_llama(), data, args)
    assert logged(trainer, "loss") == pytest.approx(naive.losses, rel=1e-5)
    assert_same_gradients(recorder.steps, naive.gradients)


def test_logged_metrics_are_those_of_the_policy_and_the_reference(tmp_path: Path) -> None:
    data = random_pairs(4)
    policy, reference = tiny_llama(seed=1), tiny_llama(seed=2)
    with torch.no_grad():
        pi, ref = completion_logps(policy, data.trees), completion_logps(reference, data.trees)
    rewards = 0.1 * (pi - ref)
    trainer, _ = train(policy, data, config(tmp_path, max_steps=1), ref_model=reference)
    [first] = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = {
        "logps/chosen": pi[0::2].mean(),
        "logps/rejected": pi[1::2].mean(),
        "rewards/chosen": rewards[0::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/margins": (rewards[0::2] - rewards[1::2]).mean(),
        "rewards/accuracies": (rewards[0::2] > rewards[1::2]).float().mean(),
    }
    for name, value in expected.items():
        assert first[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_evaluation_reports_means_over_all_pairs_and_a_tie_before_training(tmp_path: Path) -> None:
    data = random_pairs(7)
    args = config(tmp_path, per_device_eval_batch_size=3)
    trainer = DPOTrainer(model=get_peft_model(tiny_llama(), LORA), args=args, train_dataset=data, eval_dataset=data)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval_rewards/margins"] == 0.0
    assert metrics["eval_rewards/accuracies"] == 0.5
    with torch.no_grad():
        logps = completion_logps(trainer.model, data.trees)
    assert metrics["eval_logps/chosen"] == pytest.approx(logps[0::2].mean().item(), rel=1e-5)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_dropout_is_off_in_the_reference_and_at_the_start(tmp_path: Path, lora: bool) -> None:
    data = random_pairs(8)
    model = tiny_llama(attention_dropout=0.5)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    trainer = DPOTrainer(model=model, args=config(tmp_path, max_steps=1), train_dataset=data)
    forest = trainer.packed(data.trees[:4]).forests[0]
    model.train()
    first, second = (trainer.scorer.reference_token_logps(model, forest) for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules() if module is not trainer.reference)
    noisy = [trainer.scorer.token_logps(model, forest) for _ in range(2)]
    assert not torch.equal(*noisy)
    trainer.train()  # the start check runs in eval mode, so that dropout does not look like a fault


def test_the_reference_of_full_training_stays_what_the_policy_was(tmp_path: Path) -> None:
    data = random_pairs(8)
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)  # changed in memory only: no file holds this model
        start = completion_logps(model, data.trees)
    trainer, _ = train(model, data, config(tmp_path))
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(completion_logps(trainer.reference, data.trees), start)
        assert not torch.allclose(completion_logps(trainer.model, data.trees), start)


def test_a_reference_that_is_not_the_start_stops_the_run_with_the_numbers(tmp_path: Path) -> None:
    data = random_pairs(4)
    trainer = DPOTrainer(model=tiny_llama(), args=config(tmp_path), train_dataset=data)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    with pytest.raises(TrainingError, match=r"must be 0\.693147 .* but it is \d"):
        trainer.train()


def test_another_reference_model_may_start_anywhere(tmp_path: Path) -> None:
    trainer, _ = train(tiny_llama(seed=1), random_pairs(4), config(tmp_path, max_steps=1), ref_model=tiny_llama(seed=2))
    assert logged(trainer, "loss")[0] != pytest.approx(math.log(2), abs=1e-3)


def test_an_adapter_trained_before_goes_on_training_against_the_base_model(tmp_path: Path) -> None:
    data = random_pairs(8)
    trainer, _ = train(get_peft_model(tiny_llama(), LORA), data, config(tmp_path))
    again, _ = train(trainer.model, data, config(tmp_path, max_steps=1))
    assert logged(again, "loss")[0] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path, lora: bool) -> None:
    data = random_pairs(24)

    def start(folder: Path, **changes: Any) -> DPOTrainer:
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}
        args = config(folder, train_sampling_strategy="random", **(settings | changes))
        model = tiny_llama()
        return DPOTrainer(model=model, args=args, train_dataset=data, peft_config=LORA if lora else None)

    whole = start(tmp_path / "whole")
    whole.train()
    resumed = start(tmp_path / "whole", output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_pair_over_the_forest_budget_is_named_when_the_data_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row \d+: the pair takes \d+ tokens, more than max_tokens_per_forest=8"):
        DPOTrainer(model=tiny_llama(), args=config(tmp_path, max_tokens_per_forest=8), train_dataset=random_pairs(9))


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(ConfigError, match="processing_class is None"):
        DPOTrainer(model=tiny_llama(), args=config(tmp_path), train_dataset=rows)


def test_the_policy_is_not_its_own_reference(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match="ref_model is the model being trained"):
        DPOTrainer(model=model, ref_model=model, args=config(tmp_path), train_dataset=random_pairs(4))


def test_a_micro_batch_reads_nothing_from_the_device(tmp_path: Path) -> None:
    """Counted by dispatch: `_local_scalar_dense` is what `.item()`, `bool()` and `float()` of a tensor come to."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                self.reads += 1
            return func(*args, **(kwargs or {}))

    data = random_pairs(8)
    trainer = DPOTrainer(model=get_peft_model(tiny_llama(), LORA), args=config(tmp_path), train_dataset=data)
    batch = trainer.packed(data.trees)
    trainer.training_step(trainer.model, batch, 8)  # the first one checks the start value, which is read once a run
    # The CPU path looks at its own memory (labels in range, rescaling); only the trainer around it is meant here.
    original = trainer.scorer.token_logps
    trainer.scorer.token_logps = lambda model, forest: torch.zeros(len(forest.labels), requires_grad=True) + 0.0
    trainer.scorer.reference_token_logps = lambda model, forest: torch.zeros(len(forest.labels))
    with Reads() as counter:
        trainer.training_step(trainer.model, batch, 8)
    assert counter.reads == 0
    trainer.scorer.token_logps = original


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ld_dpo_weighs_the_tokens_beyond_the_shorter_completion_in_policy_and_reference(
    tmp_path: Path, alpha: float
) -> None:
    data = random_pairs(4, seed=3)
    policy, reference = tiny_llama(seed=1), tiny_llama(seed=2)

    def cut(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the tokens up to the shorter length, and over all, each (B, 2)."""
        from dpo_engine.data import TokenizedTree

        short = [
            TokenizedTree(
                prompt_ids=tree.prompt_ids,
                completions=tuple(ids[: min(map(len, tree.completions))] for ids in tree.completions),
                origin=tree.origin,
            )
            for tree in data.trees
        ]
        with torch.no_grad():
            return completion_logps(model, short).view(-1, 2), completion_logps(model, data.trees).view(-1, 2)

    (pi_short, pi), (ref_short, ref) = cut(policy), cut(reference)
    h = ((1 - alpha) * (pi_short - ref_short) + alpha * (pi - ref)) @ torch.tensor([1.0, -1.0])
    expected = torch.nn.functional.softplus(-0.1 * h).mean().item()
    args = config(tmp_path, max_steps=1, method="ld_dpo", ld_alpha=alpha)
    trainer, _ = train(policy, data, args, ref_model=reference)
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ipo_trains_on_the_papers_loss(tmp_path: Path, reduction: str) -> None:
    data = random_pairs(4, seed=3)
    policy, reference = tiny_llama(seed=1), tiny_llama(seed=2)
    with torch.no_grad():
        ratios = (completion_logps(policy, data.trees) - completion_logps(reference, data.trees)).view(-1, 2)
    if reduction == "mean":
        ratios = ratios / torch.tensor([[len(ids) for ids in tree.completions] for tree in data.trees])
    expected = ((ratios[:, 0] - ratios[:, 1] - 1 / (2 * 0.2)) ** 2).mean().item()
    args = config(tmp_path, max_steps=1, method="ipo", beta=0.2, ipo_reduction=reduction)
    trainer, _ = train(policy, data, args, ref_model=reference)
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)
