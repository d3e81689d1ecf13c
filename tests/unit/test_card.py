"""Does a trained folder say truly what it was made of?"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import yaml

from dpo_engine.errors import ConfigError
from dpo_engine.train.card import card_text, read_facts, stated_license, write_card
from dpo_engine.train.run import TrainConfig, run_training
from support.adapters import save_base

ROWS = [
    {"prompt": f"where is the {a}?", "chosen": f"on the {b}.", "rejected": f"the {a} ran after the {b} and away."}
    for a in ("cat", "dog", "man")
    for b in ("mat", "hat", "cow", "pig")
]


def front(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps on a base that states its licence."""
    place = tmp_path_factory.mktemp("card")
    base = save_base(place / "base")
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    data = place / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "p", "chosen": "c", "rejected": "d"}]))
    config = TrainConfig(
        model=str(base), data=str(data), eval_data=str(data), output_dir=str(place / "run"), dtype="float32", lora_r=4,
        max_steps=2, per_device_train_batch_size=4, save_strategy="no", picture=False, max_pairs=12, disable_tqdm=True,
        learning_rate=1e-2,
    )  # fmt: skip
    result = run_training(config, say=lambda _: None)
    (place / "result.json").write_text(json.dumps(result))
    return place / "run"


def test_the_facts_are_those_of_the_run(folder: Path) -> None:
    facts = read_facts(folder)
    assert facts
    place = folder.parent
    result = json.loads((place / "result.json").read_text())
    digest = hashlib.sha256((place / "pairs.jsonl").read_bytes()).hexdigest()
    assert facts["data"] == {"name": "pairs.jsonl", "rows_read": 13, "rows_used": 12, "sha256": digest}
    assert facts["base"]["name"] == str(place / "base") and facts["base"]["num_hidden_layers"] == 2
    assert facts["base"]["license"] == "cc-by-4.0"
    assert facts["method"] == "dpo" and facts["method_settings"] == {"beta": 0.1, "label_smoothing": 0.0}
    assert facts["lora"]["r"] == 4 and facts["load_in_4bit"] is False and facts["dtype"] == "float32"
    assert facts["settings"]["steps"] == 2
    assert facts["results"]["margin"] == result["margin"] and result["margin"]["after"] > 0


def test_the_card_shows_them_and_replaces_that_of_peft(folder: Path) -> None:
    text, facts = (folder / "README.md").read_text(), read_facts(folder)
    assert facts
    head = front(text)
    assert head["base_model"] == facts["base"]["name"] and head["license"] == "cc-by-4.0"
    assert head["library_name"] == "peft" and head["tags"] == ["dpo-engine", "dpo", "lora"]
    for shown in (
        facts["data"]["sha256"],
        "12 of 13 rows used",
        "method: dpo (beta 0.1",
        "r 4",
        "cc-by-4.0, as the base states",
    ):
        assert shown in text
    assert f"{facts['results']['margin']['after']:.4f}" in text and "More Information Needed" not in text


def test_an_adapter_with_a_record_merges_and_carries_the_card_on(folder: Path, tmp_path: Path) -> None:
    from dpo_engine.export.run import ExportOptions, run_export
    from support.adapters import adapted, greedy, plain

    output = tmp_path / "merged"
    options = ExportOptions(adapter=str(folder), merge=True, dtype="float32", output=str(output))
    result = run_export(options, say=lambda _: None)
    assert greedy(plain(output)) == greedy(adapted(folder.parent / "base", folder))
    facts, text = read_facts(output), (output / "README.md").read_text()
    assert facts and facts["data"] == (read_facts(folder) or {})["data"]
    assert facts["export"]["check"]["max"] == result["check"]["max"]
    assert front(text)["library_name"] == "transformers" and "merged in float32 into the base" in text


@pytest.mark.parametrize(
    ("files", "license_name"),
    [
        ({}, None),
        ({"README.md": "# no front matter"}, None),
        ({"README.md": "---\nlicense: [broken\n---\n"}, None),
        ({"README.md": "---\nlicense: gemma\n---\n", "LICENSE": "MIT License"}, "gemma"),
        ({"LICENSE": "                 Apache License\n           Version 2.0, January 2004"}, "apache-2.0"),
        ({"LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "Our own terms"}, "other"),
    ],
)
def test_a_licence_is_what_the_base_states_and_none_is_made_up(
    tmp_path: Path, files: dict[str, str], license_name: str | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert stated_license(str(tmp_path), str(tmp_path)) == license_name


def test_a_base_without_a_licence_gets_none_in_the_card(folder: Path) -> None:
    facts = read_facts(folder)
    assert facts
    text = card_text(facts | {"base": facts["base"] | {"license": None}})
    assert "license" not in front(text) and "not stated" in text


def test_names_cannot_break_the_front_matter(folder: Path, tmp_path: Path) -> None:
    facts = read_facts(folder)
    assert facts
    name = "a: b\n---\nlicense: mit"
    write_card(tmp_path, facts | {"base": facts["base"] | {"name": name, "license": None}})
    head = front((tmp_path / "README.md").read_text())
    assert head["base_model"].split() == name.split() and "license" not in head


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', "\xff"])
def test_a_record_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dpo_engine_run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"dpo_engine_run.json"):
        read_facts(tmp_path)
    assert read_facts(tmp_path / "nowhere") is None
