"""Which backend was measured to be the fastest for a head of this shape, on this device?

`backend="auto"` asks at every call; `dpo-engine doctor` measures and stores. What is stored counts only for the very
machine, torch, triton and operator it was measured with; without a measurement the answer is "tiled".

The file is `backends.json` in the engine's cache folder. A writer reads it, puts its own entries in and replaces the
whole by one rename, under `flock` where the platform and the file system have it: of two that measure at once, both are
kept, and of the same entry the last one. Without the lock the rename alone holds: a reader sees one whole file or the
other. A process reads it once, so a choice does not change under a running program.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch

from dpo_engine.ops.backends import OPERATOR_VERSION, possible_backends

TASKS = ("no_gradient", "frozen", "trainable")
UNMEASURED = "tiled"
CANDIDATES = ("tiled", "triton", "triton_epilogue")  # the definition is no candidate: it builds the logits
FILE_NAME = "backends.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One measured shape class."""

    backend: str
    """The fastest that is right."""
    shape: tuple[int, int, int]
    """(N, D, V) that was measured."""
    floor_seconds: float
    """The bare matrix products that the task cannot do without."""
    seconds: dict[str, float]
    """Median of every backend that ran and is right."""
    ratios: dict[str, float]
    """Median over rounds of its time over the floor's."""
    left_out: dict[str, str]
    """Why the other backends are not among them."""
    date: str
    """Day of the measurement, as 2026-11-21."""


Entries: TypeAlias = dict[str, Choice]


def choose_backend(device: torch.device, dtype: torch.dtype, hidden_size: int, vocabulary: int, task: str) -> str:
    """The backend that was measured to be the fastest for this device and class of shapes, else "tiled".

    Costs a dictionary look-up after the first call with the same arguments.

    Args:
        dtype: what is multiplied: under autocast, the autocast dtype.
        hidden_size, vocabulary: D and V of the head.
        task: "no_gradient", "frozen" (only the hidden states train) or "trainable" (the weight or the bias does).
    """
    return _choose(device, dtype, hidden_size, vocabulary, task)


def measured(device: torch.device, dtype: torch.dtype, hidden_size: int, vocabulary: int, task: str) -> Choice | None:
    """What `choose_backend` goes by; None where nothing was measured for this device and class of shapes."""
    return _stored().get(machine_name(device), {}).get(shape_class(dtype, hidden_size, vocabulary, task))


@functools.lru_cache(maxsize=1024)
def _choose(device: torch.device, dtype: torch.dtype, hidden_size: int, vocabulary: int, task: str) -> str:
    choice = measured(device, dtype, hidden_size, vocabulary, task)
    if choice is None:
        return UNMEASURED
    # It could run when it was stored, but files can be edited.
    runs = choice.backend in CANDIDATES and possible_backends(device, dtype)[choice.backend] is None
    return choice.backend if runs else UNMEASURED


@functools.cache
def _stored() -> dict[str, Entries]:
    """The file's entries, read once in a process; nothing, and one warning, where it cannot be used."""
    devices, problem = read_choices()
    if problem:
        warnings.warn(f'{problem}; backend="auto" means "tiled": run `dpo-engine doctor` to measure anew', stacklevel=2)
    return devices


def forget_stored() -> None:
    """Read the file anew at the next call."""
    _choose.cache_clear()
    _stored.cache_clear()


def shape_class(dtype: torch.dtype, hidden_size: int, vocabulary: int, task: str) -> str:
    """`bfloat16 D~4096 V~131072 frozen`: D and V to the nearest power of two, so that one measurement serves kin."""
    if task not in TASKS:
        raise ValueError(f"task={task!r}; expected one of {', '.join(TASKS)}")
    d, v = (2 ** round(math.log2(max(size, 1))) for size in (hidden_size, vocabulary))
    return f"{str(dtype).removeprefix('torch.')} D~{d} V~{v} {task}"


def machine_name(device: torch.device) -> str:
    """What a measurement holds for: device, torch, triton and operator. Another of any of them is another machine."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
    else:
        name = f"{device.type}: {cpu_model()}, {cores()} cores"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"{name}; torch {torch.__version__}, triton {triton}, operator {OPERATOR_VERSION}"


def cpu_model() -> str:
    """The CPU's name, as Linux knows it, else as Python does."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the file ----


def cache_folder() -> Path:
    """The folder of everything that the engine keeps between runs: `$DPO_ENGINE_CACHE`, else `~/.cache/dpo-engine`."""
    root = os.environ.get("DPO_ENGINE_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "dpo-engine"


def choices_file() -> Path:
    """Where measurements are kept."""
    return cache_folder() / FILE_NAME


def read_choices() -> tuple[dict[str, Entries], str | None]:
    """Every stored entry by machine and shape class, and what is wrong with the file, if anything is.

    Returns:
        `(entries, None)`; of a file that is not there, no entries; of one that cannot be used, no entries and the reason.
    """
    try:
        path = choices_file()
    except RuntimeError as error:  # no home folder
        return {}, f"the cache folder is not known ({error}); set DPO_ENGINE_CACHE"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, f"{path} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return {}, f"{path} is broken (not JSON)"
    schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
    if schema != SCHEMA:
        return {}, f"{path} is not a file of this version (schema {schema!r} instead of {SCHEMA})"
    try:
        machines = {
            machine: {name: _choice_from(entry) for name, entry in entries.items()}
            for machine, entries in found["machines"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return {}, f"{path} is broken ({type(error).__name__}: {error})"
    return machines, None


def _choice_from(entry: Mapping[str, Any]) -> Choice:
    """An entry of the file; fields that this version does not know are left out."""
    n, d, v = (int(size) for size in entry["shape"])
    return Choice(
        backend=str(entry["backend"]),
        shape=(n, d, v),
        floor_seconds=float(entry["floor_seconds"]),
        seconds={str(name): float(value) for name, value in entry["seconds"].items()},
        ratios={str(name): float(entry["ratios"][name]) for name in entry["seconds"]},
        left_out={str(name): str(why) for name, why in entry["left_out"].items()},
        date=str(entry["date"]),
    )


def record(device: torch.device, dtype: torch.dtype, task: str, choice: Choice) -> str | None:
    """Store `choice` for `device` and the class of its shape, beside what is stored already.

    A file that cannot be used is moved aside to `backends.json.broken`.

    Returns:
        What was wrong with the file that was moved aside; None otherwise.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = choices_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    _, d, v = choice.shape
    with _locked(path.with_name(f".{FILE_NAME}.lock")):
        machines, problem = read_choices()
        if problem:
            os.replace(path, path.with_name(f"{FILE_NAME}.broken"))
        machines.setdefault(machine_name(device), {})[shape_class(dtype, d, v, task)] = choice
        plain = {name: {key: asdict(entry) for key, entry in entries.items()} for name, entries in machines.items()}
        _replace(path, json.dumps({"schema": SCHEMA, "machines": plain}, indent=1, sort_keys=True) + "\n")
    forget_stored()
    return problem


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An advisory lock that the system gives up when its holder dies; nothing where there is none (see above)."""
    with path.open("ab") as file:
        with contextlib.suppress(ImportError, OSError):  # Windows; a file system without locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a reader never meets half a file."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # readable by others, unlike those of tempfile
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
