"""Does the reference of TR-DPO follow its policy, as a copy and as an adapter, and is what could not be right refused?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.model.existing_adapters import twin_parameters
from dpo_engine.train.moving_reference import REFERENCE_FILE
from support.naive_dpo import completion_logps
from support.tiny_pairs import random_pairs, tiny_llama

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(folder: Path, *, lora: bool = True, reference_cache: Any = None, **changes: Any) -> DPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "method": "tr_dpo",
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.25,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    options = {name: changes.pop(name, None) for name in ("ref_model",)}
    data = changes.pop("data", None) or random_pairs(8)
    args = DPOConfig(**(settings | changes))
    return DPOTrainer(
        model=tiny_llama(), args=args, train_dataset=data, peft_config=LORA if lora else None,
        reference_cache=reference_cache, **options,
    )  # fmt: skip


def test_a_copy_takes_on_its_share_of_the_policy(tmp_path: Path) -> None:
    run = trainer(tmp_path, lora=False)
    start = {name: p.clone() for name, p in tiny_llama().named_parameters()}
    run.train()
    for name, its in run.reference.named_parameters():
        mine = dict(run.model.named_parameters())[name]
        assert not torch.equal(mine, start[name])
        torch.testing.assert_close(its, 0.25 * mine + 0.75 * start[name])


def test_an_adapter_beside_the_one_that_trains_is_mixed_factor_by_factor_and_is_what_the_loss_compares_with(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path)
    start = {name: its.clone() for name, (_, its) in twin_parameters(run.model).items()}
    assert all(torch.equal(mine, start[name]) for name, (mine, _) in twin_parameters(run.model).items())
    run.train()
    for name, (mine, its) in twin_parameters(run.model).items():
        torch.testing.assert_close(its, 0.25 * mine + 0.75 * start[name])
        assert not its.requires_grad
    # The reference says what a model with the mixed adapter says.
    (forest,) = run.packed(run.train_dataset.trees).forests
    said = torch.stack(
        [part.sum() for part in run.scorer.reference_token_logps(run.model, forest).split(forest.lengths)]
    )
    run.model.set_adapter("reference")
    with torch.no_grad():
        expected = completion_logps(run.model.eval(), [run.train_dataset.trees[i] for i in _order(run, forest)])
    torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-4)


def _order(run: DPOTrainer, forest: Any) -> list[int]:
    """Which trees lie in the forest, in its order: longest first."""
    from dpo_engine.batch import tree_cost

    trees = run.train_dataset.trees
    return sorted(range(len(trees)), key=lambda index: tree_cost(trees[index]), reverse=True)


def test_a_checkpoint_without_its_reference_is_refused(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, **settings).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / REFERENCE_FILE).is_file() and not (tmp_path / "checkpoint-2" / "reference").exists()
    (checkpoint / REFERENCE_FILE).unlink()
    with pytest.raises(ConfigError, match="without it this checkpoint cannot be gone on from"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference_cache": "on"}, "reference_cache='on', but the reference of method tr_dpo moves"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True, but the reference of method tr_dpo moves"),
        ({"method": "tdpo", "precompute_ref_log_probs": True}, "the reference of method tdpo is asked for whole"),
    ],
)
def test_what_would_keep_a_reference_that_moves_is_refused(tmp_path: Path, changes: Any, said: str) -> None:
    if changes.get("method") == "tdpo":
        changes = changes | {"ref_model_sync_steps": None, "ref_model_mixup_alpha": None}
    cache = changes.pop("reference_cache", None)
    with pytest.raises(ConfigError, match=said):
        trainer(tmp_path, **({"reference_cache": cache} | changes))


def test_a_second_model_for_a_method_without_a_reference_is_refused(tmp_path: Path) -> None:
    plain = {"ref_model_sync_steps": None, "ref_model_mixup_alpha": None}
    with pytest.raises(ConfigError, match="ref_model came to method simpo, which needs no reference"):
        trainer(tmp_path, method="simpo", ref_model=tiny_llama(), **plain)


def test_a_method_without_a_reference_asks_none_and_copies_no_model(tmp_path: Path) -> None:
    plain = {"ref_model_sync_steps": None, "ref_model_mixup_alpha": None}
    for method in ("simpo", "cpo", "orpo", "sft"):
        run = trainer(tmp_path, lora=False, method=method, **plain)

        def never(*_: Any) -> Any:
            raise AssertionError("the reference was asked")

        run.scorer.reference_token_logps = never  # type: ignore[method-assign]
        run.train()
        assert run.reference is None and run.references.filled.rows == 0


def test_log_probs_that_the_data_brings_are_refused_where_the_reference_moves(tmp_path: Path) -> None:
    from dataclasses import replace

    data = random_pairs(8)
    data.trees[0] = replace(data.trees[0], reference_logps=(-3.0, -4.0))
    with pytest.raises(DataError, match="brings reference log-probs, but the reference of method tr_dpo moves"):
        trainer(tmp_path, data=data).train()
