"""What was it measured on: machine, versions and commit?"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "liger-kernel",
    "cut-cross-entropy",
)
COMMIT_VARIABLE = "DPO_ENGINE_COMMIT"  # says which commit it is where the files came without their history
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "avx10_1", "bf16")  # x86, x86, x86, Arm


def describe_machine(accelerator: str | None = None) -> dict[str, Any]:
    """What a figure needs beside it to mean anything.

    Args:
        accelerator: the GPU's name, where one was used: then its driver and clocks are part of the answer.
    """
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    flags = set(_cpuinfo_field(cpuinfo, "flags", "Features").split())
    return {
        "cpu": _cpuinfo_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_bf16_instructions": bool(flags.intersection(_BF16_FLAGS)),
        "cpu_vector": next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "unknown"),
        "accelerator": accelerator,
        "gpu": describe_gpu() if accelerator else None,
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def describe_gpu() -> dict[str, str] | None:
    """Driver, memory, clocks (MHz), power (W) and temperature of the first GPU as they are now; None where
    `nvidia-smi` does not answer.
    """
    asked = (
        "driver_version memory.total clocks.sm clocks.mem clocks.max.sm power.limit power.draw temperature.gpu".split()
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
    return dict(zip(asked, values, strict=False))


def _cpuinfo_field(cpuinfo: str, *names: str) -> str:
    for name in names:
        found = re.search(rf"^{name}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        if found:
            return found[1].strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this checkout, with `-dirty` where tracked files differ from it.

    Where the files lie outside a checkout: what the environment says in `DPO_ENGINE_COMMIT`, or `unknown`.
    """
    try:
        named = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    return named.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def machine_name(machine: Mapping[str, Any]) -> str:
    """A folder's name: the GPU if one was used, else the CPU and its cores."""
    name = machine["accelerator"] or f"{machine['cpu']} {machine['cores']} cores {machine['cpu_vector']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
