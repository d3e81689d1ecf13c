"""Does KTO train on labelled completions as it says: a baseline the cache serves, steps of one class, weights that are advised?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.batch import Tree
from dpo_engine.errors import ConfigError, DataError
from support.method_trees import trees_for
from support.small_tokenizers import small_tokenizer
from support.tiny_pairs import random_pairs, tiny_llama

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(folder: Path, data: Any, *, tokenizer: Any = None, **changes: Any) -> DPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "method": "kto",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "reference_cache": str(folder / "reference"),
    }
    model = tiny_llama(vocab_size=len(tokenizer)) if tokenizer else tiny_llama()
    args = DPOConfig(**(settings | changes))
    return DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=LORA)


def losses(run: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_the_reference_cache_serves_mismatched_completions_in_every_run_whatever_its_seed(tmp_path: Path) -> None:
    data = trees_for("kto", 12)
    computed = []
    for seed in (1, 2):
        run = trainer(
            tmp_path, data if seed == 1 else data[::-1], seed=seed, data_seed=seed, num_train_epochs=1, max_steps=-1
        )
        run.train()
        computed.append(run.references.filled.computed)
    assert computed == [12, 0]


@pytest.mark.parametrize("label", [True, False])
def test_a_step_with_one_class_only_is_a_step(tmp_path: Path, label: bool) -> None:
    pairs = random_pairs(12).trees
    data = [Tree(prompt_ids=tree.prompt_ids, completions=tree.completions[:1], desirable=(label,)) for tree in pairs]
    run = trainer(tmp_path, data, max_steps=12)
    run.train()
    assert losses(run)[0] == pytest.approx(0.5) and losses(run)[-1] < 0.45
    side, other = ("chosen", "rejected") if label else ("rejected", "chosen")
    last = run.state.log_history[-2]
    assert last[f"rewards/{side}"] != 0 and f"rewards/{other}" not in last and "rewards/margins" not in last


def test_unbalanced_classes_are_said_with_the_weights_that_balance_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [*trees_for("kto", 9), *(t for t in trees_for("kto", 30, seed=2) if t.desirable == (False,))]
    good = sum(label for tree in data for label in tree.desirable)
    bad = sum(not label for tree in data for label in tree.desirable)
    assert good < bad
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, data)
    [line] = [record.getMessage() for record in caplog.records if "is advised" in record.getMessage()]
    assert f"{good} desirable and {bad} undesirable" in line
    weight = float(line.split("desirable_weight: ")[1].split(" ")[0])
    shares = [sum(tree.desirable) / len(tree.desirable) for tree in data]  # a tree counts once
    assert 0.999 <= weight * sum(shares) / (len(data) - sum(shares)) <= 1.334
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, data, desirable_weight=weight)
    assert not [record for record in caplog.records if "is advised" in record.getMessage()]


def test_text_with_labels_trains_and_pairs_are_taken_as_two_labels(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    rows = [{"prompt": f"question {n}?", "completion": "yes " * (n + 1), "label": n % 2 == 0} for n in range(8)]
    run = trainer(tmp_path, rows, tokenizer=tokenizer)
    run.train()
    assert all(torch.isfinite(torch.tensor(losses(run)))) and losses(run)[-1] < 0.5
    pairs = [{"prompt": f"question {n}?", "chosen": "yes " * (n + 1), "rejected": "no"} for n in range(8)]
    run = trainer(tmp_path, pairs, tokenizer=tokenizer)
    assert run.train_dataset[0].desirable == (True, False)
    run.train()
    assert losses(run)[-1] < 0.5


@pytest.mark.parametrize(
    ("method", "trees", "said"),
    [
        ("kto", random_pairs(4).trees, "row 1 has no labels"),
        ("dpo", trees_for("kto", 4), "is labelled, not ranked"),
        ("plackett_luce", trees_for("kto", 4), "is labelled, not ranked"),
        ("kto", trees_for("plackett_luce", 4), "has no labels"),
    ],
)
def test_data_of_another_kind_is_refused_before_training(tmp_path: Path, method: str, trees: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        trainer(tmp_path, list(trees), method=method)


def test_a_stream_is_refused_where_rows_lend_each_other_completions(tmp_path: Path) -> None:
    rows = ({"prompt": "q", "completion": "a", "label": True} for _ in range(4))
    with pytest.raises(
        ConfigError, match="is a stream, and the method kto puts completions behind prompts of other rows"
    ):
        trainer(tmp_path, rows, tokenizer=small_tokenizer())


def test_trees_with_masks_weights_and_log_probs_get_a_mismatched_completion_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What belongs to a tree's own completions stays with them; log-probs that lack the new one's are dropped, and said."""
    plain = trees_for("kto", 8)
    rich = [
        Tree(
            prompt_ids=tree.prompt_ids,
            completions=tree.completions,
            desirable=tree.desirable,
            scored=[[True] * len(ids) for ids in tree.completions],
            token_weights=[[1.0] * len(ids) for ids in tree.completions],
            completion_weights=[1.0] * len(tree.completions),
            reference_token_logps=[torch.full((len(ids),), -9.0) for ids in tree.completions],
        )
        for tree in plain
    ]
    runs = [trainer(tmp_path / str(index), data) for index, data in enumerate((plain, rich))]
    assert "8 rows bring log-probs of the reference" in caplog.text
    for run in runs:
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)


def test_a_pair_among_ranked_lists_is_a_list_of_two(tmp_path: Path) -> None:
    for method in ("plackett_luce", "dpo"):
        mixed = [*trees_for("plackett_luce", 4), *random_pairs(4, seed=3).trees]
        run = trainer(tmp_path, mixed, method=method)
        run.train()
        assert losses(run)[-1] > 0
