"""What does `load_in_4bit` turn on, what is handed to peft, and is a resumed QLoRA run the same run?"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch.autograd.graph import saved_tensors_hooks

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.batch import build_forest
from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model.adapter_inputs import adapter_inputs_as_they_are
from dpo_engine.model.adapters import add_lora
from dpo_engine.model.layout import prepare_model
from dpo_engine.model.loading import load_model
from dpo_engine.model.scoring import forest_token_logps
from dpo_engine.train.run import TrainConfig
from support.tiny_pairs import random_pairs, tiny_llama

GIVEN: dict[str, Any] = {"model": "m", "data": "d", "output_dir": "o"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"load_in_4bit": True}, True),
        ({"load_in_4bit": True, "gradient_checkpointing": False}, False),
        ({"gradient_checkpointing": True}, True),
    ],
)
def test_checkpointing_is_on_for_four_bits_unless_someone_says_otherwise(
    changes: dict[str, Any], expected: bool
) -> None:
    config = TrainConfig(**GIVEN, **changes)
    assert config.gradient_checkpointing is expected
    assert getattr(config, "activation_checkpointing", expected) is expected
    if expected:
        assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_four_bits_and_checkpointing_can_be_told_from_yaml(tmp_path: Path) -> None:
    from dpo_engine.cli.options import parse

    (tmp_path / "c.yaml").write_text("model: m\ndata: d\noutput_dir: o\nload_in_4bit: true\n")
    assert parse(TrainConfig, [str(tmp_path / "c.yaml")]).gradient_checkpointing is True
    assert (
        parse(TrainConfig, [str(tmp_path / "c.yaml"), "--gradient_checkpointing=false"]).gradient_checkpointing is False
    )


def test_the_head_gets_an_adapter_beside_every_other_linear_layer_or_those_named() -> None:
    def adapted(**options: Any) -> set[str]:
        policy = add_lora(tiny_llama(), r=2, head=True, **options)
        return {
            name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in policy.named_parameters() if "lora_A" in name
        }

    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted() == {*layers, "lm_head"}
    assert adapted(target_modules=["q_proj"]) == {"q_proj", "lm_head"}
    with pytest.raises(ConfigError, match=r"lora_head names the head \('lm_head'\), .* tied to its input embeddings"):
        add_lora(tiny_llama(tie_word_embeddings=True), head=True)


def test_dora_and_rank_stabilised_scales_are_pefts() -> None:
    policy = add_lora(tiny_llama(), r=4, alpha=8, use_rslora=True, use_dora=True)
    layer = policy.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 8 / math.sqrt(4)
    magnitudes = [name for name, p in policy.named_parameters() if "lora_magnitude_vector" in name and p.requires_grad]
    assert len(magnitudes) == 2 * 7


def test_dora_on_the_head_is_refused_by_the_names_of_the_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora_head=True .* false with use_dora"):
        TrainConfig(**GIVEN, lora_head=True, use_dora=True)
    with pytest.raises(ConfigError, match=r"use_dora=True .* lora_r: 0"):
        TrainConfig(**GIVEN, lora_r=0, use_dora=True)
    policy = add_lora(tiny_llama(), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ModelError, match=r"set lora_head: false .* or use_dora: false"):
        prepare_model(policy)


def test_dora_starts_at_its_reference_and_learns(tmp_path: Path) -> None:
    policy = add_lora(tiny_llama(), r=4, use_dora=True, use_rslora=True)
    run = trained(tmp_path, policy, per_device_train_batch_size=16, learning_rate=3e-3)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.5


def trained(output: Path, model: Any, resume: bool = False, **changes: Any) -> DPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "max_tokens_per_forest": 120, "reference_cache": "off",
    }  # fmt: skip
    run = DPOTrainer(model=model, args=DPOConfig(**(settings | changes)), train_dataset=random_pairs(16))
    run.train(resume_from_checkpoint=resume or None)
    return run


def test_a_four_bit_run_with_a_paged_eight_bit_optimiser_resumes_to_the_last_bit(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    def policy() -> Any:
        torch.manual_seed(0)
        # So large that bitsandbytes keeps moments in 8 bits: it does from 4096 numbers on.
        return add_lora(load_model(str(folder), dtype=torch.float32, trainable=False, in_4bit=True), r=64)

    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
    settings |= {"optim": "paged_adamw_8bit", "learning_rate": 1e-3}
    whole = trained(tmp_path, policy(), **settings)
    moments = {value.dtype for state in whole.optimizer.optimizer.state.values() for value in state.values()
               if isinstance(value, torch.Tensor)}  # fmt: skip
    assert torch.uint8 in moments
    for folder_left in tmp_path.glob("checkpoint-4"):
        folder_left.rename(tmp_path / "the whole run")
    resumed = trained(tmp_path, policy(), resume=True, **settings)
    logs = [
        [(e["step"], e["loss"], e["rewards/margins"]) for e in run.state.log_history if "loss" in e]
        for run in (whole, resumed)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    ends = [{n: p for n, p in run.model.named_parameters() if p.requires_grad} for run in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_head_and_norms_keep_the_dtype_they_are_loaded_in(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(str(folder), dtype=dtype, trainable=False, in_4bit=True)
        policy = add_lora(model, r=2, head=True)
        kept = {name: p.dtype for name, p in policy.named_parameters() if "norm" in name or "lm_head.base" in name}
        assert len(kept) == 2 * 2 + 1 + 1 and set(kept.values()) == {dtype}
        assert model.model.embed_tokens.weight.dtype == dtype


# ---- what adapters are handed ----


def scored(cast: bool, checkpointing: bool, **options: Any) -> tuple[list[torch.Tensor], int, int]:
    """Log-probs and gradients under bfloat16 autocast, the bytes that autograd kept, and the layers left uncast."""
    torch.manual_seed(0)
    policy = add_lora(tiny_llama(hidden_size=64, intermediate_size=176).to(torch.bfloat16), r=8, alpha=16, **options)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    forest = build_forest(random_pairs(8).trees, prepare_model(policy).name)
    policy.train()
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with adapter_inputs_as_they_are(policy, autocast=not cast) as uncast:
        torch.manual_seed(1)
        with saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            logps = forest_token_logps(policy, forest)
        saved = sum(storage.nbytes() for storage in kept.values())
        logps.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    assert len(gradients) >= 2 * 2 * 7
    return [logps.detach(), *gradients], saved, uncast


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_inputs_left_as_they_are_change_no_bit_and_spare_copies(checkpointing: bool, head: bool) -> None:
    was, bytes_then, _ = scored(cast=True, checkpointing=checkpointing, head=head)
    now, bytes_now, layers = scored(cast=False, checkpointing=checkpointing, head=head)
    assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))
    assert layers == 2 * 7 + head
    if not checkpointing:
        tokens = build_forest(random_pairs(8).trees, "shared").tokens
        # Without the casts, q, k and v keep one input between them, and so do gate and up: 3 of 7 copies in either layer.
        spared = 2 * tokens * 64 * 3 * 2
        assert bytes_then - bytes_now >= spared if head else bytes_then - bytes_now == spared


def test_the_cast_stays_where_dropout_or_dora_would_make_a_difference() -> None:
    for options in ({"dropout": 0.5}, {"use_dora": True}):
        was, _, _ = scored(cast=True, checkpointing=True, **options)
        now, _, layers = scored(cast=False, checkpointing=True, **options)
        assert layers == 0 and all(torch.equal(a, b) for a, b in zip(was, now, strict=True))


def test_the_trainer_leaves_inputs_as_they_are_and_puts_the_switch_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraLayer

    def run(cast: bool) -> tuple[DPOTrainer, set[tuple[bool, bool]]]:
        seen: set[tuple[bool, bool]] = set()
        torch.manual_seed(0)
        policy = add_lora(tiny_llama().to(torch.bfloat16), r=4)
        layer = policy.get_base_model().model.layers[1].mlp.up_proj
        if cast:
            monkeypatch.setattr(
                "dpo_engine.train.scoring.adapter_inputs_as_they_are", lambda model, autocast: nullcontext()
            )
        layer.register_forward_pre_hook(
            lambda module, _: seen.add((torch.is_grad_enabled(), module.cast_input_dtype_enabled))
        )
        trainer = trained(tmp_path, policy, bf16=True, gradient_checkpointing=True, max_steps=2)
        assert all(module.cast_input_dtype_enabled for module in policy.modules() if isinstance(module, LoraLayer))
        return trainer, seen

    mine, seen = run(cast=False)
    assert (True, False) in seen and (True, True) not in seen
    theirs, _ = run(cast=True)
    for (name, a), (_, b) in zip(mine.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
