"""Which backends can run on a device, and on which cards?

    reference           the definition, which builds the logits          any device
    tiled               plain torch, tile by tile                        any device
    triton              Triton passes between the vendor's products      NVIDIA, compute capability 8.0 and newer, Linux
    triton_epilogue     Triton products that end in those passes         the same

A backend that was forced and cannot run is an error that gives the reason found here; "auto" never picks one.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import torch

NAMES = ("reference", "tiled", "triton", "triton_epilogue")
OPERATOR_VERSION = 2
"""Raised whenever a change may alter which backend is fastest, or the last bits of one: older measurements then no longer count."""

_OLDEST = (8, 0)


@dataclass(frozen=True)
class Card:
    """What is known about one generation of NVIDIA cards."""

    capability: str
    names: str
    refused: str | None = None
    """Why the Triton backends do not run there; None where they do."""
    measured: bool = False
    """Whether any of its cards has run the engine's tests and benchmarks."""


CARDS = (
    Card("7.5 and older", "RTX 20, T4, V100, P100", refused="no bfloat16 matrix units, no asynchronous copies"),
    Card("8.0", "A100, A30"),
    Card("8.6", "RTX 30, A10, A40, RTX A6000"),
    Card("8.9", "RTX 40, L4, L40S, RTX 6000 Ada"),
    Card("9.0", "H100, H200, GH200"),
    Card("10.0", "B200, GB200"),
    Card("12.0", "RTX 50, RTX PRO 6000 Blackwell"),
)
"""Cards whose kernels are compiled ahead of time by the tests, and those that are refused. Others from 8.0 on are compiled
when first used, and nothing is known about them."""

REFUSED_PLATFORMS = (
    ("ROCm (AMD)", "the kernels' tiles and checks are NVIDIA's; nothing was compiled or tried there"),
    ("Windows", "Triton publishes no build for it; WSL 2 is Linux and works"),
    (
        "drivers older than torch's CUDA",
        "torch itself finds no GPU there; upgrade the driver or install an older torch",
    ),
)
"""(platform, why the Triton backends do not run there)."""


def possible_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For every backend name, None where it can run on `device` in `dtype`, else the reason in a few words."""
    reason = _no_triton(device, dtype)
    return {name: reason if name.startswith("triton") else None for name in NAMES}


def _no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes no {str(dtype).removeprefix('torch.')}"
    if torch.version.hip is not None:
        return f"this torch is built for ROCm {torch.version.hip}, which is refused: {REFUSED_PLATFORMS[0][1]}"
    if sys.platform == "win32":
        return f"Windows is refused: {REFUSED_PLATFORMS[1][1]}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install triton"
    if device.type == "cuda":
        return _too_old(torch.cuda.get_device_capability(device))
    if device.type == "cpu" and interprets():
        return None
    found = f"the tensors are on {device}; it needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    why = None if device.type != "cpu" else why_no_cuda()
    return f"{found}, and {why}" if why else found


def _too_old(capability: tuple[int, int]) -> str | None:
    if capability >= _OLDEST:
        return None
    given = f"compute capability {capability[0]}.{capability[1]}"
    return f"this card has {given}, which is refused: {CARDS[0].refused}; it needs {_OLDEST[0]}.{_OLDEST[1]} or newer"


def interprets() -> bool:
    """Whether Triton runs its kernels as Python (TRITON_INTERPRET=1): on any device, exact, and thousands of times slower."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_no_cuda() -> str | None:
    """Why torch offers no CUDA device, in one line; None where it offers one.

    A driver that is too old shows here only: torch then counts no device, and says why when it is asked to start.
    """
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch (CUDA {torch.version.cuda}) cannot use one: {' '.join(str(error).split())}"
    return f"torch (CUDA {torch.version.cuda}) finds no device"


def card_of(capability: tuple[int, int]) -> Card | None:
    """What is known about cards of this compute capability; None for one that is not in the table."""
    if capability < _OLDEST:
        return CARDS[0]
    return next((card for card in CARDS if card.capability == f"{capability[0]}.{capability[1]}"), None)


def card_lines() -> list[str]:
    """The table of cards and refused platforms, a line each, as `doctor` and the pages print it."""
    lines = []
    for card in CARDS:
        state = f"refused: {card.refused}" if card.refused else "kernels compiled ahead of time in the tests"
        if not card.refused:
            state += "; measured" if card.measured else "; never measured"
        lines.append(f"compute capability {card.capability:14s} {card.names:32s} {state}")
    lines.append("others from 8.0 on: compiled when first used; never measured")
    return [*lines, *(f"{platform}: refused: {why}" for platform, why in REFUSED_PLATFORMS)]
