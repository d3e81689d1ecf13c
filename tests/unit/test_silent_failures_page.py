"""Does docs/silent-failures.md name tests that exist, one for each failure, and none too few?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "silent-failures.md"
ROWS = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ") and "what " not in line[:7]]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text("utf-8"))))


def functions_of(path: str) -> set[str]:
    """The names of the test functions of a file."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_every_test_that_the_page_names_exists(path: str) -> None:
    named = {name for where, name in NAMED if where == path}
    assert named <= functions_of(path), f"{path} has no {sorted(named - functions_of(path))}"


def test_every_failure_on_the_page_is_held_by_a_test() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        failure, here, held = (cell.strip() for cell in row.strip("|").split(" | "))
        assert failure and here and re.fullmatch(r"`tests/\S+::\w+`(, `tests/\S+::\w+`)*", held), row


@pytest.mark.parametrize("path", ["tests/faults/test_silent_failures.py", "tests/faults/test_odd_models.py"])
def test_every_test_of_silent_failures_is_on_the_page(path: str) -> None:
    assert functions_of(path) == {name for where, name in NAMED if where == path}
