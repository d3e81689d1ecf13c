"""`dpo-engine doctor`: what can this machine run, how fast, and what is missing?

It measures the backends of the operator beside the bare matrix products, stores which is fastest (`backend: auto` reads
that), and prints what a bug report should hold.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dpo_engine.cli.machine import fact_lines, facts, file_state
from dpo_engine.errors import BackendError, ConfigError
from dpo_engine.model.loading import check_model, resolve_dtype, resolve_model
from dpo_engine.ops.backends import card_lines, possible_backends
from dpo_engine.ops.choice import TASKS, Choice, choices_file, cores, machine_name, read_choices, record, shape_class
from dpo_engine.ops.measure import measure

SCHEMA = 1
Say = Callable[[str], None]
Shape = tuple[int, int, int]

DEFAULT_SECONDS = 30.0  # after which no further one of the CPU's shapes is begun
# Heads of common models: what is measured where neither a model nor a shape is given.
CPU_SHAPES = ((256, 576, 49152), (128, 2048, 32000))
GPU_SHAPES = ((8192, 4096, 128256), (8192, 2304, 256000), (8192, 2048, 128256), (8192, 1024, 151936))


def doctor_command(
    *,
    model: str | None,
    shape: str | None,
    dtype: str,
    quick: bool,
    as_json: bool,
    measure: Callable[..., Choice] = measure,
) -> int:
    """Print the report; measure and store unless `quick`.

    With `as_json` what is meant for people goes to stderr, and the last line of stdout is one JSON object.

    Args:
        model: measure its head's shape.
        shape: measure "N,D,V".
        dtype: as for training.
        measure: what takes a measurement; tests bring their own.

    Returns:
        The exit code: 1 where the operator itself is wrong here, else 0.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    resolved = resolve_dtype(dtype)
    shapes = _shapes(model, shape, device)
    report: dict[str, Any] = {"schema": SCHEMA} | facts(device, resolved)
    for line in fact_lines(report):
        say(line)
    say("")
    say(f"operator on {device} in {_name(resolved)}, as a multiple of the bare matrix products:")
    if not quick and (busy := _busy()):
        say(f"  note: {busy}")
    seconds = DEFAULT_SECONDS if model is None and shape is None and device.type == "cpu" else None
    failures = [] if quick else list(_measure_all(device, resolved, shapes, measure, say, seconds))
    stored = read_choices()[0].get(machine_name(device), {})
    if quick:
        for name, choice in stored.items():
            say(f"  {_choice_line(name, choice)}, on {choice.date}")
    if not stored:
        say('  nothing was measured on this machine yet: backend "auto" means "tiled"; leave --quick out to measure')
    report["not_measured"] = [{"what": what, "why": " ".join(str(error).split())} for what, error in failures]
    report["measured"] = [{"class": name, **asdict(choice)} for name, choice in stored.items()]
    report["choices_file"]["state"] = file_state()
    say(f"choices are kept in {report['choices_file']['path']}: {report['choices_file']['state']}")
    say("")
    say("cards (Triton backends; the backend tiled needs none of this)")
    for line in card_lines():
        say(f"  {line}")
    if as_json:
        print(json.dumps(report))
    return 1 if any(isinstance(error, BackendError) for _, error in failures) else 0


# ---- what is measured ----


def _shapes(model: str | None, shape: str | None, device: torch.device) -> tuple[Shape, ...]:
    """What to measure: the given shape, the model's head, or common heads."""
    rows = 8192 if device.type == "cuda" else 512
    if model is not None and shape is not None:
        raise ConfigError("both --model and --shape are given; expected one of them")
    if shape is not None:
        sizes = shape.split(",")
        if len(sizes) != 3 or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
            raise ConfigError(f"shape={shape!r}; expected three numbers above 0, N,D,V: --shape 2048,576,49152")
        n, d, v = map(int, sizes)
        return ((n, d, v),)
    if model is not None:
        return ((rows, *_head_shape(model)),)
    return GPU_SHAPES if device.type == "cuda" else CPU_SHAPES


def _head_shape(model: str) -> tuple[int, int]:
    """(D, V) of a model's head, from its config alone."""
    from transformers import AutoModelForCausalLM

    from dpo_engine.model.head import head_of

    config = check_model(resolve_model(model, progress=lambda line: print(line, file=sys.stderr)))
    with torch.device("meta"):
        vocabulary, hidden_size = head_of(AutoModelForCausalLM.from_config(config)).shape
    return hidden_size, vocabulary


def _measure_all(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[Shape],
    measure: Callable[..., Choice],
    say: Say,
    seconds: float | None,
) -> Iterator[tuple[str, Exception]]:
    """Measure and store every shape and task; yields what could not be, and why. None is begun after `seconds`."""
    begin = time.perf_counter()
    for shape in shapes:
        for task in TASKS:
            what = f"{task}, {_name(dtype)}, N={shape[0]} D={shape[1]} V={shape[2]}"
            try:
                if seconds is not None and time.perf_counter() - begin > seconds:
                    raise TimeoutError(
                        f"{seconds:.0f} s have passed; name it to measure it: --shape {','.join(map(str, shape))}"
                    )
                choice = measure(device, dtype, shape, task, rounds=7 if device.type == "cuda" else 3)
                problem = record(device, dtype, task, choice)
            except (BackendError, torch.OutOfMemoryError, OSError) as error:
                say(f"  {what}: not measured: {' '.join(str(error).split())}")
                yield what, error
                continue
            say(f"  {_choice_line(shape_class(dtype, *shape[1:], task), choice)}")
            for name, reason in choice.left_out.items():
                if possible_backends(device, dtype)[name] is None:
                    say(f"    {name} is left out: {reason}")
            if problem:
                say(f"    note: {problem}; it was moved aside to {choices_file()}.broken")


def _busy() -> str | None:
    """A warning where other programs use the cores that are to be timed."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= 0.5 * cores():
        return None
    return f"this machine is busy (load {load:.1f} on {cores()} cores): times and ratios are not to be relied on"


def _choice_line(name: str, choice: Choice) -> str:
    """`frozen, N=512 D=576 V=49152: tiled 1.17 (1.74 s), products alone 1.49 s -> tiled`"""
    dtype, *_, task = name.split()
    n, d, v = choice.shape
    times = ", ".join(
        f"{backend} {choice.ratios[backend]:.2f} ({1e3 * t:.4g} ms)" for backend, t in choice.seconds.items()
    )
    products = f"products alone {1e3 * choice.floor_seconds:.4g} ms"
    return f"{task}, {dtype}, N={n} D={d} V={v}: {times}; {products} -> {choice.backend}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
