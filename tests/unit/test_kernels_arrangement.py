"""Does the top-level folder `kernels/` stay out of the way of the package that transformers imports under that name?

transformers does `from kernels import ...`. With the repository root on `sys.path`, a `kernels/__init__.py` of ours would
be imported instead of that package, and loading any model class would fail. Without it our folder is at most a namespace,
and the real package wins. Our own code reaches the files as `dpo_engine.kernels`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from support.imports import ROOT


def run_python(code: str, *, cwd: Path, path: list[Path]) -> str:
    """What `code` prints in a fresh interpreter that finds modules in `path` first."""
    header = f"import sys; sys.path[:0] = {[str(entry) for entry in path]!r}\n"
    done = subprocess.run([sys.executable, "-c", header + code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", ["kernels/__init__.py", "conftest.py", "tests/__init__.py", "tests/kernels"])
def test_a_file_that_would_break_the_arrangement_is_not_there(path: str) -> None:
    assert not (ROOT / path).exists(), f"{path} breaks imports; see the docstring of this file"


def test_no_folder_of_tests_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_two_test_files_share_a_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_kernels_resolve_to_the_top_level_folder(tmp_path: Path) -> None:
    files = sorted((ROOT / "kernels").glob("*.py"))
    code = f"""
from importlib.util import find_spec
for name in {[file.stem for file in files]}:
    print(find_spec("dpo_engine.kernels." + name).origin)
"""
    assert files
    assert [Path(line).resolve() for line in run_python(code, cwd=tmp_path, path=[ROOT]).splitlines()] == files


def test_the_shim_says_nothing_but_where_the_kernels_are() -> None:
    shim = {path.name for path in (ROOT / "dpo_engine" / "kernels").iterdir()} - {"__pycache__"}
    assert shim == {"__init__.py"}, "a kernel belongs into the top-level folder kernels/"


MODEL_CLASS = "from transformers import LlamaForCausalLM as model; print(model.__name__)"


def test_transformers_loads_a_model_class_with_the_root_on_the_path(tmp_path: Path) -> None:
    assert run_python(MODEL_CLASS, cwd=tmp_path, path=[ROOT]) == "LlamaForCausalLM"


def test_the_real_package_wins_over_the_folder(tmp_path: Path) -> None:
    """A regular package anywhere on the path beats a folder without `__init__.py` that comes before it."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('ORIGIN = "the real package"\n')
    code = "import kernels, dpo_engine.kernels as ours; print(kernels.ORIGIN); print(*ours.__path__)"
    first, second = run_python(code, cwd=tmp_path, path=[ROOT, tmp_path / "site"]).splitlines()
    assert first == "the real package"
    assert Path(second).resolve() == ROOT / "kernels"


def lint(statement: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--select=TID251", "--stdin-filename=dpo_engine/x.py"]
    return subprocess.run([*command, "-"], cwd=ROOT, input=f"{statement}\n", capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("statement", ["import kernels", "import kernels.tile_pass", "from kernels import tile_pass"])
def test_the_linter_refuses_the_second_name(statement: str) -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed here: pip install -e '.[dev]'")
    assert lint("import dpo_engine.kernels").returncode == 0
    refused = lint(statement)
    assert refused.returncode == 1
    assert "TID251" in refused.stdout
