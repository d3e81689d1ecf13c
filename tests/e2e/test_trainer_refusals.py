"""Does the trainer refuse what it would otherwise get wrong or leave out in silence?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PromptTuningConfig, get_peft_model

from dpo_engine import DPOConfig, DPOTrainer, prepare_model
from dpo_engine.errors import ConfigError, ModelError
from support.tiny_pairs import random_pairs, tiny_llama


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"neftune_noise_alpha": 5.0}, "its noise depends on the length of a row"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen='all' is out of range"),
        ({"train_sampling_strategy": "group_by_length"}, "expected random or sequential"),
    ],
)
def test_options_that_a_forest_cannot_honour_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics"])
def test_functions_that_would_not_be_called_are_refused(tmp_path: Path, name: str) -> None:
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match=f"{name} is given; it is not used"):
        DPOTrainer(model=tiny_llama(), args=args, train_dataset=random_pairs(4), **{name: lambda *_: 0.0})


def test_adapters_that_depend_on_where_a_prompt_begins_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ModelError, match="'default' is a PromptTuningConfig that depends on where a prompt begins"):
        prepare_model(model)
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ModelError, match="use LoRA"):
        DPOTrainer(model=model, args=args, train_dataset=random_pairs(4))


def test_several_data_sets_to_train_on_and_none_to_judge_on_are_refused_for_what_they_are(tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    both = {"a": random_pairs(2), "b": random_pairs(3)}
    with pytest.raises(ConfigError, match="train_dataset is a dict of a, b; expected one data set"):
        DPOTrainer(model=tiny_llama(), args=args, train_dataset=both)
    with pytest.raises(ConfigError, match="eval_dataset is empty"):
        DPOTrainer(model=tiny_llama(), args=args, train_dataset=random_pairs(4), eval_dataset=[])


def test_text_given_to_evaluate_is_tokenised_like_that_of_the_constructor(tmp_path: Path) -> None:
    from support.small_tokenizers import small_tokenizer

    tokenizer = small_tokenizer()
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, dataloader_pin_memory=False, chat_template="off")
    rows = [{"prompt": "where is it? ", "chosen": "here.", "rejected": "nowhere at all."}]
    model = tiny_llama(vocab_size=max(199, len(tokenizer)))
    trainer = DPOTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    assert trainer.evaluate(rows)["eval_loss"] == trainer.evaluate()["eval_loss"]
