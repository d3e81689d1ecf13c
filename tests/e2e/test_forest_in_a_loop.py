"""Can a loop of one's own score forests: prepare a model, lay trees out, sum per completion, train?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from dpo_engine import Tree, build_forest, forest_token_logps, prepare_model
from dpo_engine.errors import ConfigError, ModelError
from support.tiny_pairs import tiny_llama

TREES = [([1, 2, 3], [[4, 5], [6]]), ([7], [[8, 9, 10]]), ([11, 12], [[13], [14, 15], [16, 17, 18]])]


def sums_one_by_one(model: Any) -> list[float]:
    found = []
    for prompt, completions in TREES:
        for completion in completions:
            ids = torch.tensor([prompt + completion])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            found.append(logps[len(prompt) - 1 :].sum().item())
    return found


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "peft"])
def test_a_prepared_model_scores_any_number_of_completions_and_still_gives_logits(lora: bool) -> None:
    model: Any = tiny_llama().eval()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    before = sums_one_by_one(model)
    layout = prepare_model(model)
    assert layout.name == "shared"
    forest = build_forest(TREES, layout.name)
    token_logps = forest_token_logps(model, forest)
    assert [part.sum().item() for part in token_logps.split(forest.lengths)] == pytest.approx(before, rel=1e-5)
    assert sums_one_by_one(model) == before
    token_logps.sum().backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_trees_may_be_tuples_or_have_masks_and_weights() -> None:
    plain = build_forest([([1, 2], [[3, 4, 5]])])
    masked = build_forest([Tree(prompt_ids=[1, 2], completions=[[3, 4, 5]], scored=[[True, False, True]])])
    assert plain.labels.tolist() == [3, 4, 5] and masked.labels.tolist() == [3, 5]
    assert masked.score_from.tolist() == [plain.score_from[0].item(), plain.score_from[2].item()]


def test_a_model_that_was_not_prepared_is_refused_with_what_to_call() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM does not score forests yet; call .*prepare_model\(model\)"):
        forest_token_logps(tiny_llama(), build_forest(TREES))


def test_share_prompt_is_one_of_three_words() -> None:
    with pytest.raises(ConfigError, match="share_prompt='yes'; expected one of auto, on, off"):
        prepare_model(tiny_llama(), share_prompt="yes")
    assert prepare_model(tiny_llama(), share_prompt="off").name == "packed"
