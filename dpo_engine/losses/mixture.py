"""What is a weighted sum of methods? A method with all their needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_engine.errors import ConfigError
from dpo_engine.losses.method import Method, Settings
from dpo_engine.losses.parameters import Parameter


def mixture(parts: tuple[tuple[float, Method], ...]) -> Method:
    """`sum_i weight_i * method_i`: the methods' needs together.

    A parameter that is given is every method's that has it; one that is not is each method's own default.

    Raises:
        ConfigError: methods of different data, or two with a running mean.
    """
    methods = [method for _, method in parts]
    name = "+".join(method.name for method in methods)
    kinds = {method.needs for method in methods}
    if len(kinds) > 1:
        given = ", ".join(f"{method.name}: {method.needs.__name__}" for method in methods)
        raise ConfigError(f"method={name!r} mixes methods of different data ({given}); expected methods of one kind")
    moving = [method.name for method in methods if method.moving_reference]
    fixed = [method.name for method in methods if method.needs_reference and not method.moving_reference]
    if moving and fixed:
        raise ConfigError(
            f"method={name!r} mixes {', '.join(moving)}, whose reference moves, with {', '.join(fixed)}, whose reference does not; "
            "expected one or the other"
        )
    with_state = [method for method in methods if method.baseline is not None]
    if len(with_state) > 1:
        raise ConfigError(f"method={name!r} has {len(with_state)} methods with a running mean; expected one at most")
    first = next((method for method in methods if method.needs_reference), methods[0])
    own: dict[str, Parameter] = {}
    for method in [first, *methods]:
        for parameter in method.parameters:
            own.setdefault(parameter.name, parameter)

    def loss(stats: Any, settings: Settings) -> Tensor:
        return torch.stack([weight * method.loss(stats, settings[method.name]) for weight, method in parts]).sum(0)

    def baseline(stats: Any, settings: Settings) -> Tensor:
        method = with_state[0]
        assert method.baseline is not None
        return method.baseline(stats, settings[method.name])

    def sums(stats: Any, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert first.sums is not None
        return first.sums(stats, settings[first.name])

    return _Mixture(
        name=name,
        loss=loss,
        parameters=tuple(own.values()),
        needs=kinds.pop(),
        needs_reference=first.needs_reference,
        public_part=any(method.public_part for method in methods),
        token_kl=any(method.token_kl for method in methods),
        extras=tuple(sorted({extra for method in methods for extra in method.extras})),
        moving_reference=bool(moving),
        mismatched=any(method.mismatched for method in methods),
        whole_step=any(method.whole_step for method in methods),
        baseline=baseline if with_state else None,
        sums=None if first.sums is None else sums,
        reward_per_token=first.reward_per_token,
        parts=parts,
    )


class _Mixture(Method):
    """Each part has settings of its own, beside those that metrics read."""

    def settings(self, config: Any) -> dict[str, Any]:
        return super().settings(config) | {method.name: method.settings(config) for _, method in self.parts}

    def check(self, config: Any) -> None:
        for _, method in self.parts:
            method.check(config)
