"""Can the memory suite's figures be believed? Phases of a process, every case at tiny sizes, and a claim that can fail."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.benchmark_scripts import load

harness, run = load("harness"), load("memory.run")
vocabulary, phases, step = load("memory.vocabulary"), load("memory.phases"), load("memory.step")

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")


def in_child(code: str) -> dict[str, Any]:
    """What a script prints that has `Marks`, and `hold(mib)` for memory that is in use."""
    head = """
import json
from benchmarks.memory.phases import Marks
marks = Marks()
def hold(mib):
    block = bytearray(mib << 20)
    block[::4096] = b"x" * len(block[::4096])
    return block
"""
    done = harness.run_watched([sys.executable, "-c", head + code], env=vocabulary.HONEST)
    return harness.last_json(done.stdout)


def test_peaks_and_what_stays_are_told_apart_by_part() -> None:
    found = in_child("""
with marks.phase("weights"):
    weights = hold(40)
    hold(20)
with marks.phase("adapters"):
    adapters = hold(8)
kept = []
for grown in (30, 50):      # two forests
    marks.begin("forward")
    kept = hold(grown)
    marks.begin("backward")
    hold(10)
    kept = []
marks.begin("optimizer")
states = hold(16)
marks.end()
peaks, stays = marks.parts()
print(json.dumps({"peaks": peaks, "stays": stays, "peak": marks.peak, "levels": marks.levels()}))
""")
    expected = {
        "peaks": {"weights": 60, "adapters": 8, "forward": 50, "backward": 60, "optimizer": 16},
        "stays": {"weights": 40, "adapters": 8, "forward": 50, "backward": 0, "optimizer": 16},
    }
    for kind, by_part in expected.items():
        assert found[kind] == pytest.approx(by_part, abs=3)
    assert found["peak"] == pytest.approx(found["levels"]["before_the_first_step"] + 60, abs=3)


def test_what_is_freed_is_not_resident_any_more() -> None:
    found = in_child("""
import torch
with marks.phase("weights"):
    for _ in range(8):      # after which glibc, left to itself, would take such blocks from its heap and keep them
        block = torch.ones(3 << 18)
        del block
with marks.phase("adapters"):
    blocks = [torch.ones(3 << 18) for _ in range(8)]
    last = blocks[-1]
    del blocks
marks.begin("forward")
marks.begin("backward")
marks.begin("optimizer")
marks.end()
print(json.dumps(dict(zip(("peaks", "stays"), marks.parts()))))
""")

    assert found["peaks"]["adapters"] > 20 and found["stays"]["adapters"] < 6


# ---- every case, for real ----


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("results")
    some = ["engine tiled", "naive", "engine_shared"]  # a process each: seconds go into imports
    given = ["--smoke", "--rounds", "1", "--threads", "1", "--folder", str(folder), "--only", *some]
    assert run.main(given) == 0
    [path] = folder.rglob("*-memory.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_engine_does_not_grow_with_the_vocabulary_and_logits_do(ran: list[dict[str, Any]]) -> None:
    extra = {(r["implementation"], r["vocabulary"]): r["extra_mb"] for r in ran if r["case"] == "vocabulary"}
    assert set(extra) == {(name, v) for name in ("engine tiled", "naive") for v in vocabulary.SMOKE_VOCABULARIES}
    small, large = vocabulary.SMOKE_VOCABULARIES
    logits_mb = vocabulary.SMOKE_ROWS * (large - small) * 4 / 2**20
    assert extra["naive", large] - extra["naive", small] > 1.5 * logits_mb
    growths = {r["implementation"]: r for r in ran if r["case"] == "independent_of_vocabulary"}
    assert growths["engine tiled"]["holds"] is True and growths["naive"]["independent"] is False


def test_a_step_has_every_part_and_the_plan_beside_it(ran: list[dict[str, Any]]) -> None:
    [record] = [r for r in ran if r["case"] == "step"]
    assert record["status"] == "measured", record
    assert list(record["parts"]) == ["weights", "adapters", "forward", "backward", "optimizer"]
    assert record["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(record["stays"][part] <= record["parts"][part] for part in record["parts"])
    assert record["peak_rss_mb"] > record["levels"]["imports"] > 100
    assert set(record["planned"]) == {"weights", "adapters", "step", "optimizer"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return step.smoke_job(tmp_path_factory.mktemp("tiny"), 1)


@pytest.mark.parametrize("name", step.ROWS)
def test_every_row_trains_on_the_same_pairs_from_the_same_start(name: str, tiny: Any, tmp_path: Path) -> None:
    row = step.ROWS[name]
    if row.side == "trl" and step.missing_packages("trl", "datasets"):
        pytest.skip("trl or datasets is not installed")
    found = phases.run({**vars(tiny), "lora_alpha": 8.0, "side": row.side, **row.options, "output_dir": str(tmp_path)})
    assert found["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    costs = [[len(ids) for ids in pair.values()] for pair in tiny.pairs]  # prompt, chosen, rejected
    of_steps = [costs[first : first + tiny.batch] for first in range(0, len(costs), tiny.batch)]
    shared = max(sum(p + c - 1 + r - 1 for p, c, r in of_step) for of_step in of_steps)
    packed = max(sum(2 * p + c - 1 + r - 1 for p, c, r in of_step) for of_step in of_steps)
    if name == "engine_shared":
        assert found["largest_forward_tokens"] == shared
    elif name == "engine_packed":
        assert found["largest_forward_tokens"] == packed
    else:  # padded
        assert found["largest_forward_tokens"] >= packed
    planned = step.planned(name, tiny, found)
    assert isinstance(planned, str) is (name not in ("engine_packed", "engine_shared"))


def test_nothing_of_a_tiny_run_is_to_be_quoted(ran: list[dict[str, Any]]) -> None:
    for record in ran:
        assert record["unquotable"] and record["rounds"] == 1 and record["dtype"] == "float32"


# ---- what was not measured, and claims ----


def growths_of(**extra: list[float]) -> dict[str, dict[str, Any]]:
    common = {"case": "vocabulary", "dtype": "float32", "threads": 1, "rounds": 1, "status": "measured"}
    records = [
        {**common, "implementation": name.replace("_", " "), "vocabulary": 8192 * 4**place, "extra_mb": value}
        for name, values in extra.items()
        for place, value in enumerate(values)
    ]
    return {record["implementation"]: record for record in vocabulary.growth(records)}


def test_memory_that_grows_with_the_vocabulary_makes_the_claim_fail() -> None:
    found = growths_of(engine_tiled=[10.0, 11.9, 10.5], engine_other=[10.0, 12.2, 10.5], naive=[10.0, 40.0, 160.0])
    assert [found[name]["holds"] for name in ("engine tiled", "engine other")] == [True, False]
    assert found["naive"]["independent"] is False and "holds" not in found["naive"]
    assert not growths_of(engine_tiled=[10.0])  # one figure says nothing of growth


def test_an_implementation_that_is_not_there_reads_why() -> None:
    name = next(name for name, entry in vocabulary.IMPLEMENTATIONS.items() if entry.cuda_only)
    shape = load("ops.cases").Shape(rows=8, hidden=16, vocabulary=64, dtype="float32", device="cpu")
    assert vocabulary.one(name, shape, 1)["status"].startswith("n/a: ")


def test_a_row_that_takes_too_long_reads_so_and_is_not_tried_again(tiny: Any) -> None:
    found = step.measure(tiny, ["engine_shared"], rounds=2, limit_s=0.3)
    assert [(record["round"], record["status"]) for record in found] == [(0, "not measured: took more than 0.3 s")]


def test_the_table_shows_what_was_planned_and_what_was_not_measured() -> None:
    parts = {"weights": 500.0, "adapters": 20.0, "forward": 700.0, "backward": 800.0, "optimizer": 60.0}
    measured = {
        "case": "step", "implementation": "engine_shared", "status": "measured", "model": "m", "data": "d", "batch": 8,
        "lora_r": 16, "parts": parts, "stays": parts, "peak_rss_mb": 1900.0, "largest_forward_tokens": 480,
        "planned": {"weights": 513.2, "adapters": 18.6, "step": 777.7, "optimizer": 37.3},
    }  # fmt: skip
    text = run.show([measured, {"case": "step", "implementation": "trl_best", "status": "n/a: trl not installed"}])
    assert "777.7" in text and "800 (800)" in text and "trl_best: n/a: trl not installed" in text
