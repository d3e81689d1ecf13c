"""How is the fastest backend found that is also right?

    choice = measure(torch.device("cuda"), torch.bfloat16, (8192, 4096, 128256), "frozen")
    record(device, dtype, "frozen", choice)

Every backend that can run here first answers for a few rows, sure ones among them, and what differs from the definition in
float32 by more than rounding explains is out. The others and the bare matrix products take turns, in an order that is
reversed every other round, after a round of warm-up. "tiled" is kept unless another is faster by more than 3 % in all but the
slowest fifth of the rounds: noise must not change the bits of somebody's run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec

import torch
from torch import Tensor

from dpo_engine.errors import BackendError
from dpo_engine.ops.backends import interprets, possible_backends
from dpo_engine.ops.choice import CANDIDATES, UNMEASURED, Choice
from dpo_engine.ops.linear_logps import linear_logps
from dpo_engine.ops.plan import cpu_multiplies_bfloat16

GEMMS = {"no_gradient": 1, "frozen": 2, "trainable": 4}  # products of size 2·N·V·D that each task cannot do without
CHECKED_ROWS = 64
GAIN = 0.03  # what a challenger must win by
_FLOOR = "floor"


def measure(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    task: str,
    *,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    operator: Callable[..., Tensor] = linear_logps,
) -> Choice:
    """Time every backend that can run here against the bare matrix products; pick one.

    Args:
        shape: (N, D, V). The products alone hold an (N, V) tensor.
        task: "no_gradient", "frozen" or "trainable".
        rounds: timed rounds, at least 2.
        clock: seconds; tests bring their own.
        operator: what is called with `backend=...`; tests bring their own.

    Raises:
        BackendError: not even "tiled" runs and is right.
        torch.OutOfMemoryError: the shape is too large for this device.
    """
    n, d, v = shape
    inputs = _inputs(device, dtype, n, d, v, trainable=task == "trainable")
    left_out: dict[str, str] = {}
    cases: dict[str, Callable[[], object]] = {_FLOOR: _bare_products(inputs, task)}
    expected = _answers(inputs.first(CHECKED_ROWS).as_float32(), "reference", task, linear_logps)
    for name, reason in possible_backends(device, dtype).items():
        if name not in CANDIDATES:
            continue
        if name.startswith("triton") and interprets():
            reason = reason or "Triton is interpreted here (TRITON_INTERPRET): its times mean nothing"
        reason = reason or _fault(inputs, expected, name, task, operator)
        if reason:
            left_out[name] = reason
        else:
            cases[name] = lambda name=name: _run(inputs, name, task, operator)  # type: ignore[misc]
    if UNMEASURED in left_out:
        raise BackendError(f'backend "{UNMEASURED}" is wrong or fails on {device}: {left_out[UNMEASURED]}')
    seconds = time_rounds(cases, rounds=rounds, clock=clock, synchronize=_synchronizer(device))
    floor = seconds.pop(_FLOOR)
    return Choice(
        backend=fastest(seconds),
        shape=shape,
        floor_seconds=statistics.median(floor),
        seconds={name: statistics.median(times) for name, times in seconds.items()},
        ratios={name: statistics.median(_over(times, floor)) for name, times in seconds.items()},
        left_out=left_out,
        date=date.today().isoformat(),
    )


def time_rounds(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float],
    synchronize: Callable[[], object],
) -> dict[str, list[float]]:
    """Seconds of every case in every round, after one round that is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-1, rounds):
        for name in list(cases) if number % 2 == 0 else reversed(list(cases)):
            synchronize()
            begin = clock()
            kept = cases[name]()
            synchronize()
            end = clock()
            del kept  # freed after the clock has stopped
            if number >= 0:
                seconds[name].append(end - begin)
    return seconds


def fastest(seconds: Mapping[str, Sequence[float]]) -> str:
    """The challenger with the lowest median of those that beat "tiled" by more than `GAIN` beyond the spread, else "tiled".

    Compared round by round, so that what slows a whole round down cancels; beyond the spread: at the 80th percentile too.
    """
    best, best_ratio = UNMEASURED, math.inf
    for name, times in seconds.items():
        ratios = sorted(_over(times, seconds[UNMEASURED]))
        slow_end = ratios[min(len(ratios) - 1, math.ceil(0.8 * len(ratios)) - 1)]
        if name != UNMEASURED and slow_end < 1 - GAIN and statistics.median(ratios) < best_ratio:
            best, best_ratio = name, statistics.median(ratios)
    return best


def _over(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [mine / its for mine, its in zip(times, others, strict=True)]


# ---- what is run ----


@dataclass(frozen=True)
class _Inputs:
    hidden: Tensor  # (N, D), requires grad
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,)
    upstream: Tensor  # (N,) float32: gradients that differ from row to row, every tenth of them zero

    def first(self, rows: int) -> _Inputs:
        hidden = self.hidden[:rows].detach().requires_grad_()
        return _Inputs(hidden, self.weight, self.labels[:rows], self.upstream[:rows])

    def as_float32(self) -> _Inputs:
        hidden, weight = (x.detach().float().requires_grad_(x.requires_grad) for x in (self.hidden, self.weight))
        return _Inputs(hidden, weight, self.labels, self.upstream)


def _inputs(device: torch.device, dtype: torch.dtype, n: int, d: int, v: int, *, trainable: bool) -> _Inputs:
    """Random, never zeros (they multiply faster); logits of standard deviation 4, and one row in four sure of its label."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # the same numbers on every device; the weight is drawn where it is used, it is large
        hidden = torch.randn(n, d, generator=generator)
        labels = torch.randint(v, (n,), generator=generator)
        upstream = torch.randn(n, generator=generator)
    upstream[::10] = 0.0
    on_device = torch.Generator(device).manual_seed(1)  # of the seed above, rows of both would be the same numbers
    weight = torch.randn(v, d, generator=on_device, device=device, dtype=dtype).mul_(4 / math.sqrt(d))
    hidden, labels, upstream = hidden.to(device, dtype), labels.to(device), upstream.to(device)
    hidden[::4] += weight[labels[::4]]  # its logit grows by |weight row|² = 16
    return _Inputs(hidden.requires_grad_(), weight.requires_grad_(trainable), labels, upstream)


def _run(inputs: _Inputs, backend: str, task: str, operator: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """Log-probs, and the gradients that the task asks for."""
    with torch.set_grad_enabled(task != "no_gradient"):
        logps = operator(inputs.hidden, inputs.weight, inputs.labels, ignore_index=None, backend=backend)
    if task == "no_gradient":
        return (logps,)
    wanted = [inputs.hidden, inputs.weight] if task == "trainable" else [inputs.hidden]
    return (logps.detach(), *torch.autograd.grad(logps, wanted, inputs.upstream))


def _answers(inputs: _Inputs, backend: str, task: str, operator: Callable[..., Tensor]) -> list[Tensor]:
    return [answer.float() for answer in _run(inputs, backend, task, operator)]


def _fault(
    inputs: _Inputs, expected: Sequence[Tensor], backend: str, task: str, operator: Callable[..., Tensor]
) -> str | None:
    """What keeps a backend from being timed: that it fails, or how far it is off."""
    try:
        found = _answers(inputs.first(CHECKED_ROWS), backend, task, operator)
        _synchronizer(inputs.hidden.device)()
    except _failures() as error:
        lines = str(error).splitlines() or [""]
        return f"it failed ({type(error).__name__}: {' '.join(lines[0].split())[:200]})"
    dtype = inputs.hidden.dtype
    rounded = dtype == torch.bfloat16 and inputs.hidden.device.type == "cpu" and cpu_multiplies_bfloat16()
    logps, wanted = found[0], expected[0]
    off = float(((logps - wanted).abs() / (1 + wanted.abs())).max().nan_to_num(nan=math.inf))
    if not off <= (2.0**-6 if rounded else 1e-4):
        return f"it is wrong: a log-prob is off by {off:.1e} of its size"
    for name, gradient, exact in zip(("hidden", "weight"), found[1:], expected[1:], strict=False):
        off = float(((gradient - exact).norm() / exact.norm()).nan_to_num(nan=math.inf))
        if not off <= (1e-4 if dtype == torch.float32 else 2e-2):
            return f"it is wrong: the gradient of {name} is off by {off:.1e} of its norm"
    return None


def _failures() -> tuple[type[Exception], ...]:
    """What is raised where a backend cannot run, does not fit the card, or does not compile."""
    if find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def _bare_products(inputs: _Inputs, task: str) -> Callable[[], object]:
    """The products of the task by the vendor's library, into memory that is there already."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight) if task == "trainable" else None

    def products() -> None:
        for _ in range(2 if d_weight is not None else 1):
            torch.mm(hidden, weight.t(), out=logits)
        if task != "no_gradient":
            torch.mm(logits, weight, out=d_hidden)
        if d_weight is not None:
            torch.mm(logits.t(), hidden, out=d_weight)

    return products


def _synchronizer(device: torch.device) -> Callable[[], object]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
