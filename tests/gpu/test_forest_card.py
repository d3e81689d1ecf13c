"""Is a forest in one kernel on a card what its sequences are, in value and gradient, and is that kernel compiled once?

Where there is no card the same is asked of the form that a CPU has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")  # the operator's tests do without

from dpo_engine.batch import ForestCollator
from dpo_engine.model.forest_attention import forest_form
from dpo_engine.model.layout import choose_layout
from dpo_engine.model.scoring import bind_scoring
from support.architectures import config_of, tiny_from
from support.devices import DEVICE, ON_CUDA
from support.forests import gradients, in_forests, one_by_one, random_trees

pytestmark = pytest.mark.gpu

FORM = "blocks" if ON_CUDA else "trees"
SIZES = ((60, (70, 9)), (130, (1, 40, 30)), (1, (20,)), (33, (90, 8)))
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "mistral": {"head_dim": 32, "sliding_window": 16},
    "gemma2": {
        "head_dim": 256, "sliding_window": 16, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 0.5,
    },
    "qwen3": {"head_dim": 128},
}  # fmt: skip


def shared(name: str, dtype: torch.dtype) -> Any:
    model = tiny_from(config_of(name, **WIDE, **MODELS[name])).to(DEVICE, dtype).train()
    bind_scoring(model)
    layout = choose_layout(model)
    assert layout.name == "shared" and forest_form(model) == FORM, layout.line
    return model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_forests_give_what_their_sequences_give(name: str, checkpointing: bool) -> None:
    model = shared(name, torch.float32)
    data = random_trees(SIZES)
    want = one_by_one(model, data)
    wanted = gradients(model, want)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got = in_forests(model, data, ForestCollator(300))
    assert (got - want).abs().max() <= 1e-3  # a card may multiply float32 with the significand of float16
    found = gradients(model, got)
    difference = torch.stack([(found[key] - wanted[key]).norm() for key in wanted]).norm()
    assert difference <= 1e-2 * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_forests_are_as_near_to_float32_as_their_sequences(name: str) -> None:
    data = random_trees(SIZES)
    with torch.no_grad():
        exact = one_by_one(shared(name, torch.float32), data)
        model = shared(name, torch.bfloat16)
        want = one_by_one(model, data)
    got = in_forests(model, data, ForestCollator(300))
    assert (got - exact).square().mean().sqrt() <= 1.5 * (want - exact).square().mean().sqrt()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model, got).values())


def test_training_on_other_lengths_compiles_nothing_again() -> None:
    from torch._dynamo.utils import counters

    model = shared("mistral", torch.float32)
    graphs = []
    for sizes in (SIZES[:2], SIZES, SIZES[1:], ((300, (50, 60)), *SIZES)):
        gradients(model, in_forests(model, random_trees(sizes), ForestCollator(2000)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1, graphs
