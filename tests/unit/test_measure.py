"""Does measuring pick the fastest backend that is right, and leave well alone where noise could have decided?

Time is a clock that the tests move: each backend "takes" what the test says, whatever the machine does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_engine.errors import BackendError
from dpo_engine.ops import backends, linear_logps, measure
from dpo_engine.ops.measure import fastest, time_rounds
from dpo_engine.ops.measure import measure as take

CPU = torch.device("cpu")
SHAPE = (80, 24, 130)


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Operator:
    """`linear_logps` by plain torch under every name, each with a duration; `spoil` may change what comes out."""

    def __init__(self, clock: Clock, seconds: dict[str, float], spoil: Callable[..., Tensor] | None = None) -> None:
        self.clock, self.seconds, self.spoil = clock, seconds, spoil

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: None, backend: str) -> Tensor:
        self.clock.now += self.seconds[backend]
        logps = linear_logps(hidden, weight, labels, ignore_index=ignore_index, backend="tiled")
        return self.spoil(backend, logps, hidden, weight) if self.spoil else logps


@pytest.fixture(autouse=True)
def every_backend_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "possible_backends", lambda device, dtype: dict.fromkeys(backends.NAMES))
    monkeypatch.setattr(measure, "interprets", lambda: False)


def taken(seconds: dict[str, float], task: str = "frozen", **more: Any) -> Any:
    clock = Clock()
    spoil = more.pop("spoil", None)
    products = measure._bare_products

    def slow_products(inputs: Any, task: str) -> Callable[[], None]:
        run = products(inputs, task)

        def timed() -> None:
            run()
            clock.now += 2.0

        return timed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_bare_products", slow_products)
        return take(
            CPU, torch.float32, SHAPE, task, clock=clock, operator=Operator(clock, seconds, spoil), rounds=4, **more
        )


@pytest.mark.parametrize("task", ["no_gradient", "frozen", "trainable"])
def test_the_fastest_is_chosen_and_every_time_kept(task: str) -> None:
    choice = taken({"tiled": 3.0, "triton": 2.6, "triton_epilogue": 2.2}, task)
    assert choice.backend == "triton_epilogue"
    assert choice.seconds == pytest.approx({"tiled": 3.0, "triton": 2.6, "triton_epilogue": 2.2})
    assert choice.ratios == pytest.approx({"tiled": 1.5, "triton": 1.3, "triton_epilogue": 1.1})
    assert choice.floor_seconds == pytest.approx(2.0) and choice.shape == SHAPE and choice.left_out == {}


def test_a_gain_within_three_percent_leaves_tiled() -> None:
    assert taken({"tiled": 3.0, "triton": 2.95, "triton_epilogue": 3.5}).backend == "tiled"
    assert taken({"tiled": 3.0, "triton": 2.85, "triton_epilogue": 3.5}).backend == "triton"


def wrong_value(backend: str, logps: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return logps + 0.01 * (backend == "triton")


def wrong_row(backend: str, logps: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return logps + torch.eye(len(logps))[-1] * (float("nan") if backend == "triton" else 0.0)


def wrong_hidden_gradient(backend: str, logps: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return logps if backend != "triton" else logps + 0.01 * (hidden - hidden.detach()).sum(-1)


def wrong_weight_gradient(backend: str, logps: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return logps if backend != "triton" else logps + 0.01 * (weight - weight.detach()).sum()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_value, "a log-prob is off by"),
        (wrong_row, "a log-prob is off by"),
        (wrong_hidden_gradient, "the gradient of hidden is off by"),
        (wrong_weight_gradient, "the gradient of weight is off by"),
    ],
)
def test_a_fast_wrong_backend_is_never_chosen(spoil: Callable[..., Tensor], reason: str) -> None:
    choice = taken({"tiled": 3.0, "triton": 0.1, "triton_epilogue": 2.0}, "trainable", spoil=spoil)
    assert choice.backend == "triton_epilogue"
    assert reason in choice.left_out["triton"] and "triton" not in choice.seconds


def test_a_backend_that_fails_is_left_out_with_its_reason() -> None:
    def fail(backend: str, logps: Tensor, *_: Tensor) -> Tensor:
        if backend != "tiled":
            raise RuntimeError("out of shared memory\nat line 7")
        return logps

    choice = taken({"tiled": 3.0, "triton": 0.1, "triton_epilogue": 0.1}, spoil=fail)
    assert choice.backend == "tiled"
    assert choice.left_out["triton"] == "it failed (RuntimeError: out of shared memory)"


def test_a_kernel_that_does_not_compile_is_left_out() -> None:
    errors = pytest.importorskip("triton.errors")

    def fail(backend: str, logps: Tensor, *_: Tensor) -> Tensor:
        if backend == "triton_epilogue":
            raise errors.TritonError("does not fit")
        return logps

    choice = taken({"tiled": 3.0, "triton": 2.0, "triton_epilogue": 0.1}, spoil=fail)
    assert choice.backend == "triton" and "does not fit" in choice.left_out["triton_epilogue"]


def test_where_even_tiled_is_wrong_nothing_is_measured() -> None:
    with pytest.raises(BackendError, match='"tiled" is wrong or fails on cpu: it is wrong'):
        taken(dict.fromkeys(backends.NAMES, 1.0), spoil=lambda backend, logps, hidden, weight: logps + 1)


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "interprets", lambda: True)
    choice = taken({"tiled": 3.0})
    assert choice.backend == "tiled" and "interpreted" in choice.left_out["triton"]


@pytest.mark.parametrize(
    ("tiled", "triton", "winner"),
    [
        ([1.0] * 5, [0.9] * 5, "triton"),
        ([1.0] * 5, [0.98] * 5, "tiled"),
        ([1.0] * 5, [0.9, 0.9, 0.9, 0.9, 5.0], "triton"),  # one round was disturbed
        ([1.0] * 5, [0.5, 0.5, 0.5, 1.1, 1.2], "tiled"),  # faster in the median, and slower too often
        ([1.0, 4.0, 1.0, 4.0, 1.0], [0.9, 3.6, 0.9, 3.6, 0.9], "triton"),  # whole rounds were slow: their ratio was not
    ],
)
def test_a_challenger_must_win_beyond_the_spread(tiled: Sequence[float], triton: Sequence[float], winner: str) -> None:
    assert fastest({"tiled": tiled, "triton": triton}) == winner


def test_cases_take_turns_in_an_order_that_is_reversed() -> None:
    clock, order = Clock(), []

    def case(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock.now += seconds

        return run

    waits: list[int] = []
    found = time_rounds(
        {"a": case("a", 1.0), "b": case("b", 2.0)}, rounds=2, clock=clock, synchronize=lambda: waits.append(1)
    )
    assert found == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert "".join(order) == "baabba"  # the first two are warm-up
    assert len(waits) == 2 * len(order)


def test_the_real_operator_is_measured_on_this_machine() -> None:
    choice = take(CPU, torch.float32, SHAPE, "trainable", rounds=2)
    assert choice.seconds["tiled"] > 0 and choice.floor_seconds > 0 and choice.ratios["tiled"] > 0


def test_measured_logits_are_those_of_a_language_model() -> None:
    """Of a standard deviation of 4, with one row in four sure of its label; others would time another thing."""
    inputs = measure._inputs(CPU, torch.float32, 64, 256, 4000, trainable=False)
    logits = inputs.hidden.detach() @ inputs.weight.T
    at_label = logits.gather(1, inputs.labels[:, None]).squeeze(1)
    unsure = torch.arange(64) % 4 != 0
    assert logits[unsure].std().item() == pytest.approx(4.0, rel=0.1)
    assert logits[unsure].max() < 6 * 4
    assert at_label[~unsure].mean().item() == pytest.approx(16.0, rel=0.2)
    assert 0 < (inputs.upstream == 0).float().mean() < 0.2
