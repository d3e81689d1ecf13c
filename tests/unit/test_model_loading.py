"""Is a model that can be trained loaded as it should be, and every other one refused in one line, before its weights?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model import loading
from dpo_engine.model.loading import (
    check_model,
    cpu_has_bf16,
    load_model,
    load_tokenizer,
    resolve_dtype,
    resolve_model,
)
from support.tiny_models import tiny_config, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, saved."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("Llama").save_pretrained(folder)
    return folder


def with_config(saved: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of the saved model whose config.json says something else."""
    folder = tmp_path / "changed"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    return folder


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ModelError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- names ----


def test_a_folder_and_a_hub_id_are_taken_as_they_are(saved: Path) -> None:
    assert resolve_model(str(saved)) == str(saved)
    assert resolve_model("owner/some-model.v2") == "owner/some-model.v2"
    assert resolve_model("gpt2") == "gpt2"


def test_the_word_smollm2_is_the_packaged_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "smollm2_folder", lambda progress: tmp_path)
    assert resolve_model("smollm2") == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["./no-such", "../no-such", "/no/such", "~/no-such", "a/b/c", "ends/with/", "two words", ""]
)
def test_a_path_that_does_not_exist_is_refused_at_once(name: str) -> None:
    message = refusal(resolve_model, name)
    assert repr(name) in message and "no such folder" in message and "smollm2" in message


def test_a_file_is_refused(saved: Path) -> None:
    assert "is a file; expected a model folder" in refusal(resolve_model, str(saved / "config.json"))


def test_a_folder_without_a_config_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert "has no config.json; it holds notes.txt;" in refusal(resolve_model, str(tmp_path))


def test_a_folder_with_an_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = with_config(saved, tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    assert "holds a PEFT adapter" in refusal(resolve_model, str(folder))


# ---- configs ----


def test_a_causal_model_passes_and_gives_its_config(saved: Path) -> None:
    assert check_model(str(saved)).model_type == "llama"


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import BartConfig, T5Config

    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    assert "is not a causal language model (model_type 't5'" in refusal(check_model, str(tmp_path / "t5"))
    BartConfig(d_model=16).save_pretrained(tmp_path / "bart")
    assert "it is an encoder-decoder" in refusal(check_model, str(tmp_path / "bart"))


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_an_encoder_is_refused_unless_it_says_that_it_decodes(name: str, tmp_path: Path) -> None:
    import transformers

    config_class = getattr(transformers, f"{name}Config")
    config_class(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "encoder")
    assert "it is an encoder" in refusal(check_model, str(tmp_path / "encoder"))
    config_class(hidden_size=16, num_hidden_layers=1, is_decoder=True).save_pretrained(tmp_path / "decoder")
    check_model(str(tmp_path / "decoder"))


def test_a_vision_model_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(hidden_size=16).save_pretrained(tmp_path)
    assert "is not a causal language model (model_type 'vit'" in refusal(check_model, str(tmp_path))


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaModel"])
def test_a_checkpoint_without_its_language_model_head_is_refused_by_its_config(
    saved: Path, tmp_path: Path, architecture: str
) -> None:
    message = refusal(check_model, str(with_config(saved, tmp_path, architectures=[architecture])))
    assert f"architectures ['{architecture}']" in message


def test_remote_code_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    folder = with_config(
        saved,
        tmp_path,
        model_type="no_such_type",
        auto_map={"AutoConfig": "canary.CanaryConfig", "AutoModelForCausalLM": "canary.CanaryModel"},
    )
    ran = tmp_path / "ran"
    (folder / "canary.py").write_text(f"open({str(ran)!r}, 'w')\n")
    assert "needs code of its own to be run (auto_map" in refusal(check_model, str(folder))
    assert not ran.exists()


def test_remote_code_beside_a_model_that_transformers_knows_is_not_run(saved: Path, tmp_path: Path) -> None:
    folder = with_config(saved, tmp_path, auto_map={"AutoModelForCausalLM": "canary.CanaryModel"})
    ran = tmp_path / "ran"
    (folder / "canary.py").write_text(f"open({str(ran)!r}, 'w')\n")
    check_model(str(folder))
    assert type(load_model(str(folder), dtype=torch.float32, trainable=False)).__name__ == "LlamaForCausalLM"
    assert not ran.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/their-kernel"},
        {"_attn_implementation": "someone/their-kernel@main:attend"},
        {"attn_implementation": {"": "sdpa", "text_config": "someone/their-kernel"}},
        {"text_config": {"attn_implementation": "someone/their-kernel"}},
        {"experts_implementation": "someone/their-kernel"},
    ],
)
def test_an_implementation_that_names_a_repository_is_refused(saved: Path, tmp_path: Path, changes: Any) -> None:
    message = refusal(check_model, str(with_config(saved, tmp_path, **changes)))
    assert "_implementation" in message and "someone/their-kernel" in message


def test_an_attention_that_would_be_fetched_where_it_is_missing_is_left_to_transformers(
    saved: Path, tmp_path: Path
) -> None:
    folder = with_config(saved, tmp_path, attn_implementation="flash_attention_2", _attn_implementation_autoset=True)
    check_model(str(folder))
    model = load_model(str(folder), dtype=torch.float32, trainable=False)
    assert model.config._attn_implementation == "sdpa"


def test_a_plain_attention_may_be_named(saved: Path, tmp_path: Path) -> None:
    folder = with_config(saved, tmp_path, attn_implementation="eager")
    assert check_model(str(folder))._attn_implementation == "eager"
    assert load_model(str(folder), dtype=torch.float32, trainable=False).config._attn_implementation == "eager"


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"hidden_size": 16}', "\x00", '{"model_type": 3}'])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path) in refusal(check_model, str(tmp_path))


def test_a_config_value_of_the_wrong_type_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    assert "'hidden_size'" in refusal(check_model, str(with_config(saved, tmp_path, hidden_size="wide")))


def test_a_model_type_that_is_not_known_is_refused(saved: Path, tmp_path: Path) -> None:
    assert "model_type 'llama99'" in refusal(check_model, str(with_config(saved, tmp_path, model_type="llama99")))


def test_a_hub_id_that_cannot_be_reached_says_that_there_is_no_such_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "model nobody/nothing is no folder here" in refusal(check_model, "nobody/nothing")


# ---- weights ----


@pytest.mark.parametrize(
    ("trainable", "expected"), [(False, torch.bfloat16), (True, torch.float32)], ids=["frozen", "trainable"]
)
def test_frozen_weights_keep_the_dtype_and_trained_ones_are_float32(
    saved: Path, trainable: bool, expected: torch.dtype
) -> None:
    model = load_model(str(saved), dtype=torch.bfloat16, trainable=trainable)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert {parameter.requires_grad for parameter in model.parameters()} == {trainable}
    assert not any(module.training for module in model.modules())


def test_the_loaded_weights_are_the_saved_ones(saved: Path) -> None:
    expected = tiny_model("Llama").state_dict()
    loaded = load_model(str(saved), dtype=torch.float32, trainable=False).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_tied_head_needs_no_weights_of_its_own(tmp_path: Path) -> None:
    model = tiny_model("Qwen3")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float32, trainable=True)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_missing_head_is_refused_by_name(tmp_path: Path) -> None:
    tiny_model("Llama").model.save_pretrained(tmp_path)
    message = refusal(load_model, str(tmp_path), dtype=torch.float32, trainable=False)
    assert "has no weights for lm_head.weight" in message


def test_weights_that_do_not_fit_the_config_are_refused_with_both_shapes(saved: Path, tmp_path: Path) -> None:
    folder = with_config(saved, tmp_path, vocab_size=98)
    message = refusal(load_model, str(folder), dtype=torch.float32, trainable=False)
    assert "lm_head.weight (97, 32) instead of (98, 32)" in message


def test_pickled_weights_are_refused_and_not_opened(saved: Path, tmp_path: Path) -> None:
    folder = with_config(saved, tmp_path)
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Canary:
        def __reduce__(self) -> Any:
            return open, (str(ran), "w")

    torch.save(Canary(), folder / "pytorch_model.bin")
    message = refusal(load_model, str(folder), dtype=torch.float32, trainable=False)
    assert "has no .safetensors file, only pytorch_model.bin" in message and "save_pretrained" in message
    assert not ran.exists()


def test_truncated_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = with_config(saved, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "its weights cannot be read" in refusal(load_model, str(folder), dtype=torch.float32, trainable=False)


def test_a_missing_tokenizer_is_refused(saved: Path, tmp_path: Path) -> None:
    assert "has no tokenizer" in refusal(load_tokenizer, str(saved))
    folder = with_config(saved, tmp_path)
    (folder / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in refusal(load_tokenizer, str(folder))


def test_a_tokenizer_that_needs_remote_code_is_refused_and_not_run(tmp_path: Path) -> None:
    tiny_config("Llama").save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "canary.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto_map = {"AutoTokenizer": ["canary.CanaryTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Canary", "auto_map": auto_map}))
    assert "its tokenizer cannot be read" in refusal(load_tokenizer, str(tmp_path))
    assert not ran.exists()


# ---- dtypes ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("fp16", torch.float16),
    ],
)
def test_short_and_long_names_of_a_dtype_are_the_same(name: str, expected: torch.dtype) -> None:
    assert resolve_dtype(name) is expected


def test_auto_is_bfloat16_only_where_the_hardware_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(loading, "cpu_has_bf16", lambda has=has: has)
        assert resolve_dtype("auto") is expected
    assert cpu_has_bf16() in (True, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert resolve_dtype("auto") is expected


def test_an_unknown_dtype_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(
        ConfigError, match=r"dtype 'bfloat' is unknown; expected one of auto, float32, .*; did you mean 'bfloat16'"
    ):
        resolve_dtype("bfloat")
