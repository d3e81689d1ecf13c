"""Does the probe pass what is right, refuse what is misread, and leave no trace?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_engine.errors import ModelError
from dpo_engine.model import head, probe, scoring
from dpo_engine.model.adapters import add_lora
from dpo_engine.model.head import HeadTransform
from dpo_engine.model.probe import probe_head
from dpo_engine.model.scoring import bind_scoring, is_bound
from support.tiny_models import CONFIGS, tiny_model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_family_that_scores_right_passes(name: str) -> None:
    probe_head(tiny_model(name))


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "GPTJ", "Mixtral"])
def test_bfloat16_weights_pass(name: str) -> None:
    probe_head(tiny_model(name).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "read", "given"),
    [
        ("Gemma2", HeadTransform(), "softcap=None"),  # dropped
        ("Gemma2", HeadTransform(softcap=30.0), "softcap=30"),
        ("Llama", HeadTransform(softcap=30.0), "softcap=30"),  # made up
        ("Cohere", HeadTransform(), "logit_scale=1,"),
        ("Granite", HeadTransform(logit_scale=4.0), "logit_scale=4,"),  # multiplied instead of divided
        ("Cohere", HeadTransform(logit_scale=0.2501), "logit_scale=0.2501,"),
    ],
)
@pytest.mark.parametrize("wide", [True, False])
def test_a_misread_transform_is_refused_with_both_numbers(
    name: str, read: HeadTransform, given: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    if not wide:  # logits near zero, where a softcap does nothing: as after random initialisation
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(0.01)
    for module in (probe, scoring):
        monkeypatch.setattr(module, "read_head_transform", lambda config: read)
    with pytest.raises(
        ModelError, match=r"the head gives a logit of -?[\d.e+-]+ where the engine gives -?[\d.e+-]+"
    ) as caught:
        probe_head(model)
    assert given in str(caught.value) and "\n" not in str(caught.value)


def test_a_scale_under_a_name_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "DIVISORS", ())
    with pytest.raises(ModelError, match="does not read from its config"):
        probe_head(tiny_model("Granite"))


def test_a_bias_that_the_engine_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "head_of", lambda model: replace(head.head_of(model), bias=None))
    with pytest.raises(ModelError, match="the head gives a logit of"):
        probe_head(tiny_model("GPTJ"))


def own_forward_with(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward that changes the logits after the head."""

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        out = type(model).forward(model, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    return forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits - 3.0 * (logits > 0), "the head gives a logit of"),
        (lambda logits: logits * float("nan"), "the head gives a logit of nan"),
        (lambda logits: logits.index_fill(-1, torch.tensor([5]), float("nan")), r"a logit of nan .*\(token 5\)"),
        (lambda logits: logits[..., :-1], "returns 96 logits from a head of 97 rows"),
        (lambda logits: logits * 1.01, "the head gives a logit of"),
    ],
)
def test_a_model_that_changes_its_logits_by_itself_is_refused(change: Any, message: str) -> None:
    model = tiny_model("Llama")
    model.forward = own_forward_with(change).__get__(model)
    with pytest.raises(ModelError, match=message):
        probe_head(model)


def test_a_hidden_state_that_is_changed_before_the_head_is_refused() -> None:
    model = tiny_model("Llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    with pytest.raises(ModelError, match="the head gives a logit of"):
        probe_head(model)


def test_a_scoring_forward_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = scoring.linear_logps
    monkeypatch.setattr(scoring, "linear_logps", lambda *args, **kwargs: real(*args, **kwargs) - 0.01)
    with pytest.raises(ModelError, match=r"the head gives a log-prob of .* where the engine gives"):
        probe_head(tiny_model("Llama"))


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    model = tiny_model("Llama")

    def leak(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + 0.1 * output.last_hidden_state.mean(1, keepdim=True)
        return output

    model.model.register_forward_hook(leak)
    with pytest.raises(ModelError, match="is not causal"):
        probe_head(model)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = add_lora(tiny_model("Llama"), dropout=0.5).train()
    model.get_base_model().model.layers[0].eval()  # a mix of modes
    modes = [module.training for module in model.modules()]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    probe_head(model.get_base_model())
    assert [module.training for module in model.modules()] == modes
    assert not is_bound(model.get_base_model())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    bind_scoring(model.get_base_model())
    probe_head(model.get_base_model())
    assert is_bound(model.get_base_model())


def test_dropout_does_not_disturb_the_probe() -> None:
    probe_head(tiny_model("GPT2", resid_pdrop=0.5, embd_pdrop=0.5).train())


def test_modes_come_back_after_a_refusal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Gemma2").train()
    monkeypatch.setattr(probe, "read_head_transform", lambda config: HeadTransform())
    with pytest.raises(ModelError):
        probe_head(model)
    assert all(module.training for module in model.modules())
    assert not is_bound(model) and not model.model._forward_hooks
