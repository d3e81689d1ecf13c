"""Do the same tokens under the same model have one address, and anything else another?"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from dpo_engine.batch import Tree
from dpo_engine.errors import CacheError
from dpo_engine.reference.addresses import entry_addresses
from dpo_engine.reference.space import ReferenceSpace, reference_space
from dpo_engine.reference.weights import weights_digest
from support.tiny_models import tiny_model
from support.tiny_pairs import tiny_llama


def addresses(prompt: list[int], *completions: list[int], **more: object) -> list[bytes]:
    return entry_addresses(Tree(prompt_ids=prompt, completions=completions, **more))  # type: ignore[arg-type]


def test_an_address_is_of_prompt_completion_and_what_is_scored() -> None:
    base = addresses([1, 2], [3, 4], [5])
    assert len(set(base)) == 2 and all(len(address) == 16 for address in base)
    assert addresses([1, 2], [5], [3, 4]) == base[::-1]  # order is not in it
    for other in (
        addresses([1, 3], [3, 4]),
        addresses([1, 2], [3, 5]),
        addresses([1], [2, 3, 4]),  # the same ids, with another boundary
        addresses([1, 2, 3], [4]),
        addresses([1, 2], [3, 4], scored=[[False, True]]),
        addresses([1, 2], [3, 4], scored=[[True, False]]),
    ):
        assert other[0] not in base
    assert addresses([1, 2], [3, 4], [5], scored=[[True, True], [True]]) == base  # a mask of ones is no mask


def test_weights_of_the_loss_are_not_in_an_address() -> None:
    weighted = addresses([1, 2], [3, 4], token_weights=[[0.5, 2.0]], completion_weights=[3.0])
    assert weighted == addresses([1, 2], [3, 4])


def test_a_digest_is_of_the_tensors_and_the_same_in_another_copy() -> None:
    model = tiny_llama()
    assert weights_digest(model) == weights_digest(tiny_llama())
    before = weights_digest(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3  # type: ignore[index,union-attr]
    assert weights_digest(model) != before
    assert weights_digest(tiny_llama().bfloat16()) != before
    tied, apart = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True)
    assert weights_digest(tied) == weights_digest(apart)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2", "Phi"])
def test_adapters_do_not_move_the_digest_of_what_lies_under_them(name: str) -> None:
    plain = weights_digest(tiny_model(name))
    for rank in (4, 8):
        config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = get_peft_model(tiny_model(name), config)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        assert weights_digest(policy.get_base_model()) == plain
    names = {path.split(".")[-1] for path, _ in tiny_model(name).named_modules()}
    saved = LoraConfig(target_modules=sorted(names & {"q_proj", "c_attn"}), modules_to_save=["lm_head"])
    policy = get_peft_model(tiny_model(name), saved)
    assert weights_digest(policy.get_base_model()) == plain


def test_a_reference_with_adapters_is_addressed_by_them() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    first = reference_space(model.get_base_model(), with_adapters=True)
    assert first.address != reference_space(tiny_llama(), with_adapters=True).address
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert reference_space(model.get_base_model(), with_adapters=True).address != first.address
    other = get_peft_model(
        tiny_llama(), LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    other.load_state_dict(model.state_dict())
    assert (
        reference_space(other.get_base_model(), with_adapters=True).address
        != reference_space(model.get_base_model(), with_adapters=True).address
    )


def test_which_adapters_are_on_and_how_strongly_is_in_the_address() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config, adapter_name="a")
    model.add_adapter("b", config)

    def address() -> str:
        return reference_space(model.get_base_model(), with_adapters=True).address

    found = [address()]
    model.set_adapter("b")
    found.append(address())
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    found.append(address())
    model.base_model.disable_adapter_layers()
    found.append(address())
    assert len(set(found)) == 4


def test_adapters_that_are_merged_are_refused_where_the_weights_under_them_are_meant() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.merge_adapter()
    with pytest.raises(CacheError, match=r"adapters are merged .* call unmerge_adapter\(\) first"):
        weights_digest(model.get_base_model())
    model.unmerge_adapter()
    assert weights_digest(model.get_base_model()) == weights_digest(tiny_llama())


def space(**changes: object) -> ReferenceSpace:
    return reference_space(tiny_llama(**changes))


def test_a_space_is_of_everything_that_decides_the_numbers() -> None:
    base = space()
    assert base.address == space().address and len(base.address) == 32
    assert reference_space(tiny_llama(), with_adapters=True).address == base.address  # it has none
    changed = {
        "rope": space(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        "epsilon": space(rms_norm_eps=1e-3),
        "dtype": reference_space(tiny_llama().bfloat16()),
        "autocast": reference_space(tiny_llama(), mixed_precision="bf16"),
        "weights": reference_space(tiny_llama(seed=1)),
    }
    assert len({base.address, *(other.address for other in changed.values())}) == 1 + len(changed)
    buffers, rope = base.differences(changed["rope"].parts)
    assert rope == "config.rope_parameters.rope_theta: 10000.0 here, 500.0 there" and buffers.startswith("buffers: ")


def test_what_decides_nothing_is_not_in_a_space() -> None:
    base = space()
    model = tiny_llama()
    model.config.use_cache = False  # type: ignore[union-attr]
    model.config.pad_token_id = 7  # type: ignore[union-attr]
    model.config._name_or_path = "elsewhere"  # type: ignore[union-attr]
    assert reference_space(model).address == base.address


def test_a_model_that_was_saved_and_loaded_is_in_the_same_space(tmp_path: object) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert reference_space(loaded).address == reference_space(model).address


def test_weights_that_are_not_here_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(CacheError, match=r"model.embed_tokens.weight is offloaded; set reference_cache: off"):
        weights_digest(model)
