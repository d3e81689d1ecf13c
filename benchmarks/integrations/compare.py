"""Did a trainer do the same with `dpo_engine.integrations.trl` as without?

    python -m benchmarks.integrations.compare WITHOUT.pt WITH.pt        prints a JSON object: what differs, and the largest errors

Held to the numeric standard of float32:

- losses of every step: 1e-4, relative where they exceed 1;
- log-probs that are logged (`logps/...`): 1e-5 * max(1, |logp|) in the first step, 1e-4 of it afterwards, when the weights have
  moved by gradients that differ by their rounding;
- every other metric that is logged, the norm of the gradient among them: 1e-4, relative where it exceeds 1;
- each trainable parameter's gradient of the first step: norm of the difference within 1e-4 of its norm, or of 1e-6 of the norm
  of all gradients, whichever is more.

A run with the integration that never called the engine's operator differs too, and so does one without that did.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch

LOSS, METRIC, LOGP, GRADIENT, FLOOR = 1e-4, 1e-4, 1e-5, 1e-4, 1e-6
Run = dict[str, Any]


def compare(without: Run, with_engine: Run) -> dict[str, Any]:
    """What `integrations_case.run` gave for both.

    Returns:
        `differs`: a line for each figure that is further off than allowed. `worst`: the largest error of each kind, as a share
        of what is allowed there, with its name.
    """
    found = [*_numbers(without, with_engine), *_gradients(without["gradients"], with_engine["gradients"])]
    worst: dict[str, tuple[float, str]] = {}
    for kind, name, share, _ in found:
        worst[kind] = max(worst.get(kind, (-1.0, "")), (share, name))
    differs = [f"{name}: {text}" for _, name, share, text in found if not share <= 1]
    differs += _set_up(without, with_engine)
    return {"differs": differs, "worst": {kind: [share, name] for kind, (share, name) in worst.items()}}


def _set_up(without: Run, with_engine: Run) -> list[str]:
    lines = []
    if without["engine_calls"]:
        lines.append(f"engine_calls: {without['engine_calls']} without the integration; expected none")
    if with_engine["engine_calls"] == 0:
        lines.append("engine_calls: none with the integration, which therefore did nothing")
    for what in ("losses", "metrics"):
        mine, its = len(with_engine[what]), len(without[what])
        if mine != its or not mine:
            lines.append(f"{what}: {mine} with the integration, {its} without; expected as many, and some")
    return lines


def _numbers(without: Run, with_engine: Run) -> list[tuple[str, str, float, str]]:
    """Kind, name, error as a share of what is allowed, and both values, of every loss and metric of every step."""
    found = []
    for step, (its, mine) in enumerate(zip(without["losses"], with_engine["losses"], strict=False), 1):
        found.append(_number("loss", f"loss of step {step}", its, mine, LOSS))
    for step, (its, mine) in enumerate(zip(without["metrics"], with_engine["metrics"], strict=False), 1):
        for key in sorted({*its, *mine}):
            logp = "logps/" in key
            allowed = LOGP if logp and step == 1 else METRIC
            kind = "log-prob" if logp else "metric"
            found.append(_number(kind, f"{key} of step {step}", its.get(key), mine.get(key), allowed))
    return found


def _number(kind: str, name: str, its: float | None, mine: float | None, allowed: float) -> tuple[str, str, float, str]:
    text = f"{mine} with the integration, {its} without"
    if its is None or mine is None:
        return kind, name, math.inf, text
    if math.isnan(its) and math.isnan(mine):
        return kind, name, 0.0, text
    error = abs(mine - its)
    return kind, name, error / (allowed * max(1.0, abs(its))), f"{text}, {error:.2e} apart"


def _gradients(
    without: dict[str, torch.Tensor], with_engine: dict[str, torch.Tensor]
) -> list[tuple[str, str, float, str]]:
    if not without:
        return [("gradient", "gradients", math.inf, "no parameter had one without the integration")]
    whole = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in without.values()))
    found = []
    for name in sorted({*without, *with_engine}):
        if name not in without or name not in with_engine:
            text = f"only {'with' if name in with_engine else 'without'} the integration"
            found.append(("gradient", f"gradient of {name}", math.inf, text))
            continue
        its, mine = without[name].double(), with_engine[name].double()
        error, norm = float((mine - its).norm()), float(its.norm())
        share = error / (GRADIENT * max(norm, FLOOR * whole))
        found.append(("gradient", f"gradient of {name}", share, f"{error:.2e} off, where its norm is {norm:.2e}"))
    return found


if __name__ == "__main__":
    print(json.dumps(compare(*(torch.load(path, weights_only=True) for path in sys.argv[1:3]))))
