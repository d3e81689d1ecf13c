"""Are the pages and examples that a command writes what the command would write now?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_engine.memory.cards import read_card
from dpo_engine.memory.plan import make_plan
from dpo_engine.memory.recipe import recipe
from dpo_engine.memory.shapes import shipped_config, shipped_shape
from dpo_engine.memory.step import StepSettings

ROOT = Path(__file__).parents[2]


def test_the_page_of_every_key_is_as_the_configuration_has_them() -> None:
    transformers = pytest.importorskip("transformers")
    # In a process of its own: other tests may have read defaults under other settings.
    command = [sys.executable, "-m", "dpo_engine.cli.reference_page"]
    now = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    said = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    until = None if f"as version {transformers.__version__} has them" in said else "## From `transformers"
    assert said.split(until)[0] == now.split(until)[0] if until else said == now, (
        "run: python -m dpo_engine.cli.reference_page > docs/configuration.md"
    )


def test_the_tables_of_trls_names_are_as_the_code_has_them() -> None:
    pytest.importorskip("transformers")
    from dpo_engine.cli.trl_page import with_tables

    page = (ROOT / "docs" / "trl-differences.md").read_text("utf-8")
    assert page.count("<!-- end -->") == 8
    assert with_tables(page) == page, "run: python -m dpo_engine.cli.trl_page docs/trl-differences.md"


def test_the_table_of_what_methods_need_and_their_parameters_are_as_the_code_has_them() -> None:
    pytest.importorskip("transformers")
    from dpo_engine.cli.methods_page import needs_table, with_generated

    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert needs_table() in page and page.count("\n- Parameters: ") == needs_table().count("\n| [")
    assert with_generated(page) == page, "run: python -m dpo_engine.cli.methods_page docs/methods.md"


@pytest.mark.parametrize("size", ["12GB", "16GB", "24GB"])
def test_the_qlora_examples_are_as_the_plan_writes_them(size: str) -> None:
    plan = make_plan(shipped_shape("qwen3-8b"), StepSettings(), read_card(size))
    wanted = recipe(plan, model=shipped_config("qwen3-8b")["_name_or_path"])
    assert (ROOT / "examples" / f"qlora-8b-{size.lower()}.yaml").read_text("utf-8") == wanted, (
        f"run: dpo-engine plan --model qwen3-8b --gpu {size} --output examples/qlora-8b-{size.lower()}.yaml"
    )


def test_the_readme_has_the_table_that_plan_prints() -> None:
    pytest.importorskip("typer")
    from dpo_engine.cli.plan import table

    assert table() in (ROOT / "README.md").read_text("utf-8"), "put what `dpo-engine plan` prints into README.md"
