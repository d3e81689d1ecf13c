"""Does the card's memory benchmark measure both sides, find what fits a cap, and make a table that claims nothing unmeasured?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpo_engine.memory.shapes import shipped_shape
from support.benchmark_scripts import load

gpu_memory = load("gpu.memory")
gpu_model = load("gpu.model")
memory_table = load("gpu.memory_table")

ROOT = Path(__file__).parents[2]
HAS_ALL = all(importlib.util.find_spec(name) for name in ("trl", "datasets", "bitsandbytes"))


def engine(length: int, peak_mb: float, **more: object) -> dict[str, object]:
    return {"implementation": "engine", "length": length, "status": "measured", "peak_mb": peak_mb, "tokens_per_s": 1000.0,
            "pairs_per_s": 1.5, "machine": {"accelerator": "a card"}, **more}  # fmt: skip


@pytest.mark.skipif(not HAS_ALL, reason="trl, datasets or bitsandbytes is not installed")
def test_both_sides_train_on_pairs_that_fill_the_length(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    arguments = ["--tiny", "--device", "cpu", "--lengths", "1024", "--limit_s", "120", "--records", str(records)]
    assert gpu_memory.main(arguments) == 0
    found = [json.loads(line) for line in records.read_text("utf-8").splitlines()]
    assert [(record["implementation"], record["status"]) for record in found] == [
        ("engine", "measured"),
        ("trl", "measured"),
    ]
    ours, theirs = found
    assert ours["length"] == 32 and ours["pair_tokens"] == 8 + 2 * 24
    # A completion's last token is no input of a forest; TRL runs every prompt twice, each time for one micro-batch.
    assert ours["step_tokens"] == [4 * (8 + 2 * 23)] * 3 and theirs["step_tokens"] == [4 * 2 * 32] * 3
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], abs=1e-4)
    assert ours["first_chosen"] == pytest.approx(theirs["first_chosen"], rel=1e-3)
    assert gpu_memory.main([*arguments, "--cap", "12"]) == 0
    last = json.loads(records.read_text("utf-8").splitlines()[-1])
    assert (last["implementation"], last["cap_gb"], last["length"], last["status"]) == ("engine", 12.0, 32, "measured")


def test_the_longest_that_fits_a_cap_is_read_from_what_was_measured_without_one() -> None:
    found = [engine(1024, 7000), engine(2048, 9000), engine(4096, 13000), engine(8192, 20000, status="failed: memory")]
    found += [
        engine(4096, 9000, cap_gb=12.0),
        {"implementation": "trl", "length": 8192, "status": "measured", "peak_mb": 1.0},
    ]
    lengths = (1024, 2048, 4096, 8192)
    assert [gpu_memory.longest_that_fits(found, cap, lengths) for cap in (4, 12, 16, 24)] == [None, 2048, 4096, 4096]
    assert gpu_memory.longest_that_fits(found, 24, (1024,)) == 1024


def test_the_plan_beside_a_row_is_of_the_tokens_that_its_forests_have() -> None:
    shape = shipped_shape("llama-3.1-8b")
    assert gpu_memory.pair_tokens(4096) == memory_table.pair_tokens(4096) == 1024 + 2 * 3072
    assert gpu_memory.planned_mb(shape, 4096, "cuda") > gpu_memory.planned_mb(shape, 2048, "cuda") > 6000


def test_four_bit_weights_are_made_one_layer_at_a_time() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import torch

    config = gpu_model.llama_config(tiny=True)
    model = gpu_model.make_model(config, "nf4", "cpu", torch.float32)
    layers = [module for module in model.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 7 * config.num_hidden_layers and all(layer.weight.quant_state.nested for layer in layers)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    logits = model(torch.tensor([[3, 4, 5]])).logits
    assert bool(logits.isfinite().all()) and logits.std() > 0.01


def test_the_table_claims_nothing_that_was_not_measured() -> None:
    rows = memory_table.table([]).splitlines()[2:]
    assert len(rows) == 12 and all(row.count("not measured") == 6 for row in rows)
    assert "12 GB | 8192 | 13.6, does not fit" in memory_table.table([])


def test_the_table_reads_what_fits_from_the_peak_and_says_who_measured() -> None:
    found = [engine(1024, 7000), engine(4096, 13000), engine(4096, 12000, cap_gb=16.0), engine(2048, 1.0, tiny=True)]
    text = memory_table.table(found)
    assert "tokens/s on a card" in text
    by_key = {tuple(row.split(" | ")[:2]): row for row in text.splitlines()[2:]}
    assert "| 6.8 | 1000 | 1.50 |" in by_key["| 12 GB", "1024"]
    assert "12.7: does not fit | - | -" in by_key["| 12 GB", "4096"]
    assert "12.7, trained within the cap | 1000 | 1.50" in by_key["| 16 GB", "4096"]
    assert by_key["| 12 GB", "2048"].count("not measured") == 6


def test_the_page_on_memory_has_the_table_of_the_newest_results() -> None:
    page = (ROOT / "docs" / "memory.md").read_text("utf-8")
    assert memory_table.table(memory_table.newest()) in page, (
        "put what python -m benchmarks.gpu.memory_table prints into it"
    )
