"""Are a forest's log-probs those of its sequences under every way in which a model is trained or asked?

Both sides go through the same wrapped model: adapters, four bits, autocast, checkpointing, the reference below the adapters.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_engine.batch import ForestCollator, build_forest
from dpo_engine.model.adapters import add_lora, reference_of
from dpo_engine.model.layout import choose_layout
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from support.architectures import tiny_model
from support.forests import (
    assert_gradients_agree,
    assert_gradients_no_worse,
    assert_logps_agree,
    gradients,
    in_forests,
    one_by_one,
    random_trees,
)

NAMES = ("gemma3", "gpt_oss", "falcon")  # a window, sinks and experts, one mask


def with_adapters(model: Any, **settings: Any) -> Any:
    """LoRA that is not at its start, so that it changes what the model computes."""
    policy = add_lora(model, r=2, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def shared(model: Any) -> Any:
    bind_scoring(model)
    assert choose_layout(model).name == "shared"
    return model


def in_four_bits(name: str, folder: Path) -> Any:
    """The named model by the loader of transformers, its linear layers in NF4, computing in float32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(name).save_pretrained(folder)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)
    return model.requires_grad_(False)


def assert_agrees(policy: nn.Module, data: Any) -> None:
    """In value and in the gradient of everything that trains."""
    want = one_by_one(policy, data)
    wanted = gradients(policy, want)
    got = in_forests(policy, data, ForestCollator(60))
    assert_logps_agree(got, want)
    found = gradients(policy, got)
    assert found
    assert_gradients_agree(found, wanted)


@pytest.mark.parametrize(
    "checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant checkpointing"]
)
@pytest.mark.parametrize("name", NAMES)
def test_lora(name: str, checkpointing: bool | None) -> None:
    policy = with_adapters(shared(tiny_model(name))).train()
    data = random_trees()
    if checkpointing is not None:
        policy.get_base_model().enable_input_require_grads()
        policy.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
    alone = one_by_one(policy, data)
    wanted = gradients(policy, alone)
    logps = in_forests(policy, data, ForestCollator(60))
    assert_logps_agree(logps, alone)
    found = gradients(policy, logps)
    if name == "gpt_oss":  # its experts' product knows no float64
        assert_gradients_agree(found, wanted)
        return
    exact = copy.deepcopy(policy).double()
    assert_gradients_no_worse(found, than=wanted, truth=gradients(exact, one_by_one(exact, data)))


def test_lora_put_on_before_the_model_was_bound_and_on_its_head() -> None:
    policy = with_adapters(tiny_model("gemma3"), target_modules=["q_proj", "v_proj", "down_proj"])
    shared(policy.get_base_model())
    assert_agrees(policy.train(), random_trees())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_qlora_in_nf4(name: str, checkpointing: bool, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = in_four_bits(name, tmp_path)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    policy = with_adapters(shared(model)).train()
    if checkpointing:
        policy.get_base_model().enable_input_require_grads()
        policy.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_agrees(policy, random_trees())


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_below_the_adapters(name: str) -> None:
    data = random_trees()
    with torch.no_grad():
        want = one_by_one(tiny_model(name).eval(), data)
    policy = with_adapters(shared(tiny_model(name)), dropout=0.5).train()
    with reference_of(policy) as reference:
        assert_logps_agree(in_forests(reference, data, ForestCollator(60)), want)


def test_evaluation_is_without_dropout_and_training_is_with_it() -> None:
    policy = with_adapters(shared(tiny_model("llama")), dropout=0.5)
    data = random_trees()
    forest = build_forest(data)
    with torch.no_grad():
        want = one_by_one(policy.eval(), data)
        assert_logps_agree(forest_token_logps(policy, forest), want)
        assert (forest_token_logps(policy.train(), forest) - want).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_is_as_near_to_float32_as_it_is_for_sequences(name: str) -> None:
    policy = with_adapters(shared(tiny_model(name))).train()
    data = random_trees()

    def spread(logps: Tensor) -> float:
        return float((logps.detach() - exact).square().mean().sqrt())

    with torch.no_grad():
        exact = one_by_one(policy, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = one_by_one(policy, data)
        got = in_forests(policy, data, ForestCollator(60))
    assert got.dtype == torch.float32
    assert 0 < spread(got) <= 1.5 * spread(want)
    found, wanted = gradients(policy, got), gradients(policy, want)
    difference = torch.stack([(found[key] - wanted[key]).norm() for key in wanted]).norm()
    assert difference <= 0.1 * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_pass_the_probe_and_are_near_to_float32(name: str) -> None:
    data = random_trees()
    with torch.no_grad():
        exact = one_by_one(tiny_model(name).eval(), data)
        model = shared(tiny_model(name).to(torch.bfloat16).eval())
        want = one_by_one(model, data)
        got = in_forests(model, data, ForestCollator(60))
    assert (got - exact).square().mean().sqrt() <= 1.5 * (want - exact).square().mean().sqrt()
