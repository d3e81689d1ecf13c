"""Is a model that a user left in an odd state trained right, or refused with a sentence? Never trained wrong in silence."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.data import TokenizedTree
from dpo_engine.errors import ConfigError, DataError, ModelError, TrainingError
from support.naive_dpo import completion_logps
from support.tiny_pairs import VOCABULARY, random_pairs, tiny_llama

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
START = math.log(2)


def made(folder: Path, model: Any, ref_model: Any = None, **changes: Any) -> DPOTrainer:
    """A run of three steps of four pairs; `changes` are config keys or arguments of the trainer."""
    own = {name: changes.pop(name) for name in ("peft_config", "reference_cache", "train_dataset") if name in changes}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "max_tokens_per_forest": 256,
        "reference_cache": "off",
    }
    return DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=DPOConfig(**(settings | changes)),
        **({"train_dataset": random_pairs(12)} | own),
    )


def losses(run: DPOTrainer) -> list[float]:
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def policy(*, moved: bool = False) -> PeftModel:
    """LoRA on a tiny Llama; `moved`: its adapters change the model."""
    base = tiny_llama()
    torch.manual_seed(3)
    model = get_peft_model(base, LORA)
    if moved:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """What models in no odd state train like."""
    folder = tmp_path_factory.mktemp("ordinary")
    found = {
        "lora": losses(made(folder, policy())),
        "moved lora": losses(made(folder, policy(moved=True))),
        "full": losses(made(folder, tiny_llama())),
    }
    assert all(abs(of[2] - START) > 1e-3 for of in found.values())
    return found


# ---- a second model ----


def base_of_its_adapters() -> tuple[Any, Any, Any]:
    base = tiny_llama()
    return get_peft_model(base, LORA), base, None


def base_that_is_to_get_adapters() -> tuple[Any, Any, Any]:
    base = tiny_llama()
    return base, base, LORA


def a_second_adapter_on_one_base() -> tuple[Any, Any, Any]:
    base = tiny_llama()
    return get_peft_model(base, LORA), PeftModel(base, LORA, adapter_name="other"), None


def a_shallow_copy() -> tuple[Any, Any, Any]:
    model = tiny_llama()
    return model, copy.copy(model), None


def shared_embeddings() -> tuple[Any, Any, Any]:
    model, reference = tiny_llama(), tiny_llama()
    reference.set_input_embeddings(model.get_input_embeddings())
    return model, reference, None


@pytest.mark.parametrize(
    "models",
    [
        base_of_its_adapters,
        base_that_is_to_get_adapters,
        a_second_adapter_on_one_base,
        a_shallow_copy,
        shared_embeddings,
    ],
)
def test_a_reference_with_parts_of_the_policy_is_refused(tmp_path: Path, models: Callable[[], Any]) -> None:
    model, reference, peft_config = models()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=r"ref_model and the model being trained have a part in common \("):
        made(tmp_path, model, reference, peft_config=peft_config)
    if peft_config is None:
        assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_reference_in_the_memory_of_weights_that_train_is_refused(tmp_path: Path) -> None:
    model, reference = tiny_llama(), tiny_llama()
    reference.load_state_dict(model.state_dict(), assign=True)  # other parameters, the same memory
    with pytest.raises(ConfigError, match=r"in the memory of the policy's model\.embed_tokens\.weight, which trains"):
        made(tmp_path, model, reference)


def test_a_reference_in_the_memory_of_frozen_weights_is_right(tmp_path: Path, ordinary: dict[str, Any]) -> None:
    base, reference = tiny_llama(), tiny_llama()
    reference.load_state_dict(base.state_dict(), assign=True)
    torch.manual_seed(3)
    assert losses(made(tmp_path, get_peft_model(base, LORA), reference)) == pytest.approx(ordinary["lora"], rel=1e-5)


def test_a_reference_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ref_model is 3; expected a model object"):
        made(tmp_path, tiny_llama(), 3)


def test_a_reference_with_fewer_tokens_is_refused_with_the_row_that_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row \d+: has the token id 1\d\d, and ref_model has a vocabulary of 150"):
        made(tmp_path, tiny_llama(), tiny_llama(vocab_size=150))
    with pytest.raises(DataError, match=r"row \d+: has the token id 1\d\d, and the model has a vocabulary of 150"):
        made(tmp_path, tiny_llama(vocab_size=150))
    few = [TokenizedTree(prompt_ids=[1], completions=([2, 3], [4]), origin="row 1")] * 4
    run = made(tmp_path, tiny_llama(vocab_size=150), train_dataset=few)
    with pytest.raises(DataError, match=r"row \d+: has the token id 1\d\d, and the model has a vocabulary of 150"):
        run.evaluate(random_pairs(12))


def test_tokens_of_a_stream_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    from support.small_tokenizers import small_tokenizer

    tokenizer = small_tokenizer()
    rows = [{"prompt": "where is it? ", "chosen": "here.", "rejected": "nowhere at all."}] * 8
    run = DPOTrainer(
        model=tiny_llama(vocab_size=60),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, chat_template="off", max_length=60),
        train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
        processing_class=tokenizer,
    )
    with pytest.raises(DataError, match=r"has the token id \d+, and the model has a vocabulary of 60"):
        run.train()


def test_a_reference_that_was_made_for_inference_is_asked(tmp_path: Path) -> None:
    with torch.inference_mode():
        reference = tiny_llama()
    assert losses(made(tmp_path, tiny_llama(), reference, precompute_ref_log_probs=True))[0] == pytest.approx(START)


def test_a_reference_of_another_tokenizers_size_is_refused_and_padding_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        ConfigError, match=r"ref_model has a vocabulary of 1400, and the model being trained one of 199"
    ):
        made(tmp_path, tiny_llama(), tiny_llama(vocab_size=1400))
    padded = tiny_llama()
    padded.resize_token_embeddings(256, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[VOCABULARY:] = 0.0
    run = made(tmp_path, tiny_llama(seed=1), padded, learning_rate=0.0, max_steps=1)
    (said,) = [record for record in caplog.records if "more or less padding" in record.message]
    assert said.levelno == logging.WARNING
    pairs = random_pairs(12).trees[:4]
    with torch.no_grad():
        ratios = 0.1 * (completion_logps(tiny_llama(seed=1), pairs) - completion_logps(padded, pairs))
    expected = -torch.nn.functional.logsigmoid(ratios[0::2] - ratios[1::2]).mean().item()
    assert losses(run) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "live"])
@pytest.mark.parametrize("mine,its", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_policy_and_reference_of_two_dtypes_each_compute_in_their_own(
    tmp_path: Path, mine: torch.dtype, its: torch.dtype, precompute: bool
) -> None:
    model, reference = tiny_llama(seed=1).to(mine), tiny_llama(seed=2).to(its)
    pairs = random_pairs(12).trees[:4]
    with torch.no_grad():
        pi, ref = completion_logps(model, pairs), completion_logps(reference, pairs)
    run = made(tmp_path, model, reference, learning_rate=0.0, max_steps=1, precompute_ref_log_probs=precompute)
    assert run.references.dtype() == its  # what its rows may differ by, when they are compared
    losses(run)
    (first,) = [entry for entry in run.state.log_history if "loss" in entry]
    for name, sums in (("chosen", slice(0, None, 2)), ("rejected", slice(1, None, 2))):
        logps, rewards = first[f"logps/{name}"], first[f"rewards/{name}"]
        exact = 1e-4 if mine == torch.float32 else 0.2
        assert logps == pytest.approx(pi[sums].mean().item(), abs=exact)
        exact = 1e-4 if its == torch.float32 else 0.2
        assert logps - rewards / 0.1 == pytest.approx(ref[sums].mean().item(), abs=exact)


# ---- modes and flags ----


@pytest.mark.parametrize("mode", ["train", "mixed"])
def test_the_mode_that_a_model_was_left_in_changes_nothing(tmp_path: Path, mode: str) -> None:
    found = []
    for left_in in ("eval", mode):
        model = tiny_llama(attention_dropout=0.3)
        model.train(left_in == "train")
        if left_in == "mixed":
            model.model.layers[0].train()
        torch.manual_seed(0)
        run = made(tmp_path, model)
        assert run.evaluate(random_pairs(4))["eval_loss"] == pytest.approx(START, abs=1e-7)
        found.append(losses(run))
    assert found[0] == found[1]


def test_parameters_that_a_user_froze_stay_and_the_others_train(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = made(tmp_path, model)
    assert losses(run)[0] == pytest.approx(START, abs=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert not any(parameter.requires_grad for parameter in run.reference.parameters())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_model_of_which_nothing_trains_is_refused(tmp_path: Path, lora: bool) -> None:
    model = (policy() if lora else tiny_llama()).requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing requires a gradient"):
        losses(made(tmp_path, model))


@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "live"])
def test_a_weight_under_adapters_that_was_unfrozen_is_refused_by_name(tmp_path: Path, precompute: bool) -> None:
    model = policy()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"trains base_model\.model\.model\.norm\.weight, which is no adapter"):
        losses(made(tmp_path, model, precompute_ref_log_probs=precompute))


# ---- adapters ----


@pytest.mark.parametrize("asked", [{}, {"precompute_ref_log_probs": True}], ids=str)
def test_the_active_one_of_two_adapters_trains_and_the_other_stays(
    tmp_path: Path, asked: dict[str, Any], ordinary: dict[str, Any]
) -> None:
    model = policy(moved=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    model.add_adapter("other", LORA)
    model.set_adapter("other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.copy_(before[name.replace(".other.", ".default.")])
    assert losses(made(tmp_path, model, **asked)) == pytest.approx(ordinary["moved lora"], rel=1e-5)
    assert model.active_adapter == "other" and model.active_adapters == ["other"]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_adapter_that_requires_a_gradient_and_is_not_active_is_refused(tmp_path: Path) -> None:
    model = policy()
    model.add_adapter("other", LORA)
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"28 of 56 trainable parameters got no gradient .*lora_A\.other\.weight"):
        losses(made(tmp_path, model))


def test_adapters_that_were_switched_off_are_refused(tmp_path: Path) -> None:
    model = policy()
    model.base_model.disable_adapter_layers()
    with pytest.raises(TrainingError, match="nothing requires a gradient"):
        losses(made(tmp_path, model))


@pytest.mark.parametrize("asked", [{}, {"precompute_ref_log_probs": True}], ids=str)
def test_adapters_that_were_merged_train_as_if_they_were_not(
    tmp_path: Path, asked: dict[str, Any], ordinary: dict[str, Any]
) -> None:
    model = policy(moved=True)
    model.merge_adapter()
    assert losses(made(tmp_path, model, **asked)) == pytest.approx(ordinary["moved lora"], rel=1e-4)


def test_adapters_on_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model has adapters already, and peft_config asks for others on top"):
        made(tmp_path, policy(), peft_config=LORA)


def test_adapters_that_transformers_itself_put_in_train_against_the_start(
    tmp_path: Path, ordinary: dict[str, Any]
) -> None:
    model = tiny_llama()
    torch.manual_seed(3)
    model.add_adapter(LORA)
    assert losses(made(tmp_path, model)) == pytest.approx(ordinary["lora"], rel=1e-5)
