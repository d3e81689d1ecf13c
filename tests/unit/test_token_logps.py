"""Does a model with `linear_logps_head` answer labels with the log-probs of its own logits, and stay the model it was?"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from dpo_engine import linear_logps_head, prepare_model, remove_linear_logps_head
from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.integrations.token_logps import TokenLogps
from dpo_engine.model import scoring
from support.tiny_models import CONFIGS, VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
LEFT_PADDED = (torch.arange(9) >= torch.tensor([0, 2, 4])[:, None]).long()
RIGHT_PADDED = LEFT_PADDED.flip(-1)
UPSTREAM = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))


def call(mask: Tensor = RIGHT_PADDED, **more: Any) -> dict[str, Tensor]:
    """Padding is not scored, nor are some tokens within."""
    labels = IDS.masked_fill(mask == 0, -100)
    labels[0, 3] = labels[1, 4] = -100
    return {"input_ids": IDS, "attention_mask": mask, "labels": labels, **more}


def by_logits(model: Any, arguments: dict[str, Any]) -> Tensor:
    labels = arguments["labels"]
    logits = model(**{name: value for name, value in arguments.items() if name != "labels"}).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp_min(0)).squeeze(-1)
    return nn.functional.pad(logps.masked_fill(labels[:, 1:] == -100, 0.0), (1, 0))


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_the_same_as_by_logits(model: Any, arguments: dict[str, Any], tolerance: float = 1e-5) -> None:
    """In value and in every gradient; the model has the head already."""
    expected = by_logits(model, arguments)
    expected_gradients = gradients(model, (expected * UPSTREAM).sum())
    found = model(**arguments).token_logps
    assert found.dtype == torch.float32 and found.shape == arguments["labels"].shape
    unscored = arguments["labels"] == -100
    unscored[:, 0] = True
    assert not found[unscored].any() and found[~unscored].all()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    found_gradients = gradients(model, (found * UPSTREAM).sum())
    assert found_gradients.keys() == expected_gradients.keys()
    size = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        assert (found_gradients[name] - gradient).norm() <= tolerance * (gradient.norm() + 0.1 * size), name


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_log_probs_loss_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model = tiny_model(name)
    arguments = call()
    own = model(**arguments).loss
    own_gradients = gradients(model, own)
    linear_logps_head(model)
    assert_the_same_as_by_logits(model, arguments)
    out = model(**arguments)
    torch.testing.assert_close(out.loss, own, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients(model, out.loss).items():
        torch.testing.assert_close(gradient, own_gradients[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("items", [17, torch.tensor(17)])
def test_the_loss_is_divided_by_the_items_of_the_whole_step_as_transformers_does(items: Any) -> None:
    model = tiny_model("Llama")
    own = model(**call(), num_items_in_batch=items).loss
    linear_logps_head(model)
    torch.testing.assert_close(model(**call(), num_items_in_batch=items).loss, own)


def test_a_batch_without_labels_that_count_has_transformers_nan_for_a_loss_and_zero_gradients() -> None:
    model = tiny_model("Llama")
    arguments = {**call(), "labels": torch.full_like(IDS, -100)}
    assert model(**arguments).loss.isnan()
    linear_logps_head(model)
    out = model(**arguments)
    assert out.loss.isnan() and not out.token_logps.any()
    assert not any(gradient.any() for gradient in gradients(model, out.token_logps.sum()).values())


def test_left_padding_with_and_without_positions() -> None:
    model = tiny_model("Llama")
    linear_logps_head(model)
    positions = (LEFT_PADDED.cumsum(-1) - 1).clamp_min(0)
    for arguments in (call(LEFT_PADDED), call(LEFT_PADDED, position_ids=positions)):
        assert_the_same_as_by_logits(model, arguments)


def test_embeddings_in_place_of_ids_and_arguments_by_position() -> None:
    model = tiny_model("Llama")
    linear_logps_head(model)
    arguments = call()
    expected = model(**arguments).token_logps
    embedded = model.get_input_embeddings()(IDS)
    others = {"attention_mask": RIGHT_PADDED, "labels": arguments["labels"]}
    assert torch.equal(model(inputs_embeds=embedded, **others).token_logps, expected)
    assert list(inspect.signature(model.forward).parameters)[:6][-1] == "labels"
    out = model(IDS, RIGHT_PADDED, None, None, None, arguments["labels"])
    assert torch.equal(out.token_logps, expected)
    plain = model(**arguments, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[1], expected)


def test_without_labels_it_is_the_models_own_forward_to_the_bit() -> None:
    model = tiny_model("Gemma2")
    before = model(input_ids=IDS), model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    linear_logps_head(model)
    assert torch.equal(model(input_ids=IDS).logits, before[0].logits)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=5, do_sample=False), before[1])


@pytest.mark.parametrize("prepared", [False, True])
def test_removing_it_leaves_no_trace(prepared: bool) -> None:
    model = tiny_model("Llama")
    if prepared:
        prepare_model(model)
    before = dict(vars(model))
    own = type(model).forward(model, **call())
    linear_logps_head(model)
    linear_logps_head(model, extras=("entropy",))
    remove_linear_logps_head(model)
    remove_linear_logps_head(model)
    assert {name: value for name, value in vars(model).items() if name != "scoring_backend"} == {
        name: value for name, value in before.items() if name != "scoring_backend"
    }
    after = model(**call())
    assert torch.equal(after.loss, own.loss) and torch.equal(after.logits, own.logits)


@pytest.fixture
def accelerate_anew() -> Iterator[None]:
    """Accelerate keeps the first mixed precision of a process for all that come after."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(True)
    yield
    state._reset_state(True)


@pytest.mark.usefixtures("accelerate_anew")
def test_removing_it_below_a_wrapper_gives_the_models_own_answer_too() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("Llama")
    own = model(**call()).loss
    linear_logps_head(model)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert prepared(**call()).token_logps is not None
    remove_linear_logps_head(prepared)
    assert "logits" in prepared(**call())
    torch.testing.assert_close(prepared(**call()).loss, own, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("accelerate_anew")
def test_under_accelerates_mixed_precision_it_computes_in_that_precision_or_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny_model("Llama")
    linear_logps_head(model)
    exact = model(**call()).token_logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**call()).token_logps
    found = accelerator.prepare(model)(**call()).token_logps
    assert torch.equal(found, expected) and not torch.equal(found, exact)
    with pytest.raises(ModelError, match=r"call linear_logps_head before accelerator.prepare"):
        linear_logps_head(accelerator.prepare(tiny_model("Llama")))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_peft_may_come_before_or_after_and_adapt_the_head(first: bool, dropout: float) -> None:
    peft = pytest.importorskip("peft")
    model: Any = tiny_model("Llama")
    targets = ["q_proj", "up_proj", "lm_head"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    if first:
        linear_logps_head(model)
    model = peft.get_peft_model(model, config).eval()
    if not first:
        linear_logps_head(model)
    assert_the_same_as_by_logits(model, call())
    with model.disable_adapter():
        torch.testing.assert_close(model(**call()).token_logps, by_logits(model, call()), rtol=1e-5, atol=1e-5)
    remove_linear_logps_head(model)
    assert "logits" in model(**call())


def test_a_learned_prompt_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match="puts tokens of its own before the labels"):
        linear_logps_head(peft.get_peft_model(tiny_model("Llama"), config))


def test_a_model_in_four_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model("Llama", hidden_size=64, head_dim=16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            packed.load_state_dict(module.state_dict())
            model.set_submodule(name, packed.to("cpu"))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    linear_logps_head(model)
    model.train()  # in eval mode bitsandbytes would repack the head for inference
    assert_the_same_as_by_logits(model, call(), tolerance=1e-4)


def test_gradient_checkpointing_and_tied_weights() -> None:
    model = tiny_model("Qwen3").train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    linear_logps_head(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_the_same_as_by_logits(model, call())


def test_extras_are_aligned_with_the_labels() -> None:
    model = tiny_model("Cohere")
    linear_logps_head(model, extras=("entropy", "is_top1"))
    out = model(**call())
    logits = model(input_ids=IDS, attention_mask=RIGHT_PADDED).logits[:, :-1].log_softmax(-1)
    scored = call()["labels"][:, 1:] != -100
    entropy = nn.functional.pad(-(logits.exp() * logits).sum(-1) * scored, (1, 0))
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-5, atol=1e-5)
    top = nn.functional.pad((logits.argmax(-1) == call()["labels"][:, 1:]) & scored, (1, 0))
    assert torch.equal(out.is_top1, top) and "log_sum_squares" not in out
    linear_logps_head(model)
    assert "entropy" not in model(**call())
    for extras in ("entropy", ["entropie"]):
        with pytest.raises(ConfigError, match="expected a tuple of names among entropy"):
            linear_logps_head(model, extras=extras)


def test_hidden_states_come_along_where_they_are_asked_for() -> None:
    model = tiny_model("Llama")
    own = model(**call(), output_hidden_states=True).hidden_states
    linear_logps_head(model)
    found = model(**call(), output_hidden_states=True).hidden_states
    assert len(found) == len(own) and all(map(torch.equal, found, own))
    assert model(**call()).hidden_states is None


def test_no_logits_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    linear_logps_head(model)
    rows: list[int] = []
    real = scoring.linear_logps
    monkeypatch.setattr(
        scoring, "linear_logps", lambda hidden, *a, **k: (rows.append(len(hidden)), real(hidden, *a, **k))[1]
    )
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    labels = call()["labels"]
    assert isinstance(model(**call()), TokenLogps)
    assert not calls and rows == [int((labels[:, 1:] != -100).sum())]


def test_a_head_whose_weight_only_comes_with_a_call_is_called() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("Llama").requires_grad_(False)
    expected = by_logits(model, call())
    linear_logps_head(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.is_meta
    own = model.lm_head._old_forward
    torch.testing.assert_close(model(**call()).token_logps, expected, rtol=1e-5, atol=1e-5)
    assert model.lm_head._old_forward == own and model.lm_head.weight.is_meta


def test_a_scale_that_the_engine_does_not_know_is_refused_with_both_numbers() -> None:
    model = tiny_model("Llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    before = dict(vars(model))
    with pytest.raises(ModelError, match=r"gives a logit of \S+ where the engine gives \S+"):
        linear_logps_head(model)
    assert set(vars(model)) - set(before) <= {"scoring_backend"} and "logits" in model(**call())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"logits_to_keep": 2}, "logits_to_keep=2 came with labels"),
        ({"shift_labels": IDS}, "shift_labels came with labels"),
        ({"labels": IDS[:, :-1]}, r"labels are \(3, 8\)"),
    ],
)
def test_what_it_would_ignore_is_refused(more: dict[str, Any], message: str) -> None:
    model = tiny_model("Llama")
    linear_logps_head(model)
    with pytest.raises(ValueError, match=message):
        model(**{**call(), **more})


def test_a_router_loss_is_refused_rather_than_left_out() -> None:
    model = tiny_model("Mixtral")
    linear_logps_head(model)
    with pytest.raises(ModelError, match="adds a router loss"):
        model(**call(), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ModelError, match="adds a router loss"):
        model(**call())


def test_what_is_no_causal_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear is no causal language model"):
        linear_logps_head(nn.Linear(2, 2))


def test_copies_have_it_and_pickles_and_saved_models_are_the_ordinary_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("Llama")
    linear_logps_head(model)
    expected = model(**call()).token_logps
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(copied(**call()).token_logps, expected)
    restored = pickle.loads(pickle.dumps(copied))
    assert "logits" in restored(**call())
    linear_logps_head(restored)
    assert torch.equal(restored(**call()).token_logps, expected)
    copied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "logits" in loaded(**call())
