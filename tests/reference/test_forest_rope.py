"""Where a rope depends on the longest position of its row, is every sequence still computed as if it were by itself?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_engine.batch import ForestCollator
from dpo_engine.data import TokenizedTree
from dpo_engine.model.layout import choose_layout
from dpo_engine.model.rope import forget_longer_rows, longest_free_row
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from support.architectures import config_of, tiny_from
from support.forests import (
    assert_gradients_agree,
    assert_logps_agree,
    gradients,
    in_forests,
    random_trees,
)

THRESHOLD = 32
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": THRESHOLD,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip

ROPES: dict[str, Callable[[], Any]] = {
    "dynamic": lambda: config_of("llama", max_position_embeddings=THRESHOLD, rope_parameters=dict(_DYNAMIC)),
    "longrope": lambda: config_of(
        "phi3", max_position_embeddings=256, original_max_position_embeddings=THRESHOLD, rope_parameters=dict(_LONG)
    ),
    "dynamic in some layers": lambda: config_of(
        "gemma3_text", head_dim=8, sliding_window=7, query_pre_attn_scalar=8, max_position_embeddings=THRESHOLD,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": dict(_DYNAMIC),
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}  # fmt: skip

# Prompt and completions. Rows are THRESHOLD long, shorter and longer, and one tree has completions on both sides.
SIZES = ((9, (6, 11)), (30, (15, 2)), (30, (3,)), (20, (13, 3)), (1, (8, 2)), (35, (4, 25)), (14, (1, 18)), (36, (5,)))


def by_itself(model: torch.nn.Module, tree: TokenizedTree) -> Tensor:
    """Log-probs by the model's own forward, which a row of one token makes forget what it saw before."""
    found = []
    for completion in tree.completions:
        with torch.no_grad():
            model(input_ids=torch.tensor([[5]]), use_cache=False)
        row = torch.tensor([[*tree.prompt_ids, *completion]])
        logps = model(input_ids=row, use_cache=False).logits[0, len(tree.prompt_ids) - 1 : -1].float().log_softmax(-1)
        found.append(logps.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
    return torch.cat(found)


@pytest.mark.parametrize("order", [1, -1], ids=["short first", "long first"])
@pytest.mark.parametrize("name", ROPES)
def test_trees_on_both_sides_of_the_threshold_give_what_they_give_alone(name: str, order: int) -> None:
    model = tiny_from(ROPES[name]()).train()
    data = random_trees(SIZES)[::order]
    want = torch.cat([by_itself(model, tree) for tree in data])
    wanted = gradients(model, want)
    bind_scoring(model)
    layout = choose_layout(model)
    assert layout.name == "shared" and layout.longest == THRESHOLD
    assert f"sequences of more than {THRESHOLD} tokens alone" in layout.line
    got = in_forests(model, data, ForestCollator(120, layout.name, layout.longest))
    assert_logps_agree(got, want)
    assert_gradients_agree(gradients(model, got), wanted)


@pytest.mark.parametrize("name", ROPES)
def test_without_the_threshold_a_long_neighbour_shows(name: str) -> None:
    """What the other tests would miss if these trees were too alike to tell."""
    model = tiny_from(ROPES[name]()).eval()
    data = random_trees(SIZES)
    bind_scoring(model)
    choose_layout(model)
    with torch.no_grad():
        want = torch.cat([by_itself(model, tree) for tree in data])
        got = in_forests(model, data, ForestCollator(400, "shared"))
    assert (got - want).abs().max() > 1e-3


@pytest.mark.parametrize("name", ROPES)
def test_no_row_remembers_the_rows_before_it(name: str) -> None:
    """Long, shorter but still long, of the threshold's very length, short: in any order."""
    model = tiny_from(ROPES[name]()).eval()
    bind_scoring(model)
    layout = choose_layout(model)
    data = random_trees([(40, (20,)), (40, (3,)), (30, (3,)), (9, (6, 11))])
    collate = ForestCollator(400, layout.name, layout.longest)
    with torch.no_grad():
        want = [by_itself(model, tree) for tree in data]
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 0, 3, 2)):
            for index in order:
                (forest,) = collate([data[index]]).forests
                assert_logps_agree(forest_token_logps(model, forest), want[index])


@pytest.mark.parametrize("name", ROPES)
def test_the_threshold_is_found_also_after_a_long_row(name: str) -> None:
    model = tiny_from(ROPES[name]()).eval()
    assert longest_free_row(model) == THRESHOLD
    with torch.no_grad():
        model(input_ids=torch.full((1, 3 * THRESHOLD), 5), use_cache=False)
        assert longest_free_row(model) == THRESHOLD
        short = torch.full((1, THRESHOLD), 5)
        forget_longer_rows(model)
        after = model(input_ids=short, use_cache=False).logits
        fresh = tiny_from(ROPES[name]()).eval()(input_ids=short, use_cache=False).logits
    assert torch.equal(after, fresh)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8},
        {
            "rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_other_ropes_look_at_positions_alone(rope: dict[str, Any]) -> None:
    model = tiny_from(config_of("llama", rope_parameters=rope))
    bind_scoring(model)
    layout = choose_layout(model)
    assert layout.longest is None and layout.line == "layout: shared"
