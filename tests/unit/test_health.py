"""Is a run told of what a rising accuracy hides: once, with what to do, and not where nothing is wrong?"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from dpo_engine.losses import get_method
from dpo_engine.train.health import Health


class Watched(Health):
    def __init__(self, method: str) -> None:
        self.lines: list[str] = []
        super().__init__(get_method(method), self.lines.append)


def steps(
    shift: float | None = 0.0, *, logps: float = -60.0, length: float = 40.0, margins: float = 0.5
) -> dict[str, float]:
    means = {
        "rewards/margins": margins, "rewards/accuracies": 0.8, "lengths/chosen": length, "logps/chosen": logps,
    }  # fmt: skip
    return means if shift is None else means | {"logps/chosen_shift": shift}


# ---- displacement ----


def test_chosen_completions_that_sink_while_margins_grow_are_warned_about_once_with_the_remedy() -> None:
    watched = Watched("dpo")
    for shift in (0.0, -3.0, -30.0, -35.0):
        watched.trained(steps(shift))
    (line,) = watched.lines
    assert "likelihood displacement" in line and "-30.0 nats from the reference's" in line
    assert "rewards/margins 0.500" in line and "method: dpo_nll or dpop, which holds it up" in line
    assert "learning_rate" in line


@pytest.mark.parametrize(
    "means",
    [
        steps(0.0),
        steps(12.0),
        steps(-1.9, length=3.0),  # less than 2 nats, if much per token
        steps(-3.9, length=40.0),  # less than 0.1 a token
        steps(-30.0, margins=0.0),  # no margin has grown: nothing is hidden
        steps(-30.0, margins=-0.2),
        {"loss": 0.4},
        {},
    ],
)
def test_healthy_numbers_and_missing_ones_are_not_warned_about(means: dict[str, float]) -> None:
    watched = Watched("dpo")
    for _ in range(3):
        watched.trained(means)
    assert watched.lines == []


@pytest.mark.parametrize(("shift", "length", "says"), [(-2.1, 3.0, True), (-2.1, 40.0, False), (-4.1, 40.0, True)])
def test_a_fall_is_measured_by_the_length_of_completions(shift: float, length: float, says: bool) -> None:
    watched = Watched("dpo")
    watched.trained(steps(shift, length=length))
    assert bool(watched.lines) == says


def test_without_a_reference_the_runs_own_beginning_is_compared_with_per_token() -> None:
    watched = Watched("simpo")
    watched.trained(steps(None, logps=-60.0, length=40.0))
    watched.trained(steps(None, logps=-120.0, length=80.0))  # longer completions, each token as likely
    watched.trained(steps(None, logps=-75.0, length=40.0))
    assert watched.lines == []
    watched.trained(steps(None, logps=-90.0, length=40.0))
    (line,) = watched.lines
    assert "-30.0 nats from where it was" in line and "(method: simpo+sft)" in line


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("ipo", "method: dpo_nll or dpop,"),
        ("dpo_nll", "method: dpop,"),
        ("dpop", "method: dpo_nll,"),
        ("dpo_nll+dpop", "a larger rpo_alpha or dpop_lambda,"),
        ("plackett_luce", "method: dpo_nll or dpop,"),
        ("cpo", "(method: cpo+sft)"),
        ("dpo+sft", "a larger weight of sft in loss_weights"),
        ("simpo+sft", "a larger weight of sft in loss_weights"),
        ("kto", "a higher desirable_weight"),
    ],
)
def test_the_remedy_is_one_that_the_method_and_its_data_can_take(method: str, remedy: str) -> None:
    watched = Watched(method)
    has_reference = get_method(method).needs_reference
    watched.trained(steps(0.0 if has_reference else None))
    watched.trained(steps(-40.0 if has_reference else None, logps=-100.0))
    (line,) = watched.lines
    assert remedy in line
    if method == "kto":
        assert "method:" not in line  # the others that hold it up need pairs
    assert ("pairs whose completions" in line) == (method != "kto")


# ---- memorisation ----


def trained_to(accuracy: float, method: str = "dpo") -> Watched:
    watched = Watched(method)
    watched.trained(steps() | {"rewards/accuracies": accuracy})
    return watched


def test_rows_learnt_by_heart_are_warned_about_once_with_what_to_do() -> None:
    watched = Watched("dpo")
    watched.judged({"rewards/accuracies": 0.61}, "eval")
    watched.trained(steps() | {"rewards/accuracies": 0.99})
    watched.judged({"rewards/accuracies": 0.62}, "eval")
    watched.judged({"rewards/accuracies": 0.60}, "eval")
    (line,) = watched.lines
    assert "memorisation: accuracy is 99%" in line and "62% on held-out rows, where it began at 61%" in line
    assert "fewer epochs" in line and "a higher beta, label_smoothing (cdpo), or more data" in line


def test_a_first_look_at_held_out_rows_is_compared_with_a_coin_not_with_itself() -> None:
    watched = trained_to(0.99)
    watched.judged({"rewards/accuracies": 0.85}, "eval")
    assert watched.lines == []  # they may have begun at a half
    watched = trained_to(0.99)
    watched.judged({"rewards/accuracies": 0.51}, "eval")
    assert len(watched.lines) == 1 and "where a coin has 50%" in watched.lines[0]


def test_held_out_rows_that_improve_or_are_right_already_are_no_sign_of_it() -> None:
    for first, then in ((0.5, 0.7), (0.96, 0.96), (0.5, 0.53)):
        watched = Watched("dpo")
        watched.judged({"rewards/accuracies": first})
        watched.trained(steps() | {"rewards/accuracies": 0.99})
        watched.judged({"rewards/accuracies": then})
        assert watched.lines == []


def test_rows_that_are_not_learnt_cannot_be_memorised() -> None:
    watched = trained_to(0.9)
    for _ in range(2):
        watched.judged({"rewards/accuracies": 0.5})
    never_trained = Watched("dpo")
    never_trained.judged({"rewards/accuracies": 0.5})
    never_trained.judged({})
    assert watched.lines == never_trained.lines == []


def test_each_set_of_held_out_rows_has_a_beginning_of_its_own() -> None:
    watched = Watched("dpo")
    watched.judged({"rewards/accuracies": 0.5}, "eval_easy")
    watched.judged({"rewards/accuracies": 0.8}, "eval_hard")
    watched.trained(steps() | {"rewards/accuracies": 1.0})
    watched.judged({"rewards/accuracies": 0.81}, "eval_easy")
    assert watched.lines == []
    watched.judged({"rewards/accuracies": 0.81}, "eval_hard")
    assert len(watched.lines) == 1


def test_what_is_advised_to_unpaired_data_is_for_unpaired_data() -> None:
    watched = trained_to(0.99, "kto")
    watched.judged({"rewards/accuracies": 0.5})
    assert "label_smoothing" not in watched.lines[0] and "a higher beta, or more data" in watched.lines[0]


def test_both_may_be_said_of_one_run() -> None:
    watched = Watched("dpo")
    watched.judged({"rewards/accuracies": 0.6})
    watched.trained(steps(-40.0) | {"rewards/accuracies": 0.99})
    watched.judged({"rewards/accuracies": 0.6})
    assert [line.split(":")[0] for line in watched.lines] == ["likelihood displacement", "memorisation"]
