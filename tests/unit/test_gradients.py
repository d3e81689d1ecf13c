"""Is a run refused in its first step where something that is to train gets no gradient?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch.utils.checkpoint import checkpoint

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.errors import TrainingError
from dpo_engine.model.adapters import add_lora
from dpo_engine.train.gradients import check_gradients
from support.tiny_pairs import random_pairs, tiny_llama


def trainer(folder: Path, policy: Any, **changes: Any) -> DPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
        "max_tokens_per_forest": 60, "reference_cache": "off",
    }  # fmt: skip
    return DPOTrainer(model=policy, args=DPOConfig(**(settings | changes)), train_dataset=random_pairs(8))


def unchanged(policy: Any, run: DPOTrainer) -> None:
    """Nothing of the policy moves although a step is tried."""
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    with pytest.raises(TrainingError) as refusal:
        run.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    raise refusal.value


def test_an_adapter_on_a_layer_that_scoring_does_not_use_is_refused_before_the_optimiser_acts(tmp_path: Path) -> None:
    model = tiny_llama()
    model.spare = torch.nn.Linear(32, 32, bias=False)
    policy = add_lora(model, r=4, target_modules=["q_proj", "spare"])
    with pytest.raises(
        TrainingError, match=r"2 of 6 trainable parameters got no gradient .* base_model\.model\.spare\.lora_A\.default"
    ) as found:
        unchanged(policy, trainer(tmp_path, policy))
    assert "lora_target_modules without them, or freeze them" in str(found.value)


def reentrant(policy: Any) -> None:
    """Checkpointing as it is turned on by hand, without making the embeddings' output require a gradient."""
    policy.get_base_model()._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("head", [True, False])
def test_reentrant_checkpointing_without_input_gradients_is_refused(tmp_path: Path, head: bool) -> None:
    policy = add_lora(tiny_llama(), r=4, head=head)
    run = trainer(tmp_path, policy)
    reentrant(policy)
    names = "28 of 30" if head else "28 of 28"
    with pytest.raises(TrainingError, match=rf"{names} trainable parameters got no gradient") as found:
        unchanged(policy, run)
    assert str(found.value).count("lora_") == 5 + 1 and "use_reentrant: false" in str(found.value)


@pytest.mark.parametrize("options", [{}, {"head": True}, {"use_dora": True}])
def test_ordinary_runs_give_all_that_trains_a_gradient(tmp_path: Path, options: dict[str, Any]) -> None:
    policy = add_lora(tiny_llama(), r=4, **options)
    trainer(tmp_path, policy, gradient_checkpointing=True).train()


def test_experts_that_no_token_was_routed_to_are_excused() -> None:
    model = torch.nn.ModuleDict(
        {"mlp": torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2)})}
    )
    check_gradients(model)
    model["router"] = torch.nn.Linear(2, 2)
    with pytest.raises(TrainingError, match=r"2 of 4 trainable parameters .*: router\.weight, router\.bias;"):
        check_gradients(model)
