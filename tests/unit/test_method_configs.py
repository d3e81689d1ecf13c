"""Does examples/methods/ have a config for every method, which the trainer takes and whose data the method trains on?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("transformers")

from dpo_engine.data import check_source
from dpo_engine.losses import LOSSES, get_method
from dpo_engine.train.method_arguments import PARAMETERS
from dpo_engine.train.run import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "methods").glob("*.yaml"))
BESIDE = {"mixture": "dpo+bco+sft", "ranked_pairs": "dpo"}
"""Configs that are not named after a method."""


def test_there_is_one_for_every_method() -> None:
    assert {path.stem for path in CONFIGS} == {*LOSSES, *BESIDE}
    for path in CONFIGS:
        assert _keys(path)["method"] == BESIDE.get(path.stem, path.stem)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_opens_with_what_it_shows_and_writes_to_a_folder_of_its_own(path: Path) -> None:
    assert path.read_text("utf-8").startswith("# ")
    assert _keys(path)["output_dir"] == f"runs/methods/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_taken_as_it_stands_and_names_no_parameter_but_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    keys = _keys(path)
    config = TrainConfig(**keys)
    method = get_method(keys["method"], keys.get("loss_weights"))
    uses = method.uses.union(*(part.uses for _, part in method.parts))
    assert {name for name in keys if name in PARAMETERS} <= uses
    for name in keys:  # nothing became something else
        assert getattr(config, name) == keys[name], name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_data_is_what_the_method_trains_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    keys = _keys(path)
    method = get_method(keys["method"])
    kind = "ranked" if path.stem == "ranked_pairs" else method.kind
    source = check_source(keys["data"], method=keys["method"], kind=method.kind)
    assert not source.report.rows_left_out and len(source.rows) >= 30
    for row in source.rows:
        ranks, labels = row.ranks, row.desirable
        assert (labels is not None) == (kind == "unpaired")
        assert (ranks is not None and len(row.completions) in (3, 4)) == (kind == "ranked")


def test_the_labelled_rows_are_unpaired_and_the_weights_even_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_engine.data.inspection import suggested_weights

    monkeypatch.chdir(ROOT)
    keys = _keys(ROOT / "examples" / "methods" / "kto.yaml")
    rows = check_source(keys["data"], kind="unpaired").rows
    assert len({str(row.prompt) for row in rows}) == len(rows)
    good = sum(sum(row.desirable) for row in rows)
    assert suggested_weights(good, len(rows) - good) == (keys["desirable_weight"], 1.0)


def test_lists_are_of_both_sizes_and_not_in_order_already(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "ranked_train.jsonl").read_text("utf-8").splitlines()]
    assert {len(row["completions"]) for row in rows} == {3, 4}
    assert any(row["scores"] != sorted(row["scores"], reverse=True) for row in rows)


def _keys(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8"))
