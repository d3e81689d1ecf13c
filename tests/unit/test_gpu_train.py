"""Does the card's training benchmark keep to its time, count its arithmetic and compare like with like? On a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.benchmark_scripts import load

gpu_train = load("gpu.train")
gpu_rows = load("gpu.rows")
gpu_tables = load("gpu.tables")
gpu_pairs = load("gpu.pairs")
gpu_model = load("gpu.model")
train_flops = load("steps.flops")
gpu = load("gpu.run")

HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="trl or datasets is not installed")
TINY = ["--tiny", "--device", "cpu", "--lengths", "hh", "--step", "4", "--steps", "2", "--limit_s", "60"]


class Clock:
    """Time passes only when a row is run."""

    def __init__(self, takes: float) -> None:
        self.now, self.takes = 0.0, takes
        self.given: dict[tuple[str, str], float] = {}

    def __call__(self) -> float:
        return self.now

    def run(self, group: str, row: str, until: float) -> dict[str, Any]:
        self.given[group, row] = until - self.now
        self.now += min(self.takes, until - self.now)
        return {"status": "measured" if self.takes <= self.given[group, row] else "not measured: late"}


def measured(
    clock: Clock, groups: list[str], rows: list[str], until: float, limit_s: float = 45.0
) -> list[dict[str, Any]]:
    return list(gpu_train.measure(groups, rows, clock.run, limit_s=limit_s, until=until, clock=clock))


# ---- time ----


def test_all_rows_end_within_the_budget_even_if_every_one_takes_too_long() -> None:
    clock = Clock(1e9)
    found = measured(clock, list(gpu_pairs.LENGTHS), list(gpu_rows.ROWS), until=140.0)
    assert clock.now <= 140.0
    assert len(found) == len(gpu_pairs.LENGTHS) * len(gpu_rows.ROWS)
    assert all(record["status"].startswith("not measured") for record in found)


def test_a_slow_group_does_not_eat_the_time_of_those_after_it() -> None:
    clock = Clock(1e9)
    measured(clock, ["hh", "tldr"], ["engine", "trl_default"], until=100.0, limit_s=40.0)
    assert clock.given == {
        ("hh", "engine"): 40.0,
        ("hh", "trl_default"): 10.0,
        ("tldr", "engine"): 40.0,
        ("tldr", "trl_default"): 10.0,
    }


def test_what_finds_no_time_is_not_run() -> None:
    clock = Clock(4.0)
    found = measured(clock, ["hh"], ["engine", "trl_default"], until=8.0)
    assert [r["status"] for r in found] == ["measured", "not measured: the time that was given is used up"]
    assert list(clock.given) == [("hh", "engine")]


def test_make_gpu_hands_its_time_on(tmp_path: Path) -> None:
    job = gpu.Job(device="cuda", shapes=(), folder=tmp_path, rest=("--lengths", "hh"))
    steps = gpu.PARTS["train"](job)
    assert [step.name for step in steps] == ["bf16", "nf4", "liger"]
    command = steps[1].command(100.0)
    assert command[command.index("--budget_s") + 1] == "85" and "--tiny" not in command
    assert command[command.index("--weights") + 1] == "nf4" and command[command.index("--lengths") + 1] == "hh"
    # What Liger replaces stays replaced: its row comes last, in a process of its own, and in no other.
    liger = gpu_train.parser().parse_args(steps[2].command(100.0)[3:])
    assert liger.rows == ["engine", "engine_liger"] and "engine_liger" not in gpu_rows.USUAL


# ---- pairs, arithmetic, model ----


@pytest.mark.parametrize("name", gpu_pairs.LENGTHS)
def test_pairs_have_the_medians_that_are_written_down_and_are_no_longer_than_allowed(name: str) -> None:
    lengths = gpu_pairs.LENGTHS[name]
    pairs = gpu_pairs.draw_pairs(lengths, 400, vocabulary=50, max_length=1024)
    for key, median in (("prompt_ids", lengths.prompt_median), ("chosen_ids", lengths.completion_median)):
        middle = sorted(len(pair[key]) for pair in pairs)[200]
        assert middle == pytest.approx(median, rel=0.2)
    assert all(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) <= 1024 for p in pairs)
    assert {i for p in pairs[:50] for i in p["rejected_ids"]} <= set(range(2, 50))
    assert pairs[:5] == gpu_pairs.draw_pairs(lengths, 5, vocabulary=50, max_length=1024)


def test_flops_are_those_that_torch_counts() -> None:
    """By torch's own counter, over one sequence a completion and a causal square that is counted whole."""
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    config = gpu_model.llama_config(tiny=True)
    model = get_peft_model(gpu_model.make_model(config, "bf16", "cpu", torch.float32), gpu_rows.lora())
    pair = {"prompt_ids": [3] * 21, "chosen_ids": [4] * 12, "rejected_ids": [5] * 12}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = train_flops.model_flops(config, [pair], trainable=trainable, shared=False)
    width, layers = 21 + 12 - 1, config.num_hidden_layers
    model.get_base_model().set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            embedded = torch.randn(1, width, config.hidden_size, requires_grad=True)
            hidden = model.get_base_model().model(inputs_embeds=embedded).last_hidden_state
            torch.nn.functional.linear(hidden[:, 20:], model.get_base_model().lm_head.weight).sum().backward()
    visible = 2 * width * (width + 1) // 2
    whole = 2 * width**2
    expected = counter.get_total_flops() - (whole - visible) * 12 * layers * config.hidden_size
    assert counted == pytest.approx(expected, rel=0.02)


def test_a_shared_prompt_needs_less() -> None:
    config = gpu_model.llama_config(tiny=False)
    pair = {"prompt_ids": [3] * 300, "chosen_ids": [4] * 50, "rejected_ids": [5] * 50}
    separate, shared = (train_flops.model_flops(config, [pair], trainable=0, shared=s) for s in (False, True))
    assert shared / separate == pytest.approx(398 / 698, abs=0.02)
    # 8 billion parameters, of which the embedding multiplies nothing: 4 FLOPs a token and weight of the decoder.
    assert separate / 698 == pytest.approx(4 * 6.98e9, rel=0.05)


def test_the_model_of_a_card_has_llamas_shape() -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(gpu_model.llama_config(tiny=False))
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_a_product_is_timed_as_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(0.5 * number for number in range(100))
    monkeypatch.setattr(train_flops, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert train_flops.gemm_tflops("cpu", torch.float32, 10) == pytest.approx(2 * 10**3 / 0.5 * 1e-12)


# ---- rows ----


def run_main(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    path = tmp_path / "records.jsonl"
    assert gpu_train.main([*TINY, "--records", str(path), *arguments]) == 0
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_engines_rows_run_one_after_the_other_on_one_model(tmp_path: Path, capsys: Any) -> None:
    found = run_main(tmp_path, "--rows", "engine", "engine_default")
    assert [r["status"] for r in found] == ["measured"] * 2
    assert all(r["first_loss"] == pytest.approx(math.log(2), abs=1e-5) for r in found)
    assert len({round(r["first_chosen"], 4) for r in found}) == 1
    assert found[0]["reference_s"] > 0 == found[1]["reference_s"]
    text = capsys.readouterr().out
    assert "bf16, lengths of hh: 8 pairs in steps of 4" in text and "target" not in text


@needs_trl
def test_the_engine_and_trl_start_alike_on_the_same_pairs(tmp_path: Path, capsys: Any) -> None:
    found = run_main(tmp_path, "--rows", "trl_default", "engine", "trl_precomputed", "trl_stored")
    assert [r["status"] for r in found] == ["measured"] * 4
    text = capsys.readouterr().out
    assert "do not agree" not in text
    assert all(word in text for word in ("target 2 x TRL's best:", "target 3 x TRL's default:", "target lower peak"))
    assert [r["first_grad_norm"] for r in found] == pytest.approx([found[0]["first_grad_norm"]] * 4, rel=1e-3)
    assert found[1]["step_tokens"][1] < found[0]["step_tokens"][1] == found[2]["step_tokens"][1]


def test_quantised_weights_train_too(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    rows = ["engine", *(["trl_default"] if HAS_TRL else [])]
    found = run_main(tmp_path, "--weights", "nf4", "--rows", *rows)
    assert [r["status"] for r in found] == ["measured"] * len(rows), found


def test_all_linear_layers_but_the_head_are_quantised() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = gpu_model.llama_config(tiny=True)
    plain, quantised = (gpu_model.make_model(config, name, "cpu", torch.float32) for name in gpu_model.WEIGHTS)
    layers = [m for m in quantised.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 7 * config.num_hidden_layers and type(quantised.lm_head) is torch.nn.Linear
    assert all(layer.weight.quant_state.nested and layer.weight.dtype == torch.uint8 for layer in layers)
    hidden = torch.randn(1, 3, config.hidden_size)
    name = "model.layers.1.mlp.up_proj"
    mine, its = (model.get_submodule(name)(hidden) for model in (quantised, plain))
    assert 0.01 < float((mine - its).norm() / its.norm()) < 0.2  # the same weights, rounded


def test_without_bitsandbytes_quantised_rows_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_train, "missing_packages", lambda *names: f"n/a: {names[0]} not installed")
    [found] = run_main(tmp_path, "--weights", "nf4")
    assert found["status"] == "n/a: bitsandbytes not installed" and found["lengths"] == "hh"


def test_a_trainer_leaves_nothing_on_the_model_even_if_it_fails(tmp_path: Path) -> None:
    model = gpu_model.make_model(gpu_model.llama_config(tiny=True), "bf16", "cpu", torch.float32)
    before = ({n for n, _ in model.named_modules()}, set(model.__dict__), model.config._attn_implementation)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    settings = gpu_rows.Settings(
        weights="bf16", device="cpu", dtype=torch.float32, step=4, steps=2, max_length=64, forest_tokens=None, limit_s=60
    )  # fmt: skip
    pairs = gpu_pairs.draw_pairs(gpu_pairs.LENGTHS["hh"], 8, vocabulary=512, max_length=64, scale=0.1)
    late = gpu_rows.run_row("engine", model, pairs, settings, until=0.0)
    assert late["status"] == "not measured: 1 of 2 steps were done when the time was used up"
    assert ({n for n, _ in model.named_modules()}, set(model.__dict__), model.config._attn_implementation) == before
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
    broken = gpu_rows.run_row("engine", model, [], settings, until=math.inf)
    assert broken["status"].startswith("failed: ")


# ---- tables ----


def record(row: str, pairs_per_s: float, **changes: Any) -> dict[str, Any]:
    settings = {
        "weights": "bf16", "tiny": False, "lengths": "hh", "implementation": row, "side": row.split("_")[0],
        "status": "measured", "pairs": 48,
        "pairs_per_step": 16, "max_length": 1024, "dtype": "bfloat16", "pairs_per_s": pairs_per_s, "computed_tokens_per_s": 9e3,
        "utilisation_of_measured": 0.4, "utilisation_of_published": None, "peak_mb": 2048.0, "reference_s": 1.0,
        "first_loss": math.log(2), "first_chosen": -700.0, "first_rejected": -650.0, "trainable_parameters": 7,
    }  # fmt: skip
    return settings | changes


def test_targets_are_met_or_missed_by_the_fastest_rows_of_each_side() -> None:
    found = [
        record("engine", 9.0, peak_mb=1024.0), record("engine_stored", 7.0),
        record("trl_default", 2.0), record("trl_stored", 5.0),
    ]  # fmt: skip
    assert gpu_tables.targets(found) == [
        "target 2 x TRL's best: missed (engine 1.80 x trl_stored)",
        "target 3 x TRL's default: met (4.50 x)",
        "target lower peak memory than TRL's best: met (0.50 of it)",
    ]
    assert gpu_tables.targets(found[:2]) == []


@needs_trl
def test_a_step_that_trl_cannot_divide_is_refused_instead_of_made_smaller(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    arguments = [*TINY, "--step", "3", "--rows", "trl_stored", "--records", str(path)]
    assert gpu_train.main(arguments) == 0
    assert "no multiple of TRL's micro-batch of 2" in json.loads(path.read_text("utf-8"))["status"]


def test_rows_that_do_not_agree_have_no_figures() -> None:
    text = gpu_tables.show([record("engine", 9.13), record("trl_default", 2.07, first_chosen=-600.0)])
    assert "do not agree" in text and "9.13" not in text and "2.07" not in text and "target" not in text


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text = gpu_tables.show([record("engine", 9.0), {**record("trl_default", 1.0), "status": "n/a: trl not installed"}])
    assert "trl_default: n/a: trl not installed" in text and "target" not in text
