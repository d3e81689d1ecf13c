"""Do two ranks train as one process does, although neither pairs nor forests can be shared out evenly?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support import trainer_ranks
from support.trainer_ranks import CASES, Run


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    return trainer_ranks.run(tmp_path_factory.mktemp("ranks"), list(CASES))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Run] = {}

    def of(case: str) -> Run:
        if case not in found:
            found[case] = trainer_ranks.train(tmp_path_factory.mktemp("alone"), case, 1)
        return found[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_gradients_losses_and_evaluation_equal_those_of_one_process(
    case: str, two_ranks: dict[str, list[Run]], alone: Any
) -> None:
    one = alone(case)
    for rank in two_ranks[case]:
        assert rank.sharded == case.startswith("fully sharded")
        assert len(rank.gradients) == len(one.gradients) == trainer_ranks.STEPS
        for step, (mine, whole) in enumerate(zip(rank.gradients, one.gradients, strict=True)):
            assert mine.keys() == whole.keys()
            size = torch.stack([g.norm() for g in whole.values()]).norm()
            for name, gradient in whole.items():
                # Adam divides every gradient by its own size, so rounding of the smallest grows from step to step.
                allowed = (1e-4 if step == 0 else 5e-4) * max(gradient.norm().item(), 1e-2 * size.item())
                assert (mine[name] - gradient).norm() <= allowed, (step, name)
        assert rank.losses == pytest.approx(one.losses, rel=1e-5)
        assert rank.margins == pytest.approx(one.margins, rel=1e-4, abs=1e-6)
        assert rank.held_out == pytest.approx(one.held_out, rel=1e-4, abs=1e-6)


def test_the_ranks_of_these_runs_had_unequal_numbers_of_forests(two_ranks: dict[str, list[Run]]) -> None:
    first, second = (run.forests for run in two_ranks["lora"])
    assert any(mine != other for mine, other in zip(first, second, strict=True))
    assert 0 in first + second, "no step was left to a rank without pairs"


def test_replicas_add_up_their_gradients_once_a_step_in_as_many_backwards(two_ranks: dict[str, list[Run]]) -> None:
    for case in ("lora", "full", "bco"):
        first, second = (run.reduced for run in two_ranks[case])
        assert first == second and len(first) == trainer_ranks.STEPS
        assert max(map(len, first)) > 1
        assert all(step[-1] and not any(step[:-1]) for step in first)


def test_ranks_divide_what_the_reference_is_asked_and_read_each_others_part(two_ranks: dict[str, list[Run]]) -> None:
    rows = trainer_ranks.PAIRS + trainer_ranks.HELD_OUT
    for case in ("lora", "bco", "fully sharded lora"):
        first, second = (run.reference for run in two_ranks[case])
        assert first.computed == second.computed == rows and first.reused == second.reused == 0
        assert first.here + second.here == rows and min(first.here, second.here) > 0
