"""Is the model under the adapters the one they started from, and is everything put back after it was asked?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model.adapters import add_lora, reference_of
from dpo_engine.model.scoring import bind_scoring
from support.tiny_models import VOCABULARY, tiny_model

INPUT_IDS = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
ROWS = torch.arange(9)


def token_logps(model: Any) -> torch.Tensor:
    return model(input_ids=INPUT_IDS, score_from=ROWS, labels=INPUT_IDS.flatten()[1:10]).token_logps


def trained_policy(dropout: float = 0.0, **more: Any) -> Any:
    """A bound LoRA model in training mode whose adapters are not zero."""
    policy = add_lora(tiny_model("Llama"), r=4, alpha=8, dropout=dropout, **more).train()
    bind_scoring(policy.get_base_model())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return policy


def state(model: Any) -> list[tuple[bool, ...]]:
    modes = [(module.training,) for module in model.modules()]
    return [*modes, tuple(parameter.requires_grad for parameter in model.parameters())]


def test_the_reference_is_the_base_model_to_the_last_bit() -> None:
    base = tiny_model("Llama")
    bind_scoring(base)
    expected = token_logps(base)
    policy = trained_policy()
    assert not torch.allclose(token_logps(policy), expected, atol=1e-3)
    with reference_of(policy) as reference:
        found = token_logps(reference)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_the_reference_builds_no_graph_even_where_inputs_are_made_to_require_grad() -> None:
    policy = trained_policy()
    policy.enable_input_require_grads()  # as for gradient checkpointing
    with reference_of(policy) as reference:
        assert not token_logps(reference).requires_grad
    assert token_logps(policy).requires_grad


def test_dropout_is_off_in_the_reference_and_on_again_in_the_policy() -> None:
    policy = trained_policy(dropout=0.5)
    assert not torch.equal(token_logps(policy), token_logps(policy))
    with reference_of(policy) as reference:
        assert torch.equal(token_logps(reference), token_logps(reference))
    assert not torch.equal(token_logps(policy), token_logps(policy))


def test_dropout_of_the_model_itself_is_off_in_the_reference() -> None:
    policy = add_lora(tiny_model("GPT2", resid_pdrop=0.5, embd_pdrop=0.5), target_modules=["c_attn"]).train()
    bind_scoring(policy.get_base_model())
    with reference_of(policy) as reference:
        assert torch.equal(token_logps(reference), token_logps(reference))
    assert not torch.equal(token_logps(policy), token_logps(policy))


def test_mode_and_requires_grad_of_every_part_come_back() -> None:
    policy = trained_policy()
    policy.get_base_model().model.layers[0].eval()
    frozen = next(parameter for parameter in policy.parameters() if parameter.requires_grad)
    frozen.requires_grad_(False)
    before, value = state(policy), token_logps(policy)
    with reference_of(policy):
        assert not any(module.training for module in policy.modules())
    assert state(policy) == before
    assert torch.equal(token_logps(policy), value)


def test_everything_comes_back_after_an_exception() -> None:
    policy = trained_policy(dropout=0.5)
    before = state(policy)
    with pytest.raises(KeyboardInterrupt):
        with reference_of(policy):
            raise KeyboardInterrupt
    assert state(policy) == before
    assert not policy._adapters_disabled and token_logps(policy).requires_grad


def test_the_active_one_of_two_adapters_is_active_again() -> None:
    from peft import LoraConfig

    policy = trained_policy()
    policy.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    policy.set_adapter("other")
    before = state(policy)
    with reference_of(policy):
        pass
    assert policy.active_adapter == "other" and state(policy) == before


def test_adapters_that_were_disabled_stay_disabled() -> None:
    policy = trained_policy()
    with policy.disable_adapter():
        value = token_logps(policy)
        with reference_of(policy):
            pass
        assert torch.equal(token_logps(policy), value)


def test_a_wholly_trained_copy_of_a_module_is_switched_off_as_well() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_model("Llama")
    bind_scoring(base)
    expected = token_logps(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    policy = get_peft_model(base, config)
    with torch.no_grad():
        policy.get_input_embeddings().modules_to_save["default"].weight.add_(1.0)
    assert not torch.allclose(token_logps(policy), expected)
    with reference_of(policy) as reference:
        assert torch.equal(token_logps(reference), expected)
    assert not torch.allclose(token_logps(policy), expected)


def test_a_base_parameter_that_trains_is_refused_by_name() -> None:
    policy = trained_policy()
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    before = state(policy)
    with pytest.raises(ModelError, match=r"model\.norm\.weight, which is no adapter"):
        with reference_of(policy):
            pass
    assert state(policy) == before


def test_a_frozen_model_is_its_own_reference_and_a_training_one_is_refused() -> None:
    model = tiny_model("GPT2", resid_pdrop=0.5)
    bind_scoring(model)
    with pytest.raises(ModelError, match="no fixed reference lies under it"):
        with reference_of(model):
            pass
    model.requires_grad_(False).train()
    with reference_of(model) as reference:
        assert torch.equal(token_logps(reference), token_logps(reference))
    assert all(module.training for module in model.modules())


def test_every_linear_layer_but_the_head_gets_float32_adapters_and_the_rest_is_frozen() -> None:
    policy = add_lora(tiny_model("Llama").to(torch.bfloat16), r=4, alpha=8)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}


def test_new_adapters_change_nothing_yet() -> None:
    model = tiny_model("Llama")
    bind_scoring(model)
    expected = token_logps(model)
    assert torch.equal(token_logps(add_lora(model).eval()), expected)


def test_a_head_tied_to_the_embeddings_gets_no_adapter_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"names the head \('lm_head'\), .* is tied to its input embeddings: merging"):
        add_lora(tiny_model("Qwen3"), target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "q_porj"]},
            "names 'q_porj', which is no linear layer of this model; it has down_proj, gate_proj, k_proj, lm_head",
        ),
        ({"target_modules": []}, "lora_target_modules is empty"),
        ({"target_modules": ["proj"]}, "names 'proj'"),
        ({"r": 0}, "lora_r=0; expected at least 1"),
        ({"alpha": 0}, "lora_alpha=0"),
        ({"dropout": 1.0}, "lora_dropout=1.0"),
    ],
)
def test_a_value_out_of_range_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(tiny_model("Llama"), **options)


def test_all_linear_leaves_an_image_tower_alone_which_no_pair_of_text_goes_through() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "pad_token_id": 0}
    tower = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False}
    tokens = {"image_token_index": 299, "boi_token_index": 297, "eoi_token_index": 298, "mm_tokens_per_image": 4}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma3", text_config=text, vision_config=tower, **tokens)
    )
    policy = add_lora(model, r=4)
    adapted = {name.split(".lora_A")[0] for name, _ in policy.named_parameters() if ".lora_A." in name}
    assert len(adapted) == 2 * 7 and all("language_model" in name for name in adapted)
