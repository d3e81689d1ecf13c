"""Does one kernel for a whole forest show every token what it may see, and is it compiled once?

On a CPU it has no backward pass, so values are compared here; a card is asked by the probe at start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from dpo_engine.batch import ForestShape, build_forest
from dpo_engine.model import forest_attention
from dpo_engine.model.flex_attention import BLOCK, forest_blocks, padded_forest
from dpo_engine.model.forest_attention import forest_form, use_forest_attention
from dpo_engine.model.layout import choose_layout
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from support.architectures import tiny_model
from support.forests import assert_logps_agree, one_by_one, random_trees

LARGE = ((60, (70, 9)), (130, (1, 40, 30)), (1, (20,)), (33, (90, 8)))


def causal(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def window(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 7)


def chunks(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key // 24 == query // 24)


def nothing(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest_attention, "why_not_flex", lambda model: None)


def dense(shape: ForestShape, mask_function: Callable[..., Tensor]) -> Tensor:
    """(L, L) who sees whom, token by token as `ForestShape` says it."""
    positions, branches = shape.position_ids[0], shape.branches
    seen = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    for first, last in shape.spans:
        p, b = positions[first:last], branches[first:last]
        seen[first:last, first:last] = ((b[None] < 0) | (b[None] == b[:, None])) & mask_function(
            0, 0, p[:, None], p[None]
        )
    return seen


def made(sizes: Any) -> tuple[Tensor, ForestShape]:
    forest = build_forest(random_trees(sizes))
    assert forest.shape is not None
    return padded_forest(forest.input_ids[0], forest.shape)


@pytest.mark.parametrize("rule", [causal, window, chunks, nothing])
def test_the_block_mask_shows_what_the_forest_shows(rule: Callable[..., Tensor], uncompiled: None) -> None:
    row, shape = made(LARGE)
    assert row.shape[1] % BLOCK == 0 and shape.spans[-1][1] == row.shape[1]
    blocks = forest_blocks(shape, mask_function=rule)
    want = dense(shape, rule)
    length = row.shape[1]
    assert torch.equal(create_mask(blocks.mask_mod, None, None, length, length, "cpu")[0, 0], want)
    tiles = want.view(length // BLOCK, BLOCK, length // BLOCK, BLOCK).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), tiles)
    assert not tiles.all(), "nothing is computed between trees"


def test_padding_ends_on_a_block_and_leaves_the_forest_as_it_is() -> None:
    forest = build_forest(random_trees())
    assert forest.shape is not None
    row, shape = padded_forest(forest.input_ids[0], forest.shape)
    length = forest.input_ids[0].shape[1]
    assert row.shape[1] == 2 * BLOCK
    assert torch.equal(row[:, :length], forest.input_ids[0])
    assert shape.spans == (*forest.shape.spans, (length, 2 * BLOCK))
    assert padded_forest(row, shape) == (row, shape)


def test_a_limit_that_is_no_window_is_refused(uncompiled: None) -> None:
    _, shape = made(LARGE)
    for rule in (lambda b, h, q, k: (q >= 0) & (k >= 0), lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0)):
        with pytest.raises(ValueError, match="shows a token other positions"):
            forest_blocks(shape, mask_function=rule)


EXPRESSED = ("llama", "gemma2", "gemma3", "mistral with a window", "llama4 with chunks", "gpt2", "qwen2_moe")


@pytest.mark.parametrize("name", EXPRESSED)
def test_a_forest_in_one_kernel_gives_what_its_sequences_give(name: str, uncompiled: None, on_a_cpu: None) -> None:
    model = tiny_model(name).eval()
    data = random_trees()
    with torch.no_grad():
        want = one_by_one(model, data)
        bind_scoring(model)
        assert use_forest_attention(model, "blocks") and forest_form(model) == "blocks"
        assert_logps_agree(forest_token_logps(model, build_forest(data)), want)
        assert_logps_agree(one_by_one(model, data), want)


def test_sinks_are_refused(uncompiled: None, on_a_cpu: None) -> None:
    model = tiny_model("gpt_oss").eval()
    bind_scoring(model)
    use_forest_attention(model, "blocks")
    with torch.no_grad(), pytest.raises(ValueError, match="FlexAttention has no s_aux"):
        forest_token_logps(model, build_forest(random_trees()))


def test_a_cpu_attends_by_trees() -> None:
    model = tiny_model("llama")
    bind_scoring(model)
    assert not use_forest_attention(model, "blocks")
    assert choose_layout(model).line == "layout: shared" and forest_form(model) == "trees"


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_kernel_that_fails_forward_or_backward_gives_way_to_trees(
    name: str, uncompiled: None, on_a_cpu: None
) -> None:
    """On a CPU it has no backward pass: what the probe must find before training does."""
    model = tiny_model(name)
    bind_scoring(model)
    layout = choose_layout(model)
    assert layout.name == "shared" and forest_form(model) == "trees"
    assert layout.line.startswith(f"layout: shared (not in one kernel: {type(model).__name__} cannot run it (")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.slow  # the compiler takes most of a minute
@pytest.mark.parametrize("name", ["mistral with a window", "gemma2"])
def test_the_kernel_is_compiled_once_whatever_the_lengths(name: str, on_a_cpu: None) -> None:
    from torch._dynamo.utils import counters

    model = tiny_model(name).eval()
    bind_scoring(model)
    use_forest_attention(model, "blocks")
    graphs = []
    with torch.no_grad():
        for sizes in (LARGE[:2], LARGE, LARGE[1:], [(300, (50, 60)), *LARGE]):
            data = random_trees(sizes)
            got = forest_token_logps(model, build_forest(data))
            assert_logps_agree(got, one_by_one(model, data))
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == graphs[1:2] * 3, graphs
