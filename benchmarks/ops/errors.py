"""How far from float64 is what an implementation returns?

The truth comes from the same rounded inputs, slab by slab over the vocabulary, so that no (N, V) array is held. Log-probs
are compared in all rows, the gradient of `hidden` in 64 rows, that of `weight` in 64 words, half of them labels: gradients
are linear in each row's upstream gradient, so one truth serves every case.

The bound beside the error is that of the numeric standard, `b_i = 2**-23 (1 + M_i) max(16 max(1, sqrt(D / 512)), D / 16)`,
with `M_i = max_v |z_iv|`, the least it can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.ops.cases import Answer, Case, Problem, pair_loss

SAMPLE = 64
FAR = 10.0  # times the bound
# What no rounding of the dtype explains: a log-prob off by more units in the last place of the largest logit, or a gradient off by
# a larger part of its norm.
WRONG_UNITS = 4.0
EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
WRONG_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Truth:
    logps: Tensor  # (N,) float64
    bound: Tensor  # (N,) float64
    largest: Tensor  # (N,) float64: the largest |logit|
    rows: Tensor  # (R,)
    words: Tensor  # (K,)
    unit: Tensor  # (R, D): d logp_i / d hidden_i
    slope: Tensor  # (N, K): d logp_i / d z_iv


def truth(problem: Problem, sample: int = SAMPLE) -> Truth:
    """Float64, by two passes over the vocabulary."""
    hidden, weight, labels = problem.hidden.double(), problem.weight, problem.labels
    (n, d), v = hidden.shape, len(weight)
    columns = max(64, (1 << 25) // max(n, d))  # 256 MiB of float64
    running = hidden.new_full((n,), -math.inf)
    largest = hidden.new_zeros(n)
    for first in range(0, v, columns):
        z = hidden @ weight[first : first + columns].double().T
        running = torch.logaddexp(running, z.logsumexp(1))
        largest = torch.maximum(largest, z.abs().amax(1))
    logps = (hidden * weight[labels].double()).sum(1) - running
    rows, others = _spread(n, sample, labels), _spread(v, sample // 2, labels)
    words = torch.cat([labels[rows][: sample // 2], others]).unique()
    unit = weight[labels[rows]].double()
    for first in range(0, v, columns):
        slab = weight[first : first + columns].double()
        unit -= (hidden[rows] @ slab.T - running[rows][:, None]).exp() @ slab
    slope = (labels[:, None] == words).double() - (hidden @ weight[words].double().T - running[:, None]).exp()
    growth = max(16 * max(1.0, math.sqrt(d / 512)), d / 16)
    bound = 2.0**-23 * (1 + largest) * growth
    return Truth(logps=logps, bound=bound, largest=largest, rows=rows, words=words, unit=unit, slope=slope)


def _spread(count: int, sample: int, like: Tensor) -> Tensor:
    """Up to `sample` indices below `count`, the first and the last among them."""
    return torch.linspace(0, count - 1, min(sample, count), device=like.device).long().unique()


def errors(case: Case, answer: Answer, asked: Problem, problem: Problem, exact: Truth) -> dict[str, float | bool | str]:
    """Figures that stand beside the time.

    Args:
        asked: what the implementation was given; its upstream gradients and references count.
        problem: the same with `hidden` and `labels` flat, which `exact` belongs to.

    Returns:
        `logp_max`, `logp_rms` (nats), `logp_over_bound` (the largest share of `b_i`) and `far` (whether that is above
        10), or `loss` (nats) where there is one number only; `d_hidden` and `d_weight` as relative L2 errors. `wrong` says what
        is further off than the dtype's rounding explains; it is missing where nothing is.
    """
    asked = replace(asked, labels=problem.labels)
    found: dict[str, float | bool | str] = {}
    if answer.out.ndim:
        off = (answer.out.double() - exact.logps).abs()
        share = float((off / exact.bound).max())
        found |= {"logp_max": float(off.max()), "logp_rms": float(off.square().mean().sqrt())}
        found |= {"logp_over_bound": share, "far": not share <= FAR}
        units = float((off / (EPSILONS[problem.hidden.dtype] * (1 + exact.largest) + exact.bound)).max())
        wrong = None if units <= WRONG_UNITS else f"log-probs are {units:.2g} times the dtype's rounding off"
    else:
        want = pair_loss(exact.logps, asked) if case.is_loss else exact.logps.sum()
        found["loss"] = float((answer.out.double() - want).abs())
        allowed = WRONG_GRADIENT[problem.hidden.dtype] * max(1.0, float(want.abs()))
        wrong = None if found["loss"] <= allowed else f"the loss is off by {found['loss']:.2g}"
    upstream = _upstream(case, asked, exact)
    if answer.d_hidden is not None:
        flat = answer.d_hidden.flatten(0, -2)
        given = flat[exact.rows if asked.scored is None else asked.scored[exact.rows]]
        found["d_hidden"] = relative(given, upstream[exact.rows, None] * exact.unit)
    if answer.d_weight is not None:
        want = (upstream[:, None] * exact.slope).T @ problem.hidden.double()
        found["d_weight"] = relative(answer.d_weight[exact.words], want)
    for name in ("d_hidden", "d_weight"):
        if name in found and not float(found[name]) <= WRONG_GRADIENT[problem.hidden.dtype]:
            wrong = wrong or f"{name} is off by {found[name]:.2g} of its norm"
    if wrong is not None:
        found["wrong"] = wrong
    return {
        name: value if isinstance(value, str) or math.isfinite(float(value)) else str(value)
        for name, value in found.items()
    }


def _upstream(case: Case, asked: Problem, exact: Truth) -> Tensor:
    """(N,) float64 gradient of what was asked for in each log-prob."""
    if not case.is_loss:
        return asked.upstream.double()
    logps = exact.logps.detach().requires_grad_()
    return torch.autograd.grad(pair_loss(logps, asked), logps)[0]


def relative(given: Tensor, want: Tensor) -> float:
    return float((given.double() - want).norm() / want.norm())
