"""Is a plan right? Held against a trace of the real step's storages, and against what a real step takes on this CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_engine.memory.shapes import ModelShape, read_shape, shipped_config, shipped_names
from dpo_engine.memory.step import StepSettings, step_parts
from support.memory_trace import trace_step

LARGE = [name for name in shipped_names() if name != "smollm2-135m"]
MOST_OFF = 0.05


def text_model(name: str, layers: int | None) -> tuple[Any, ModelShape]:
    """A transformers config and its shape; without an image tower, which no pair goes through."""
    given = shipped_config(name)
    text = dict(given.get("text_config", given))
    if layers is not None:
        text["num_hidden_layers"] = layers
    text["tie_word_embeddings"] = given["tie_word_embeddings"]
    shape = read_shape(text, name)
    return AutoConfig.for_model(text.pop("model_type"), **text), shape


def held(name: str, tokens: int, settings: StepSettings, layers: int | None = None, **how: Any) -> tuple[int, int]:
    """`(traced, planned)` bytes of a step."""
    pytest.importorskip("bitsandbytes")
    config, shape = text_model(name, layers)
    targets = "all-linear" if settings.lora_targets is None else list(settings.lora_targets)
    lora = {"r": settings.lora_r, "target_modules": targets, "lora_dropout": settings.lora_dropout}
    traced = trace_step(
        config,
        tokens=tokens,
        in_4bit=settings.weights == "nf4",
        dtype=getattr(torch, settings.compute),
        autocast=settings.compute != "float32",
        lora=lora if settings.lora_r else None,
        checkpointing=settings.checkpointing,
        **how,
    )
    parts = step_parts(shape, settings, tokens)
    assert parts.weights + parts.adapters == pytest.approx(traced.static, rel=0.002)
    return traced.peak, parts.allocated


QLORA = StepSettings(optimiser="adamw_torch")


@pytest.mark.parametrize("name", LARGE)
def test_qlora_of_a_large_model_is_planned_within_a_twentieth_of_its_trace(name: str) -> None:
    traced, planned = held(name, 3072, QLORA, layers=2)
    assert planned == pytest.approx(traced, rel=MOST_OFF)


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (dataclasses.replace(QLORA, weights="bfloat16"), 4096),
        (dataclasses.replace(QLORA, checkpointing=False), 1024),
        (dataclasses.replace(QLORA, weights="bfloat16", checkpointing=False), 1024),
        (dataclasses.replace(QLORA, lora_targets=("q_proj", "v_proj")), 2048),
        (dataclasses.replace(QLORA, lora_r=64), 512),
        (dataclasses.replace(QLORA, lora_targets=("o_proj",)), 4096),
        (dataclasses.replace(QLORA, lora_dropout=0.05), 4096),
        (StepSettings(weights="bfloat16", lora_r=0, optimiser="adamw_torch", device="cpu"), 1024),
    ],
)
def test_other_settings_are_planned_as_well(settings: StepSettings, tokens: int) -> None:
    traced, planned = held("llama-3.1-8b", tokens, settings, layers=2)
    assert planned == pytest.approx(traced, rel=MOST_OFF)


def test_full_fine_tuning_with_a_tied_head_is_fullest_where_both_gradients_of_its_rows_meet() -> None:
    settings = StepSettings(weights="bfloat16", lora_r=0, optimiser="adamw_torch_fused")
    traced, planned = held("phi-4-mini", 1024, settings, layers=2)
    assert planned == pytest.approx(traced, rel=MOST_OFF)


def test_where_the_mlp_is_narrow_a_norm_is_the_widest_place() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 32000, "pad_token_id": 0}
    config = AutoConfig.for_model("llama", **sizes)
    traced = trace_step(
        config, tokens=8192, in_4bit=True, lora={"r": 16, "target_modules": "all-linear"}, checkpointing=True
    )
    planned = step_parts(read_shape(config.to_dict(), "narrow"), QLORA, 8192).allocated
    assert planned == pytest.approx(traced.peak, rel=MOST_OFF)


@pytest.mark.parametrize("model_type", ["gemma", "granite", "smollm3"])
def test_families_of_which_no_model_comes_along_are_planned_as_well(model_type: str) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **sizes)
    shape = read_shape(config.to_dict(), model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    lora = {"r": 16, "target_modules": "all-linear"}
    traced = trace_step(config, tokens=3072, in_4bit=True, lora=lora, checkpointing=True)
    assert step_parts(shape, QLORA, 3072).allocated == pytest.approx(traced.peak, rel=MOST_OFF)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, 8192])
@pytest.mark.parametrize("name", LARGE)
def test_whole_models_in_four_bits_are_planned_within_a_twentieth_of_their_traces(name: str, tokens: int) -> None:
    traced, planned = held(name, tokens, QLORA)
    assert planned == pytest.approx(traced, rel=MOST_OFF)


def test_the_trace_counts_what_autograd_itself_keeps() -> None:
    """The oracle's own oracle: on real tensors, what is kept for backward, by autograd's own hooks."""
    from dpo_engine.batch import build_forest
    from dpo_engine.model.forest_attention import use_forest_attention
    from dpo_engine.model.scoring import bind_scoring, forest_token_logps
    from support.memory_trace import LiveBytes
    from support.tiny_models import tiny_model

    model = tiny_model("Llama")
    bind_scoring(model)
    assert use_forest_attention(model, "trees")
    forest = build_forest([([1, 2, 3], [[4, 5, 6], [7, 8]])], "shared")
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = forest_token_logps(model, forest)
    with LiveBytes() as live:
        for parameter in model.parameters():
            live.adopt(parameter, "weights")
        static = live.live
        again = forest_token_logps(model, forest)
    assert torch.equal(logps, again)
    assert live.live - static == pytest.approx(sum(kept.values()), rel=0.01)


SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "vocab_size": 16000}
SMALL_TOKENS = 2100


@pytest.fixture(scope="module")
def taken() -> dict[bool, int]:
    """Bytes that a step of a small model takes on this CPU, with checkpointing and without."""
    given = {"config": SMALL, "tokens": SMALL_TOKENS, "lora_r": 16, "sharing": True}
    steps = [given | {"checkpointing": checkpointing} for checkpointing in (True, False)]
    script = Path(__file__).parents[1] / "support" / "peak_of_a_step.py"
    # Freed memory goes back at once: by default the C library keeps blocks of up to 32 MiB, and a peak counts what it keeps.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, script, json.dumps(steps)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip((True, False), map(int, done.stdout.split()), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_small_model_on_this_cpu_takes_what_is_planned(checkpointing: bool, taken: dict[bool, int]) -> None:
    shape = read_shape({**SMALL, "model_type": "llama"}, "small")
    settings = StepSettings(weights="float32", compute="float32", checkpointing=checkpointing, device="cpu")
    parts = step_parts(shape, settings, SMALL_TOKENS)
    planned = parts.activations + parts.attention + parts.head + parts.opened
    assert planned == pytest.approx(taken[checkpointing], rel=0.08)
