"""Does a log-prob depend on nothing but its own prompt and completion, whatever trees come in which order and layout?"""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_engine.batch import (
    LAYOUTS,
    ForestCollator,
    Tree,
    build_forest,
    pack_trees,
    packed_cost,
    sum_by_completion,
    tree_cost,
)
from dpo_engine.model.forest_attention import use_forest_attention
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from support.architectures import VOCABULARY, tiny_model

ids = st.integers(min_value=0, max_value=VOCABULARY - 1)


@st.composite
def completions(draw: Any) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are scored: at least one."""
    tokens = draw(st.lists(ids, min_size=1, max_size=12))
    scored = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    scored[draw(st.integers(min_value=0, max_value=len(tokens) - 1))] = True
    return tokens, scored


@st.composite
def random_trees(draw: Any) -> list[Tree]:
    """Any number of completions to a prompt; the reference's log-probs number the scored tokens through all trees."""
    trees, first = [], 0
    for _ in range(draw(st.integers(min_value=1, max_value=5))):
        prompt = draw(st.lists(ids, min_size=1, max_size=15))
        answers = draw(st.lists(completions(), min_size=1, max_size=4))
        numbers = []
        for _tokens, scored in answers:
            numbers.append(torch.arange(first, first + sum(scored), dtype=torch.float32))
            first += sum(scored)
        trees.append(
            Tree(
                prompt_ids=prompt,
                completions=[tokens for tokens, _ in answers],
                reference_token_logps=numbers,
                scored=[scored for _, scored in answers],
            )
        )
    return trees


@functools.cache
def model() -> torch.nn.Module:
    """With a window of seven tokens, in every layer."""
    made = tiny_model("mistral with a window").eval()
    bind_scoring(made)
    use_forest_attention(made)
    return made


def scored_count(trees: list[Tree]) -> int:
    return sum(sum(mask) for tree in trees for mask in tree.scored or ())


def by_number(trees: list[Tree], collate: ForestCollator) -> Tensor:
    """(N,) log-probs of all scored tokens, by the number that each carries as its reference log-prob."""
    found = torch.full((scored_count(trees),), torch.nan)
    with torch.no_grad():
        for forest in collate(trees).forests:
            assert forest.reference_token_logps is not None
            found[forest.reference_token_logps.long()] = forest_token_logps(model(), forest)
    return found


def one_by_one(trees: list[Tree]) -> Tensor:
    """The same by the model's own logits, a sequence a call."""
    found = []
    with torch.no_grad():
        for tree in trees:
            for completion, mask in zip(tree.completions, tree.scored or (), strict=True):
                row = torch.tensor([[*tree.prompt_ids, *completion]])
                logps = model()(input_ids=row, use_cache=False).logits[0, len(tree.prompt_ids) - 1 : -1].log_softmax(-1)
                found.append(logps.gather(1, torch.tensor(completion)[:, None]).squeeze(1)[torch.tensor(mask)])
    return torch.cat(found)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_log_prob_is_the_same_in_any_layout_packing_order_and_budget(data: st.DataObject) -> None:
    trees = data.draw(random_trees())
    want = one_by_one(trees)
    for layout in LAYOUTS:
        longest = data.draw(st.none() | st.integers(min_value=1, max_value=25), label=f"longest of {layout}")
        costs = [packed_cost(tree, layout, longest) for tree in trees]
        budget = data.draw(st.integers(min_value=max(costs), max_value=sum(costs)), label=f"budget of {layout}")
        order = data.draw(st.permutations(trees), label=f"order of {layout}")
        found = by_number(order, ForestCollator(budget, layout, longest))
        assert bool(((found - want).abs() <= 1e-5 * want.abs().clamp(min=1)).all())


@settings(max_examples=60, deadline=None)
@given(trees=random_trees(), layout=st.sampled_from(LAYOUTS), data=st.data())
def test_packing_keeps_every_tree_once_and_the_budget(trees: list[Tree], layout: str, data: st.DataObject) -> None:
    costs = [tree_cost(tree, layout) for tree in trees]
    budget = data.draw(st.integers(min_value=max(costs), max_value=sum(costs)))
    packed = pack_trees(trees, budget, layout)
    assert sorted(id(tree) for members in packed for tree in members) == sorted(map(id, trees))
    assert all(sum(tree_cost(tree, layout) for tree in members) <= budget for members in packed)
    used = [sum(tree_cost(tree, layout) for tree in members) for members in packed]
    assert sum(cost > budget / 2 for cost in costs) <= len(packed)
    assert len([cost for cost in used if 2 * cost <= budget]) <= 1, "two half-empty forests would fit into one"


@settings(max_examples=60, deadline=None)
@given(trees=random_trees(), layout=st.sampled_from(LAYOUTS))
def test_the_indices_name_each_scored_token_once(trees: list[Tree], layout: str) -> None:
    forest = build_forest(trees, layout)
    masks = [mask for tree in trees for mask in tree.scored or ()]
    tokens = [completion for tree in trees for completion in tree.completions]
    assert forest.lengths == tuple(map(sum, masks))
    assert forest.labels.tolist() == [
        t for c, m in zip(tokens, masks, strict=True) for t, s in zip(c, m, strict=True) if s
    ]
    assert forest.completion_ids.tolist() == [i for i, mask in enumerate(masks) for _ in range(sum(mask))]
    assert forest.tree_ids.tolist() == [i for i, tree in enumerate(trees) for _ in tree.completions]
    assert forest.trees == len(trees)
    assert forest.tokens == sum(tree_cost(tree, layout) for tree in trees)
    # The same sums by another way than slices.
    values = torch.arange(1, len(forest.labels) + 1, dtype=torch.float64)
    sums = torch.zeros(len(masks), dtype=torch.float64).index_add_(0, forest.completion_ids, values)
    assert torch.equal(sum_by_completion(values, forest.lengths), sums)
    # No hidden row predicts twice, but the last of a prompt, which predicts the first token of each of its completions.
    rows, first = forest.score_from.tolist(), [i for mask in masks for i, scored in enumerate(mask) if scored]
    inner = [row for row, position in zip(rows, first, strict=True) if position]
    assert len(set(inner)) == len(inner)
    cells = sum(sheet.numel() for sheet in forest.input_ids)
    assert all(0 <= row < cells for row in rows)
    if layout in ("shared", "packed"):
        assert cells == forest.tokens, "no padding"
        assert forest.shape is not None
        assert forest.shape.spans[0][0] == 0 and forest.shape.spans[-1][1] == cells
