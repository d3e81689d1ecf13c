"""Does an adapter on the head, or a quantised head, score as the model's own forward does?"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from peft import IA3Config, LoraConfig, get_peft_model

from dpo_engine.errors import ModelError
from dpo_engine.model.adapters import add_lora, reference_of
from dpo_engine.model.head import head_of
from dpo_engine.model.probe import probe_head
from dpo_engine.model.scoring import bind_scoring
from support.tiny_models import VOCABULARY, tiny_model

INPUT_IDS = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
ROWS = torch.arange(9)
LABELS = INPUT_IDS.flatten()[1:10]


def token_logps(model: Any) -> Tensor:
    """By the engine."""
    return model(input_ids=INPUT_IDS, score_from=ROWS, labels=LABELS).token_logps


def own_logps(model: Any) -> Tensor:
    """By the model's own logits."""
    logits = model(input_ids=INPUT_IDS).logits.float().flatten(0, 1)[ROWS]
    return logits.log_softmax(-1).gather(-1, LABELS[:, None]).squeeze(-1)


def grown(policy: Any) -> Any:
    """Bound, in eval mode, with adapters that are far from zero."""
    bind_scoring(policy.get_base_model())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    return policy.eval()


def policy_with(name: str = "Llama", **changes: Any) -> Any:
    settings = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"]} | changes
    return grown(get_peft_model(tiny_model(name), LoraConfig(**settings)))


# Gemma-2 has a softcap, Cohere a scale, GPT-J a bias.
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "GPTJ"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_on_the_head_scores_as_the_models_own_logits(name: str, use_rslora: bool) -> None:
    model = tiny_model(name)
    if model.lm_head.weight is model.get_input_embeddings().weight:  # PEFT warns; the forward is right all the same
        warnings.simplefilter("ignore", UserWarning)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["lm_head"], use_rslora=use_rslora)
    policy = grown(get_peft_model(model, config))
    torch.testing.assert_close(token_logps(policy), own_logps(policy), rtol=1e-5, atol=1e-5)
    with policy.disable_adapter():
        without = own_logps(policy)
    assert (without - own_logps(policy)).abs().max() > 0.01
    probe_head(policy.get_base_model())


def test_gradients_of_a_and_b_are_those_of_the_models_own_logits() -> None:
    policy = policy_with()
    upstream = torch.linspace(-1, 2, 9)
    wanted = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert sum("lm_head" in name for name in wanted) == 2
    ours = torch.autograd.grad(token_logps(policy), list(wanted.values()), upstream)
    theirs = torch.autograd.grad(own_logps(policy), list(wanted.values()), upstream)
    for name, mine, its in zip(wanted, ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5, msg=name)


def test_the_reference_is_the_head_without_its_adapter() -> None:
    policy = policy_with()
    expected = tiny_model("Llama")
    bind_scoring(expected)
    with reference_of(policy) as reference:
        assert torch.equal(token_logps(reference), token_logps(expected))
    assert not torch.allclose(token_logps(policy), token_logps(expected), atol=1e-2)


def test_several_active_adapters_add_up() -> None:
    policy = policy_with()
    policy.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=7, target_modules=["lm_head"]))
    policy.base_model.set_adapter(["default", "other"])
    grown(policy)
    assert len(head_of(policy.get_base_model()).branches) == 2
    torch.testing.assert_close(token_logps(policy), own_logps(policy), rtol=1e-5, atol=1e-5)
    both = token_logps(policy)
    policy.set_adapter("other")
    torch.testing.assert_close(token_logps(policy), own_logps(policy), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(token_logps(policy), both, atol=1e-2)


def test_a_merged_adapter_is_in_the_weight_and_is_taken_out_for_the_reference() -> None:
    policy = policy_with()
    apart = token_logps(policy)
    policy.merge_adapter()
    assert head_of(policy.get_base_model()).branches == ()
    torch.testing.assert_close(token_logps(policy), apart, rtol=1e-4, atol=1e-4)
    expected = tiny_model("Llama")
    bind_scoring(expected)
    with reference_of(policy) as reference:
        torch.testing.assert_close(token_logps(reference), token_logps(expected), rtol=1e-4, atol=1e-4)


def test_dropout_in_front_of_the_adapter_acts_in_training_only() -> None:
    policy = policy_with(target_modules=["lm_head"], lora_dropout=0.5)
    assert torch.equal(token_logps(policy), token_logps(policy))
    policy.train()
    assert not torch.equal(token_logps(policy), token_logps(policy))


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_on_a_bfloat16_head_agree_to_its_rounding(autocast: bool) -> None:
    policy = grown(add_lora(tiny_model("Llama").to(torch.bfloat16), r=3, alpha=5, target_modules=["q_proj", "lm_head"]))
    head = policy.get_base_model().lm_head
    assert head.weight.dtype == torch.bfloat16 and head.lora_A["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = token_logps(policy)
        theirs = own_logps(policy)
        gradients = torch.autograd.grad(ours.sum(), [head.lora_A["default"].weight, head.lora_B["default"].weight])
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for gradient in gradients)
    probe_head(policy.get_base_model())


def test_a_copy_that_modules_to_save_trains_is_the_head() -> None:
    policy = policy_with(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = policy.get_base_model().lm_head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(1.5)
    head = head_of(policy.get_base_model())
    assert head.weight is wrapper.modules_to_save["default"].weight and head.trains
    torch.testing.assert_close(token_logps(policy), own_logps(policy), rtol=1e-5, atol=1e-5)
    [gradient] = torch.autograd.grad(token_logps(policy).sum(), [head.weight])
    [expected] = torch.autograd.grad(own_logps(policy).sum(), [head.weight])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    with reference_of(policy) as reference:
        assert head_of(policy.get_base_model()).weight is wrapper.original_module.weight
        torch.testing.assert_close(token_logps(reference), own_logps(reference), rtol=1e-5, atol=1e-5)
    probe_head(policy.get_base_model())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama", {"use_dora": True}, r"not plain LoRA \(Dora"),
        ("GPTJ", {"lora_bias": True, "target_modules": ["lm_head"]}, r"not plain LoRA \(lora_bias\)"),
    ],
)
def test_an_adapter_that_does_more_than_add_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    settings = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "lm_head"]} | changes
    policy = get_peft_model(tiny_model(name), LoraConfig(**settings))
    with pytest.raises(ModelError, match=message):
        bind_scoring(policy.get_base_model())


def test_an_adapter_of_another_kind_is_refused() -> None:
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[])
    policy = get_peft_model(tiny_model("Llama"), config)
    with pytest.raises(ModelError, match=r"an adapter of another kind than LoRA \(ia3\)"):
        bind_scoring(policy.get_base_model())


def test_single_trained_tokens_on_the_head_are_refused() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]})
    policy = get_peft_model(tiny_model("Llama"), config)
    with pytest.raises(ModelError, match="wrapped in a TrainableTokensWrapper"):
        bind_scoring(policy.get_base_model())


def quantised_model(kind: str) -> Any:
    """A tiny model whose head bitsandbytes holds in 4 or 8 bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model("Llama", hidden_size=64, head_dim=16)
    options = {"has_fp16_weights": False} if kind == "int8" else {"quant_type": kind, "compute_dtype": torch.float32}
    layer = bitsandbytes.nn.Linear8bitLt if kind == "int8" else bitsandbytes.nn.Linear4bit
    head = layer(64, VOCABULARY, bias=False, **options)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head.to("cpu")  # quantises
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_quantised_head_scores_as_its_own_layer_does(kind: str, lora: bool) -> None:
    model = quantised_model(kind)
    policy = model
    bind_scoring(model)
    if lora:
        config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "lm_head"])
        policy = grown(get_peft_model(model, config))
    before = token_logps(policy)
    own = own_logps(policy)
    # The 8-bit layer rounds the hidden states too, which the engine does not.
    tolerance = 0.1 if kind == "int8" else 1e-5
    torch.testing.assert_close(before, own, rtol=tolerance, atol=tolerance)
    assert torch.equal(token_logps(policy), before)  # the layer's own forward moved its scales
    probe_head(model)
    if lora:
        wanted = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(token_logps(policy).sum(), wanted))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_head_that_was_read_wrongly_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_engine.model import probe, scoring
    from dpo_engine.model.head import HeadTransform

    for module in (probe, scoring):
        monkeypatch.setattr(module, "read_head_transform", lambda config: HeadTransform(logit_scale=1.25))
    with pytest.raises(ModelError, match="the head gives a logit of"):
        probe_head(quantised_model(kind))
