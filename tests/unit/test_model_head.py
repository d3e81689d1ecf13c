"""Is the head of a model read as its family means it?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dpo_engine.errors import ModelError
from dpo_engine.model.head import HeadTransform, head_of, read_head_transform
from support.tiny_models import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("Llama", {}, HeadTransform()),
        ("Gemma2", {"final_logit_softcapping": 30.0}, HeadTransform(softcap=30.0)),
        ("Gemma2", {"final_logit_softcapping": None}, HeadTransform()),
        ("Cohere", {"logit_scale": 0.0625}, HeadTransform(logit_scale=0.0625)),
        ("Granite", {"logits_scaling": 8.0}, HeadTransform(logit_scale=0.125)),
        ("HyperCLOVAX", {"logits_scaling": 8.0}, HeadTransform(logit_scale=8.0)),
        ("FalconH1", {"lm_head_multiplier": 0.25}, HeadTransform(logit_scale=0.25)),
        ("MiniCPM3", {"dim_model_base": 8}, HeadTransform(logit_scale=0.25)),
        ("NanoChat", {}, HeadTransform(softcap=4.0)),
    ],
)
def test_scale_and_softcap_are_read_under_each_familys_name(name: str, changes: Any, expected: HeadTransform) -> None:
    assert read_head_transform(tiny_config(name, **changes)) == expected


def test_a_model_of_several_parts_is_read_by_its_text_part() -> None:
    from transformers import Gemma3Config

    assert read_head_transform(Gemma3Config(text_config={"final_logit_softcapping": 7.0})) == HeadTransform(softcap=7.0)


@pytest.mark.parametrize("value", [0.0, -2.0, True])
def test_a_scale_that_is_no_positive_number_is_refused(value: object) -> None:
    config = tiny_config("Llama")
    config.logits_scaling = value
    with pytest.raises(ModelError, match=r"'llama' has logits_scaling=.*expected a positive number"):
        read_head_transform(config)


@pytest.mark.parametrize(("name", "has_bias"), [("Llama", False), ("GPTJ", True)])
def test_the_head_is_the_models_own_parameters(name: str, has_bias: bool) -> None:
    model = tiny_model(name)
    head = head_of(model)
    assert head.weight is model.lm_head.weight and head.shape == tuple(head.weight.shape)
    assert head.bias is model.lm_head.bias and (head.bias is not None) == has_bias
    assert head.branches == () and not head.is_quantised


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Sequential(nn.Linear(32, 97)), "its head is Sequential"),
        (nn.Embedding(97, 32), r"its head is Embedding with a weight of torch.float32 \(97, 32\)"),
    ],
)
def test_a_head_of_another_kind_is_refused_by_name(head: nn.Module, message: str) -> None:
    model = tiny_model("Llama")
    model.lm_head = head
    with pytest.raises(ModelError, match=message):
        head_of(model)


def test_a_head_of_integers_is_refused() -> None:
    model = tiny_model("Llama")
    model.lm_head.weight = nn.Parameter(
        torch.zeros(97, 16, dtype=torch.uint8), requires_grad=False
    )  # as 4-bit weights lie
    with pytest.raises(ModelError, match=r"torch\.uint8"):
        head_of(model)
