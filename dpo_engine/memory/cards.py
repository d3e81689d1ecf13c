"""How much memory has a card, and how fast does it multiply? By name, or by size alone.

    card = read_card("24GB")        # any card of 24 GB
    card = read_card("rtx-4090")

Rates are datasheet figures: dense bfloat16 products summed in float32, which on GeForce cards is half of what is advertised.
"""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from dataclasses import dataclass

from dpo_engine.errors import ConfigError

GIB = 2**30
_IN_USE = 0.98  # of a size: a driver keeps some, and so does a screen


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card, or all cards of one size."""

    name: str
    memory: int
    """Bytes that a process can be given."""
    tflops: tuple[float, float] | None
    """Slowest and fastest of such cards; None where no card of that size is known."""


# name: (MiB as nvidia-smi counts them, TFLOP/s)
_KNOWN = {
    "rtx-3060": (12288, 25.5),
    "rtx-4070": (12282, 58.3),
    "rtx-5070": (12227, 61.7),
    "rtx-4060-ti-16gb": (16380, 44.1),
    "rtx-4080": (16376, 97.5),
    "rtx-5070-ti": (16303, 87.9),
    "rtx-5080": (16303, 112.6),
    "rtx-3090": (24576, 71.2),
    "rtx-4090": (24564, 165.2),
    "a10": (23028, 125.0),
    "l4": (23034, 60.5),
    "rtx-5090": (32607, 209.5),
    "l40s": (46068, 181.0),
    "a100-40gb": (40960, 312.0),
    "a100-80gb": (81920, 312.0),
    "h100": (81559, 989.0),
    "h200": (143771, 989.0),
}
_NOMINAL = {"rtx-3060": 12, "rtx-4070": 12, "rtx-5070": 12, "rtx-4060-ti-16gb": 16, "rtx-4080": 16, "rtx-5070-ti": 16}
_NOMINAL |= {"rtx-5080": 16, "rtx-3090": 24, "rtx-4090": 24, "a10": 24, "l4": 24, "rtx-5090": 32, "l40s": 48}
_NOMINAL |= {"a100-40gb": 40, "a100-80gb": 80, "h100": 80, "h200": 141}
SIZES = (6, 8, *sorted(set(_NOMINAL.values())))
"""GB that a known card has."""


def read_card(text: str) -> Card:
    """The card that `text` names: "24GB", "24", or a name.

    Raises:
        ConfigError: no such card, or a size that no card has.
    """
    words = re.sub(r"[\s_]+", "-", text.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    if words in _KNOWN:
        mib, rate = _KNOWN[words]
        return Card(name=words, memory=int(mib * 2**20 * _IN_USE), tflops=(rate, rate))
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)-?(gib|gb|g)?", words)
    if size is None or not 1 <= float(size[1]) <= 1024:
        close = difflib.get_close_matches(words, _KNOWN, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"gpu={text!r} is unknown; expected a size such as 24GB, or one of {', '.join(_KNOWN)}{hint}")
    gigabytes = float(size[1])
    rates = [_KNOWN[name][1] for name, nominal in _NOMINAL.items() if nominal == gigabytes]
    return Card(
        name=f"{gigabytes:g}GB",
        memory=int(gigabytes * GIB * _IN_USE),
        tflops=(min(rates), max(rates)) if rates else None,
    )


def card_here() -> Card:
    """The card of this machine, as nvidia-smi tells it.

    Raises:
        ConfigError: there is none, or nvidia-smi cannot be asked.
    """
    command = shutil.which("nvidia-smi")
    said = ""
    if command:
        query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        said = done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
    name, _, mib = said.rpartition(",")
    if not mib.strip().isdigit():
        raise ConfigError("gpu is not given, and nvidia-smi tells of none here; expected a size such as --gpu 24GB")
    memory = int(int(mib) * 2**20 * _IN_USE)
    words = re.sub(r"\s+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    rate = _KNOWN[words][1] if words in _KNOWN else None
    return Card(name=words or "gpu", memory=memory, tflops=None if rate is None else (rate, rate))
