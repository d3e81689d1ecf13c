"""Does a model whose weights lie in 16 bits compute, and merge, what its float32 twin does?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpo_engine.errors import ExportError
from dpo_engine.export import merge as merging
from dpo_engine.export.merge import held_in, merge
from dpo_engine.export.wide import in_float32
from dpo_engine.model.adapters import add_lora
from support.tiny_models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def adapted(name: str, dtype: torch.dtype, **lora: Any) -> Any:
    policy = add_lora(tiny_model(name).to(dtype), r=4, **lora)
    torch.manual_seed(1)
    for parameter_name, parameter in policy.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    return policy.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2", "Gemma2"])
def test_it_says_what_its_float32_twin_says_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).to(dtype).eval()
    twin = copy.deepcopy(model).float()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad(), in_float32(model):
        wide = model(input_ids=IDS).logits
    assert wide.dtype == torch.float32 and torch.equal(wide, twin(input_ids=IDS).logits)
    for key, value in model.state_dict().items():
        assert value.dtype == dtype and torch.equal(value, kept[key]), key
    assert model(input_ids=IDS).logits.dtype == dtype


def test_weights_are_as_they_were_after_a_forward_that_failed() -> None:
    model = tiny_model("Llama").to(torch.bfloat16)
    with pytest.raises(IndexError), in_float32(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_merge_in_16_bits_is_the_float32_merge_rounded_once(name: str) -> None:
    lean = merge(adapted(name, torch.bfloat16), torch.bfloat16)
    policy = adapted(name, torch.bfloat16)
    policy.get_base_model().float()
    full = merge(policy, torch.float32)
    for (key, value), (_, exact) in zip(lean.state_dict().items(), full.state_dict().items(), strict=True):
        assert value.dtype == torch.bfloat16 and torch.equal(value, exact.to(torch.bfloat16)), key
    assert held_in(torch.bfloat16, torch.bfloat16) == torch.bfloat16
    assert held_in(torch.bfloat16, torch.float32) == held_in(torch.float32, torch.bfloat16) == torch.float32


def test_a_layer_whose_merge_is_another_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    plain = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.01 * plain(self, adapter))
    with pytest.raises(ExportError, match=r"model\.layers\.0\.self_attn\.q_proj, merged in float32, is off by"):
        merge(adapted("Llama", torch.float32), torch.float32)
    assert merging.EXACT == 1e-4
