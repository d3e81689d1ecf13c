"""Is a forest's every log-prob and gradient that of its sequences one by one, on every kind of attention?"""

from __future__ import annotations

import pytest
import torch

from dpo_engine.batch import build_forest
from dpo_engine.model.forest_attention import restore_attention, use_forest_attention
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from support.architectures import MASKED, SHARING, tiny_model
from support.forests import (
    assert_gradients_agree,
    assert_logps_agree,
    gradients,
    one_by_one,
    random_ids,
    random_trees,
)


@pytest.mark.parametrize(
    "layout,checkpointing",
    [
        ("shared", False),
        ("shared", True),
        ("packed", False),
        pytest.param("packed", True, marks=pytest.mark.slow),  # what checkpointing computes again is the same attention
    ],
    ids=lambda value: {False: "plain", True: "checkpointing"}.get(value, value),
)
@pytest.mark.parametrize("name", [*SHARING, *MASKED])
def test_a_forest_gives_what_its_sequences_give(name: str, layout: str, checkpointing: bool) -> None:
    model = tiny_model(name).train()
    data = random_trees()
    want = one_by_one(model, data)
    wanted = gradients(model, want)
    bind_scoring(model)
    assert use_forest_attention(model, "mask" if name in MASKED else "trees")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got = forest_token_logps(model, build_forest(data, layout))
    assert_logps_agree(got, want)
    assert_gradients_agree(gradients(model, got), wanted)


@pytest.mark.parametrize("name", SHARING)
def test_order_and_packing_do_not_matter(name: str) -> None:
    model = tiny_model(name).eval()
    bind_scoring(model)
    use_forest_attention(model)
    data = random_trees()
    with torch.no_grad():
        together = forest_token_logps(model, build_forest(data))
        alone = torch.cat([forest_token_logps(model, build_forest([tree])) for tree in data])
        reverse = forest_token_logps(model, build_forest(data[::-1]))
    assert (together - alone).abs().max() <= 1e-5
    lengths = [sum(map(len, tree.completions)) for tree in data[::-1]]
    assert (torch.cat(reverse.split(lengths)[::-1]) - together).abs().max() <= 1e-5


def test_without_a_forest_the_model_attends_as_it_did() -> None:
    model = tiny_model("gemma3").eval()
    ids = torch.tensor([random_ids(20, 0), random_ids(20, 1)])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        generated = model.generate(ids[:1, :8], max_new_tokens=6, do_sample=False)
        bind_scoring(model)
        use_forest_attention(model)
        assert torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(model.generate(ids[:1, :8], max_new_tokens=6, do_sample=False), generated)
        restore_attention(model)
        assert torch.equal(model(input_ids=ids).logits, before)
