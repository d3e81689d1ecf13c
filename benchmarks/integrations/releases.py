"""Beside which releases are the integrations held, and how does each come into an environment of its own?

Environments lie under `.integrations/` (ignored by git), one a release. They hold the pins and nothing of this checkout: the
engine is built as a wheel and unpacked into a folder that a run finds by PYTHONPATH, so another commit needs no new environment,
and the checkout's own folder `kernels/` is never beside a transformers that would take it for the package of that name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT

FOLDER = ROOT / ".integrations"
SOURCES = ("dpo_engine", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
TORCH = ("torch==2.13.0", "triton==3.7.1")


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is installed; `without_dependencies` is for packages that name more than runs here."""

    pins: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    """Folders of site-packages: compiled for CUDA alone, in the way of a CPU, and not needed here."""


RELEASES = {
    "0.24": Release(
        pins=(*TORCH, "trl==0.24.0", "transformers==4.57.3", "peft==0.18.1", "datasets==5.0.1", "accelerate==1.15.0")
    ),
    "1.8": Release(
        pins=(*TORCH, "trl==1.8.0", "transformers==5.12.1", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0")
    ),
    "1.13": Release(
        pins=(*TORCH, "trl==1.13.0", "transformers==5.20.2", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0")
    ),
    "1.16": Release(
        pins=(*TORCH, "trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0")
    ),
    # Names torchvision and torchaudio, whose wheels are built for CUDA: beside a torch without it they cannot be loaded.
    "llamafactory": Release(
        pins=(*TORCH, "trl==0.24.0", "transformers==4.57.3", "llamafactory==0.9.5"),
        removed=("torchvision", "torchaudio/lib"),
    ),
    # Of its dependencies those that training by DPO imports; xformers, torchao and others are for CUDA.
    "axolotl": Release(
        pins=(
            *(*TORCH, "trl==1.9.0", "transformers==5.16.1", "peft==0.20.0", "datasets==4.8.4", "accelerate==1.13.0"),
            *("huggingface_hub==1.17.0", "tokenizers==0.23.1", "PyYAML==6.0.3", "pydantic==2.12.5", "packaging==26.0"),
            *("python-dotenv==1.0.1", "schedulefree==1.4.1", "posthog==6.7.11", "zstandard==0.22.0", "optimum==1.16.2"),
            *("evaluate==0.4.1", "bitsandbytes==0.50.2", "mistral-common==1.11.5", "antlr4-python3-runtime==4.13.2"),
            *("axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "numba", "scipy", "einops", "addict"),
            *("fire", "requests", "colorama", "art", "fastcore", "nvidia-ml-py", "sentencepiece", "langdetect"),
            *("immutabledict", "wandb", "tensorboard"),
        ),
        without_dependencies=("axolotl==0.19.0",),
    ),
}
RECIPES = ("llamafactory", "axolotl")


def environment(name: str) -> Path:
    """The Python of a release's environment, which is made if it is not there or its pins have changed."""
    release = RELEASES[name]
    place = FOLDER / (name if name in RECIPES else f"trl-{name}")
    python, marker = place / "bin" / "python", place / "pins.txt"
    wanted = "\n".join((*release.pins, "--no-deps", *release.without_dependencies)) + "\n"
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Making {place.relative_to(ROOT)} (once)", file=sys.stderr)
    if not python.exists():
        venv.create(place, with_pip=True)
    _pip(python, *release.pins)
    if release.without_dependencies:
        _pip(python, "--no-deps", *release.without_dependencies)
    for path in release.removed:
        for found in place.glob(f"lib/python3*/site-packages/{path}"):
            shutil.rmtree(found)
    marker.write_text(wanted, encoding="utf-8")  # last: an environment that was not finished is made again
    return python


def engine_folder() -> Path:
    """Build the checkout as a wheel and unpack it; returns the folder for PYTHONPATH."""
    place = FOLDER / "engine"
    shutil.rmtree(place, ignore_errors=True)
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"  # a copy, for what an earlier build left in the checkout would come along
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, source / name)
        subprocess.run([*pip, "wheel", *quiet, "--wheel-dir", folder, str(source)], check=True)
        (wheel,) = Path(folder).glob("dpo_engine-*.whl")
        subprocess.run([*pip, "install", *quiet, "--target", str(place), str(wheel)], check=True)
    # ROOT itself will not do: old transformers import its folder `kernels`.
    (place / "benchmarks").symlink_to(ROOT / "benchmarks")
    return place


def _pip(python: Path, *words: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
