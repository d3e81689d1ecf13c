"""Does the reference cache's benchmark measure what it says, and would it see a row that was lost?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.benchmark_scripts import load

cache = load("cache")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The records of a tiny run, by case."""
    folder = tmp_path_factory.mktemp("results")
    assert cache.main(["--smoke", "--threads", "1", "--folder", str(folder)]) == 0
    [path] = folder.rglob("*-cache.jsonl")
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {case: [record for record in records if record["case"] == case] for case in cache.CASES}


def test_every_case_is_measured_in_rounds(ran: dict[str, list[dict[str, Any]]]) -> None:
    assert [len(ran[case]) for case in cache.CASES] == [1, 1, len(cache.BETAS)]
    for record in (record for records in ran.values() for record in records):
        assert (record["implementation"], record["status"], record["dtype"]) == ("engine", "measured", "float32")
        assert (record["rounds"], record["threads"]) == (2, 1)
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert record["unquotable"] and not record["unquotable"].startswith("wrong")


def test_an_entry_takes_its_values_and_little_more(ran: dict[str, list[dict[str, Any]]]) -> None:
    [record] = ran["store"]
    assert record["store_rows"] == cache.SMOKE["rows"] and record["bytes_per_token"] > 4
    assert record["rows_per_s_read"] == pytest.approx(1e3 * record["store_rows"] / record["median_ms"], rel=0.01)


def test_building_is_compared_with_the_same_forests(ran: dict[str, list[dict[str, Any]]]) -> None:
    [record] = ran["build"]
    over = record["over_bare"]
    assert over["least"] <= over["p20"] <= over["median"] <= over["p80"] <= over["most"]
    assert record["pairs"] == cache.SMOKE["pairs"] and record["forests"] >= 1 and record["bare_median_ms"] > 0


def test_the_first_beta_computes_every_row_and_the_others_none(ran: dict[str, list[dict[str, Any]]]) -> None:
    pairs = cache.SMOKE["pairs"]
    assert [(r["beta"], r["computed"], r["reused"]) for r in ran["sweep"]] == [
        (beta, pairs if beta == cache.BETAS[0] else 0, 0 if beta == cache.BETAS[0] else pairs) for beta in cache.BETAS
    ]


def test_a_store_that_loses_entries_is_not_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_engine.reference.store import ReferenceStore

    own = ReferenceStore.put
    monkeypatch.setattr(ReferenceStore, "put", lambda self, entries: own(self, list(entries)[1:]))
    data = load("steps.engine").pair_data(load("smoke").tiny_pairs(4))
    [record] = cache.measure_store(tmp_path, data, None, 10, 4, 1)
    assert record["unquotable"] == "wrong: 1 rows that were written were not found"


def test_a_sweep_that_computes_again_is_not_quoted(tmp_path: Path) -> None:
    class Filled:
        reused, computed = 0, 4

    class Forgetful:
        """A run whose cache never has anything."""

        def __init__(self, *_: Any) -> None:
            self.references = type("References", (), {"filled": Filled})

        def know_reference(self) -> None: ...

    data = load("steps.engine").pair_data(load("smoke").tiny_pairs(4))
    records = cache.measure_sweep(tmp_path, data, Forgetful, 0, 4, 1)
    assert [str(record["unquotable"]).startswith("wrong") for record in records] == [False, True, True, True]
