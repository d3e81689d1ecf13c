"""Does every kind of model get the first layout that it is right on, and right numbers in the one it falls back to?"""

from __future__ import annotations

import pytest
import torch

from dpo_engine.batch import ForestCollator
from dpo_engine.errors import ConfigError
from dpo_engine.model.forest_attention import forest_form
from dpo_engine.model.layout import choose_layout
from dpo_engine.model.scoring import bind_scoring
from support.architectures import MASKED, PADDED, SHARING, tiny_from, tiny_model
from support.forests import (
    assert_gradients_agree,
    assert_logps_agree,
    gradients,
    in_forests,
    one_by_one,
    random_trees,
)

REASONS = {
    "mamba": "MambaForCausalLM takes no position_ids",
    "lfm2": "its layers of type conv mix neighbouring tokens",
    "qwen3_next": "its layers of type linear_attention mix neighbouring tokens",
    "bloom": "BloomForCausalLM takes no position_ids",
    "falcon with alibi": "FalconForCausalLM cannot run it",
    "falcon_h1": "its layers of type hybrid mix neighbouring tokens",
    "gpt_neo with a window": "one mask for all layers would override its window_size=64",
    "llama4 with tempered queries": "it scales queries by their index in the row",
}


@pytest.mark.parametrize("name", [*SHARING, *MASKED])
def test_models_that_agree_share_prompts(name: str) -> None:
    model = tiny_model(name)
    bind_scoring(model)
    kept = {module: dict(vars(module)) for module in model.modules()}
    config = model.config.to_dict()
    layout = choose_layout(model)
    by_mask = name in MASKED
    assert layout.line == ("layout: shared by one mask" if by_mask else "layout: shared")
    assert layout.name == "shared" and layout.longest is None
    assert forest_form(model) == ("mask" if by_mask else "trees")
    assert model.config.to_dict() == config, "what was shortened for the probe came back"
    changed = {key for module, old in kept.items() for key in old if vars(module)[key] is not old[key]}
    assert not changed


@pytest.mark.parametrize("name", PADDED)
def test_models_that_do_not_agree_say_why_and_give_right_numbers_padded(name: str) -> None:
    model = tiny_model(name).train()
    data = random_trees()
    want = one_by_one(model, data)
    wanted = gradients(model, want)
    bind_scoring(model)
    layout = choose_layout(model)
    assert layout.name == "padded" and forest_form(model) is None
    assert REASONS[name] in layout.line and "not shared: " in layout.line and "not packed: " in layout.line
    assert "\n" not in layout.line
    got = in_forests(model, data, ForestCollator(200, layout.name, layout.longest))
    assert_logps_agree(got, want)
    assert_gradients_agree(gradients(model, got), wanted)


@pytest.mark.parametrize("name", ["bloom", "llama4 with tempered queries"])
def test_sharing_that_was_asked_for_is_refused_with_the_reason(name: str) -> None:
    model = tiny_model(name)
    bind_scoring(model)
    with pytest.raises(ConfigError, match=r'share_prompt="on", but .*use share_prompt="auto"') as caught:
        choose_layout(model, "on")
    assert REASONS[name] in str(caught.value)
    assert forest_form(model) is None


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_sharing_that_is_off_begins_with_packing(name: str) -> None:
    model = tiny_model(name)
    bind_scoring(model)
    assert choose_layout(model, "off").name == "packed"
    assert choose_layout(model, "on").name == "shared"
    with pytest.raises(ConfigError, match="share_prompt='perhaps'; expected one of auto, on, off"):
        choose_layout(model, "perhaps")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_cannot_be_called_tree_by_tree_falls_back(attention: str) -> None:
    model = tiny_model("llama")
    bind_scoring(model)
    model.config._attn_implementation = attention
    layout = choose_layout(model)
    assert layout.name == "padded" and forest_form(model) is None
    assert f"attention '{attention}' cannot be called tree by tree" in layout.line
    assert model.config._attn_implementation == attention


def test_a_window_beyond_the_probe_that_counts_indices_is_found() -> None:
    """A model that masks by indices agrees on anything shorter than its window, and is asked with a shorter one."""
    model = tiny_model("mistral with a window")
    model.config.sliding_window = 4096
    bind_scoring(model)
    assert choose_layout(model).name == "shared"
    hidden = model.model.layers[1].self_attn
    own = hidden.forward

    def by_index(hidden_states: torch.Tensor, **others: object) -> object:
        window = model.config.sliding_window
        fading = (torch.arange(hidden_states.shape[1]) < window).to(hidden_states)[None, :, None]
        return own(hidden_states=hidden_states * fading, **others)

    hidden.forward = by_index
    layout = choose_layout(model)
    assert layout.name == "padded" and "with sliding_window=5" in layout.line
    assert model.config.sliding_window == 4096


def test_a_model_that_fails_on_the_second_choice_is_asked_about_it_alone() -> None:
    """A neighbour that leaks only where prompts are shared: packing is still right."""
    model = tiny_model("llama")
    bind_scoring(model)
    own = model.model.embed_tokens.forward
    model.model.forward_without_leak = model.model.forward

    def leak(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **others: object) -> object:
        embeds = own(input_ids)
        if position_ids is not None:  # positions that go back to the end of a prompt: a second completion
            jump = torch.diff(position_ids[0], prepend=position_ids[0, :1])
            embeds = embeds + 0.5 * ((jump < 0) & (position_ids[0] > 0)).to(embeds)[None, :, None]
        return model.model.forward_without_leak(**{**others, "inputs_embeds": embeds, "position_ids": position_ids})

    model.model.forward = leak
    layout = choose_layout(model)
    assert layout.name == "packed" and layout.line.startswith("layout: packed (not shared: a log-prob is ")
    assert forest_form(model) == "trees"


def test_a_fault_below_the_rounding_of_bfloat16_is_not_left_to_the_probe() -> None:
    model = tiny_from(PADDED["llama4 with tempered queries"]()).eval().bfloat16()
    bind_scoring(model)
    assert choose_layout(model).name == "padded"
