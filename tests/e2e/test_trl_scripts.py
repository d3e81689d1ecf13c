"""Does a TRL script, its import changed, log what TRL logs?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import dpo_engine
from dpo_engine.errors import ConfigError
from dpo_engine.train.trl_settle import say_once
from support.small_tokenizers import small_tokenizer
from support.tiny_pairs import random_pairs, tiny_llama
from support.trl_scripts import CONVERSATIONS, ENDS_WITH_TURN, STANDARD, saved_model, script_log, script_settings

COMPARED = (
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
ABSENT = ("entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected")
"""What TRL 1.16 logs beside them."""


@pytest.fixture(scope="module")
def trl() -> Any:
    module = pytest.importorskip("trl", reason="TRL is not installed: make trl installs it")
    if tuple(map(int, module.__version__.split(".")[:2])) < (1, 16):
        pytest.skip(f"TRL {module.__version__} is installed; the comparison is with 1.16")
    return module


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("chat"), chat_template=ENDS_WITH_TURN)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("plain"), adds_bos=True)


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ("chat", {}),
        ("plain", {"loss_type": "ipo"}),
        ("chat", {"ld_alpha": 0.3, "beta": 0.5}),
        ("chat", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("plain", {"max_length": 12, "truncation_mode": "keep_start", "precompute_ref_log_probs": True}),
        ("chat", {"lora": True, "learning_rate": 1e-2}),
    ],
    ids=["sigmoid", "ipo", "ld_alpha", "accumulated", "cut", "lora"],
)
def test_losses_and_metrics_are_those_of_trl(
    rows: str, changes: dict[str, Any], trl: Any, chat_model: str, plain_model: str, tmp_path: Path
) -> None:
    model, data = {"chat": (chat_model, CONVERSATIONS), "plain": (plain_model, STANDARD)}[rows]
    more = dict(changes)
    if more.pop("lora", False):
        more["peft_config"] = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM")
    theirs = script_log(trl, tmp_path / "trl", model, data, **more)
    ours = script_log(dpo_engine, tmp_path / "ours", model, data, **more)
    steps = [[entry for entry in log if "loss" in entry] for log in (theirs, ours)]
    assert len(steps[0]) == len(steps[1]) == 5
    for step, (entry, other) in enumerate(zip(*steps, strict=True), start=1):
        for name in COMPARED:
            if (
                name == "rewards/accuracies" and step <= 2
            ):  # every pair is a tie until a step was taken: half a correct one here
                assert (entry[name], other[name]) == (0.0, 0.5)
                continue
            assert other[name] == pytest.approx(entry[name], rel=1e-4, abs=2e-6), f"step {step}: {name}"
    evaluated = [next(entry for entry in log if "eval_loss" in entry) for log in (theirs, ours)]
    for name in COMPARED[4:] + ("loss",):
        name = f"eval_{name}"
        assert evaluated[1][name] == pytest.approx(evaluated[0][name], rel=1e-4, abs=2e-6), name
    assert {name for name in steps[0][0] if name not in steps[1][0]} == set(ABSENT)


def test_a_script_of_trl_1_16s_shape_runs_with_its_import_changed(trl: Any, chat_model: str, tmp_path: Path) -> None:
    """Flags parsed beside TRL's own classes, a model by its name, adapters, evaluation, and all that is saved."""

    from dpo_engine import DPOConfig, DPOTrainer

    output = tmp_path / "out"
    flags = f"""--dataset_name owner/pairs --model_name_or_path {chat_model} --dtype float32 --use_peft --lora_r 4
        --lora_target_modules q_proj v_proj --output_dir {output} --use_cpu --max_steps 2 --eval_strategy steps --eval_steps 1
        --per_device_train_batch_size 2 --loss_type sigmoid --learning_rate 1e-3 --no_remove_unused_columns --save_steps 2
        --report_to none --max_length 64 --truncation_mode keep_start --dataset_num_proc 1 --precompute_ref_log_probs"""
    parser = HfArgumentParser((trl.ScriptArguments, DPOConfig, trl.ModelConfig))
    script, training, model = parser.parse_args_into_dataclasses(flags.split())
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": training.trust_remote_code,
    }
    dataset = {
        script.dataset_train_split: Dataset.from_list(CONVERSATIONS),
        "test": Dataset.from_list(CONVERSATIONS[:2]),
    }
    trainer = DPOTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        quantization_config=trl.get_quantization_config(model),
        peft_config=trl.get_peft_config(model),
    )
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model(training.output_dir)
    trainer.create_model_card(dataset_name=script.dataset_name)
    trainer.accelerator.print("done")
    assert [entry["step"] for entry in trainer.state.log_history if "eval_rewards/margins" in entry] == [1, 2]
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    for folder in (output, output / "checkpoint-2"):
        weights = PeftModel.from_pretrained(base, folder).state_dict()
        assert any("lora_B" in name and value.abs().sum() > 0 for name, value in weights.items())
        assert AutoTokenizer.from_pretrained(folder).chat_template == ENDS_WITH_TURN
    assert (output / "train_results.json").is_file() and (output / "trainer_state.json").is_file()
    assert "owner/pairs" in (output / "README.md").read_text("utf-8")


def test_a_script_of_trl_0_24s_shape_runs_with_its_import_changed(plain_model: str, tmp_path: Path) -> None:
    """Two model objects and a tokenizer, several held-out data sets, and the whole model saved."""

    from dpo_engine import DPOConfig, DPOTrainer

    model, reference = (AutoModelForCausalLM.from_pretrained(plain_model) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(plain_model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    args = DPOConfig(
        **script_settings(
            tmp_path / "out", max_steps=2, beta=0.2, loss_type="ipo", max_prompt_length=32, padding_free=True
        )
    )
    held_out = DatasetDict(near=Dataset.from_list(STANDARD[:2]), far=Dataset.from_list(STANDARD[2:5]))
    trainer = DPOTrainer(
        model,
        reference,
        args,
        None,
        Dataset.from_list(STANDARD),
        held_out,
        tokenizer,
        callbacks=[],
        peft_config=None,
    )
    assert trainer.ref_model is reference
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_near_loss", "eval_far_loss", "eval_near_rewards/margins"} <= set(metrics)
    assert trainer.evaluate(held_out["far"])["eval_loss"] == pytest.approx(metrics["eval_far_loss"], rel=1e-6)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(args.output_dir).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(args.output_dir).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ConfigError, match="predict gives logits"):
        trainer.predict(held_out["far"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_collator": print}, "data_collator is given; batches are forests"),
        ({"compute_metrics": print}, "compute_metrics is given"),
        ({"preprocess_logits_for_metrics": print}, "no logits are built"),
        ({"tokenizer": 1}, "use processing_class"),
        ({"beta": 0.1}, r"it is one of DPOConfig's: args=DPOConfig\(beta=...\)"),
        ({"loss_type": "ipo"}, "it is one of DPOConfig's"),
        ({"nonsense": 1}, "nonsense is not an argument"),
        ({"model": 3}, "expected a model object, or the name of one"),
        ({"args": object()}, "args is a builtins.object; expected the DPOConfig of dpo_engine"),
        ({"quantization_config": object()}, "model is loaded already"),
        ({"args": {"model_init_kwargs": {"dtype": "float32"}}}, "model_init_kwargs is given, and model is loaded already"),
        ({"args": {"ref_model_init_kwargs": {"dtype": "float32"}}}, "ref_model is no name"),
        ({"args": {"pad_token": "<nowhere>"}}, "not in the tokenizer's vocabulary"),
        ({"args": {"model_init_kwargs": {"dtype": "float23"}}, "model": "NAME"}, "dtype='float23'"),
        ({"args": {"model_init_kwargs": {"trust_remote_code": True}}, "model": "NAME"}, "runs no code that comes with"),
        ({"args": {"model_init_kwargs": {"use_kernels": True}}, "model": "NAME"}, "would fetch code"),
        ({"args": {"model_init_kwargs": {"nonsense": 1}}, "model": "NAME"}, r"model_init_kwargs=\['dtype', 'nonsense'\]"),
    ],
)  # fmt: skip
def test_arguments_that_would_be_ignored_are_refused_by_name(
    arguments: dict[str, Any], message: str, plain_model: str, tmp_path: Path
) -> None:
    given = dict(arguments)
    if given.get("model") == "NAME":
        given["model"] = plain_model
    if isinstance(given.get("args"), dict):
        given["args"] = dpo_engine.DPOConfig(**script_settings(tmp_path, **given["args"]))
    given = {
        "model": tiny_llama(vocab_size=600),
        "args": dpo_engine.DPOConfig(**script_settings(tmp_path)),
        "train_dataset": STANDARD,
        "processing_class": small_tokenizer(),
        **given,
    }
    with pytest.raises(ConfigError, match=message):
        dpo_engine.DPOTrainer(**given)


def test_dropout_is_off_unless_it_is_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:

    found = {}
    for off in (True, False):
        say_once.cache_clear()
        trainer = dpo_engine.DPOTrainer(
            tiny_llama(),
            args=dpo_engine.DPOConfig(**script_settings(tmp_path, disable_dropout=off)),
            train_dataset=random_pairs(4),
            peft_config=LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"]),
        )
        found[off] = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {True: {0.0}, False: {0.25}}
    assert sum("dropout is switched off in 2 layers" in record.getMessage() for record in caplog.records) == 1


def test_what_differs_from_trl_by_the_model_or_the_data_is_said(
    chat_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter that is no longer zero, and text prompts beside a chat template."""

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    say_once.cache_clear()
    dpo_engine.DPOTrainer(
        model,
        args=dpo_engine.DPOConfig(**script_settings(tmp_path)),
        train_dataset=STANDARD,
        processing_class=AutoTokenizer.from_pretrained(chat_model),
    )
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "the reference is the model below them" in said
    assert "train_dataset: prompts are text, and are put into the tokenizer's chat template" in said
