"""Does a bound model return its own log-probs, and stay the model it was otherwise?"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dpo_engine.errors import ModelError
from dpo_engine.model import scoring
from dpo_engine.model.adapters import add_lora
from dpo_engine.model.scoring import Exact, ScoredTokens, bind_scoring, decoder_of, is_bound, unbind_scoring
from support.tiny_models import CONFIGS, VOCABULARY, naive_token_logps, tiny_model

INPUT_IDS = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
SCORE_FROM = torch.tensor([4, 4, 5, 17, 12, 9])  # not sorted, and one row predicts for two completions
LABELS = torch.tensor([7, 60, 96, 0, 33, 2])
UPSTREAM = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.7, -0.1])


def scored(model: Any, **more: Any) -> Tensor:
    mask = torch.ones_like(INPUT_IDS)
    return model(input_ids=INPUT_IDS, attention_mask=mask, score_from=SCORE_FROM, labels=LABELS, **more).token_logps


def naive(model: Any) -> Tensor:
    return naive_token_logps(model, INPUT_IDS, SCORE_FROM, LABELS)


def gradients(model: Any, token_logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (token_logps * UPSTREAM).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-6 * norm, f"{name}: {difference:.2e} of {gradient.norm():.2e}"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_log_probs_and_every_gradient_are_those_of_the_models_own_logits(name: str) -> None:
    model = tiny_model(name)
    expected = naive(model)
    expected_gradients = gradients(model, expected)
    bind_scoring(model)
    found = scored(model)
    assert found.dtype == torch.float32 and found.shape == LABELS.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, found), expected_gradients)


def test_the_head_is_given_the_scored_rows_only_and_no_logits_are_built() -> None:
    model = tiny_model("Llama")
    bind_scoring(model)
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    assert isinstance(model(input_ids=INPUT_IDS, score_from=SCORE_FROM, labels=LABELS), ScoredTokens)
    assert not calls


def test_no_scored_token_is_an_empty_result_with_a_zero_gradient() -> None:
    model = tiny_model("Llama")
    bind_scoring(model)
    none = torch.empty(0, dtype=torch.int64)
    token_logps = model(input_ids=INPUT_IDS, score_from=none, labels=none).token_logps
    assert token_logps.shape == (0,)
    token_logps.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_call_without_score_from_is_the_models_own_forward() -> None:
    model = tiny_model("Llama")
    expected = model(input_ids=INPUT_IDS, labels=INPUT_IDS)
    generated = model.generate(INPUT_IDS, max_new_tokens=4, do_sample=False)
    bind_scoring(model)
    found = model(input_ids=INPUT_IDS, labels=INPUT_IDS)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert torch.equal(model.generate(INPUT_IDS, max_new_tokens=4, do_sample=False), generated)


def test_score_from_without_labels_is_an_error() -> None:
    model = tiny_model("Llama")
    bind_scoring(model)
    with pytest.raises(ValueError, match="without labels"):
        model(input_ids=INPUT_IDS, score_from=SCORE_FROM)


def test_binding_twice_is_binding_once_and_unbinding_leaves_no_trace() -> None:
    model = tiny_model("Llama")
    before = dict(vars(model))
    bind_scoring(model)
    first = model.forward
    bind_scoring(model)
    assert model.forward == first and is_bound(model)
    unbind_scoring(model)
    unbind_scoring(model)
    assert not is_bound(model)
    assert {name for name in vars(model) if name not in before} == set()
    assert model.forward == type(model).forward.__get__(model)


def test_a_forward_that_was_replaced_on_the_instance_is_kept() -> None:
    model = tiny_model("Llama")
    calls: list[str] = []
    own = model.forward

    def with_hook(module: Any, *args: Any, **kwargs: Any) -> Any:  # the form in which offloading hooks are added
        calls.append("hook")
        return own(*args, **kwargs)

    hooked = functools.update_wrapper(functools.partial(with_hook, model), own)
    model.forward = hooked
    expected = naive(model)
    bind_scoring(model)
    torch.testing.assert_close(scored(model), expected, rtol=1e-5, atol=1e-5)
    model(input_ids=INPUT_IDS)
    assert len(calls) == 2
    unbind_scoring(model)
    assert model.forward is hooked


def test_a_deep_copy_scores_with_its_own_weights_and_keeps_the_first_alive_no_longer() -> None:
    model = tiny_model("Llama")
    bind_scoring(model)
    expected = naive(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(scored(copied), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(naive(copied), expected)
    first = weakref.ref(model)
    del model
    gc.collect()
    assert first() is None
    unbind_scoring(copied)
    assert copied.forward == type(copied).forward.__get__(copied)


def test_pickling_gives_back_the_ordinary_model_which_can_be_bound_again() -> None:
    model = tiny_model("Llama")
    bind_scoring(model)
    restored = pickle.loads(pickle.dumps(model))
    assert not is_bound(restored)
    torch.testing.assert_close(naive(restored), naive(model))
    bind_scoring(restored)
    torch.testing.assert_close(scored(restored), scored(model))


def test_a_saved_bound_model_is_the_ordinary_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("Llama")
    bind_scoring(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(naive(loaded), naive(model))


def test_forward_still_names_its_arguments_and_score_from() -> None:
    model = tiny_model("Llama")
    before = list(inspect.signature(model.forward).parameters)
    bind_scoring(model)
    after = list(inspect.signature(model.forward).parameters)
    assert [name for name in after if name != "score_from"] == before
    assert after.index("score_from") == len(after) - 2  # before **kwargs


@pytest.mark.parametrize("bind_first", [True, False])
def test_scores_pass_through_peft_in_value_and_gradient(bind_first: bool) -> None:
    model = tiny_model("Llama")
    if bind_first:
        bind_scoring(model)
    policy = add_lora(model, r=4, alpha=8)
    if not bind_first:
        bind_scoring(policy.get_base_model())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = naive(policy)
    expected_gradients = gradients(policy, expected)
    found = scored(policy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found_gradients = gradients(policy, found)
    assert found_gradients and all("lora_" in name for name in found_gradients)
    assert_same_gradients(found_gradients, expected_gradients)


def test_adapters_are_saved_and_loaded_by_peft_as_ever(tmp_path: Path) -> None:
    from peft import PeftModel

    policy = add_lora(tiny_model("Llama"), r=4, alpha=8)
    bind_scoring(policy.get_base_model())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    policy.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("Llama"), tmp_path).eval()
    torch.testing.assert_close(naive(loaded), naive(policy))


def test_gradients_are_the_same_with_gradient_checkpointing() -> None:
    model = tiny_model("Llama")
    bind_scoring(model)
    expected = gradients(model, scored(model.train()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradients(gradients(model, scored(model)), expected)


def test_a_tied_head_gives_the_embedding_both_of_its_gradients() -> None:
    model = tiny_model("Qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    bind_scoring(model)
    unused = next(token for token in range(3, VOCABULARY) if token not in INPUT_IDS and token not in LABELS)
    gradient = gradients(model, scored(model))["model.embed_tokens.weight"]
    assert gradient[unused].any(), "a token that is only in the softmax has a gradient through the head"
    frozen = tiny_model("Qwen3")
    frozen.lm_head.weight = torch.nn.Parameter(frozen.lm_head.weight.detach().clone(), requires_grad=False)
    bind_scoring(frozen)
    assert not gradients(frozen, scored(frozen))["model.embed_tokens.weight"][unused].any()


def test_float32_weights_score_under_bfloat16_autocast() -> None:
    model = tiny_model("Llama")
    bind_scoring(model)
    expected = naive(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scored(model)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.5)


def test_the_backend_of_the_model_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Gemma2")
    bind_scoring(model)
    seen: list[str] = []
    real = scoring.linear_logps

    def spy(*args: Any, backend: str, **kwargs: Any) -> Tensor:
        seen.append(backend)
        return real(*args, backend=backend, **kwargs)

    monkeypatch.setattr(scoring, "linear_logps", spy)
    automatic = scored(model)
    model.scoring_backend = "reference"
    torch.testing.assert_close(scored(model), automatic, rtol=1e-5, atol=1e-5)
    assert seen == ["auto", "reference"]


def test_a_model_without_a_separate_decoder_is_refused() -> None:
    model: Any = SimpleNamespace()
    model.base_model, model.get_decoder = model, lambda: model
    with pytest.raises(ModelError, match="SimpleNamespace has no decoder apart from its head"):
        decoder_of(model)


def test_an_output_that_fsdp2_casts_keeps_its_float32_log_probs() -> None:
    """It casts every tensor of an output to its `output_dtype`, which accelerate sets in 16 bits, and makes the output anew."""
    logps = torch.tensor([-6.08823, -0.00012])
    output = ScoredTokens(token_logps=logps, exact=Exact(token_logps=logps))
    cast = tree_map(lambda x: x.bfloat16() if isinstance(x, torch.Tensor) else x, output)
    assert torch.equal(cast.token_logps, logps) and cast.token_logps.dtype == torch.float32
    assert torch.equal(cast["token_logps"], logps)
