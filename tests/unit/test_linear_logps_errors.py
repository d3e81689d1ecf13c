"""Does `linear_logps` refuse what it cannot compute, in one line that says what was given and what was expected?"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from dpo_engine.errors import BackendError, EngineError
from dpo_engine.ops import BACKENDS, linear_logps

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def call(**changed: Any) -> torch.Tensor:
    """`linear_logps` on two rows of three features and five words, with some arguments changed."""
    usual = {"hidden": torch.ones(2, 3), "weight": torch.ones(5, 3), "labels": torch.tensor([0, 4])}
    return linear_logps(**{**usual, **changed})


REFUSED = [
    (
        {"hidden": torch.ones(2, 4)},
        r"hidden \(2, 4\), weight \(5, 3\), labels \(2,\) do not fit; expected \(\.\.\., D\), \(V, D\), \(\.\.\.\)",
    ),
    ({"hidden": torch.ones(())}, r"hidden \(\), .* do not fit"),
    ({"weight": torch.ones(3)}, r"weight \(3,\), .* do not fit"),
    ({"weight": torch.ones(3, 5)}, r"weight \(3, 5\), .* do not fit"),
    ({"labels": torch.tensor([0])}, r"labels \(1,\) do not fit"),
    ({"labels": torch.tensor([[0, 1]])}, r"labels \(1, 2\) do not fit"),
    ({"bias": torch.ones(3)}, r"bias \(3,\) does not fit weight \(5, 3\); expected \(V,\)"),
    ({"bias": torch.ones(5, 1)}, r"bias \(5, 1\) does not fit"),
    ({"labels": torch.tensor([0, 5])}, r"label 5 is outside \[0, 5\).*ignore_index=-100"),
    ({"labels": torch.tensor([-1, 0])}, r"label -1 is outside \[0, 5\)"),
    ({"labels": torch.tensor([0, -100]), "ignore_index": -1}, r"label -100 is outside .*ignore_index=-1"),
    ({"labels": torch.tensor([0, -100]), "ignore_index": None}, r"label -100 is outside .*ignore_index=None"),
    ({"labels": torch.tensor([0.0, 1.0])}, r"labels are torch\.float32; expected integer"),
    ({"labels": torch.tensor([True, False])}, r"labels are torch\.bool; expected integer"),
    (
        {"weight": torch.ones(5, 3).bfloat16()},
        r"hidden torch\.float32, weight torch\.bfloat16; outside autocast they must have one dtype",
    ),
    ({"bias": torch.ones(5).double()}, r"bias torch\.float64; outside autocast they must have one dtype"),
    ({"hidden": torch.ones(2, 3).long()}, r"hidden torch\.int64.*expected floating-point"),
    ({"weight": torch.ones(5, 3).long()}, r"weight torch\.int64.*expected floating-point"),
    ({"weight": torch.ones(5, 3, device="meta")}, r"hidden is on cpu, weight on meta; expected one device"),
    ({"softcap": 0.0}, r"softcap=0\.0; expected a positive number, or None"),
    ({"softcap": -30.0}, r"softcap=-30\.0; expected a positive number"),
    ({"softcap": float("inf")}, r"softcap=inf; expected a positive number"),
    ({"softcap": float("nan")}, r"softcap=nan; expected a positive number"),
    ({"logit_scale": float("inf")}, r"logit_scale=inf; expected a finite number"),
    ({"logit_scale": float("nan")}, r"logit_scale=nan; expected a finite number"),
    ({"backend": "cuda"}, r"backend='cuda'; expected one of auto, reference, tiled, triton"),
]


@pytest.mark.parametrize("changed,message", REFUSED)
def test_arguments_that_do_not_fit_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        call(**changed)
    assert str(refusal.value).startswith("linear_logps: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
def test_a_label_outside_the_vocabulary_is_refused_by_every_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=r"label 7 is outside \[0, 5\)"):
        call(labels=torch.tensor([0, 7]), backend=backend)


def test_a_label_that_is_ignored_may_be_anything() -> None:
    assert call(labels=torch.tensor([0, 99]), ignore_index=99).tolist()[1] == 0.0


def test_only_these_backends_are_known() -> None:
    assert BACKENDS == ("auto", "reference", "tiled", "triton", "triton_epilogue")


def test_triton_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else found(name, *a))
    with pytest.raises(
        BackendError, match=r'"triton" was asked for, but triton is not installed; .* use backend="tiled"'
    ):
        call(backend="triton")


@needs_triton
def test_triton_refuses_float64() -> None:
    with pytest.raises(BackendError, match=r'takes no float64; use backend="tiled"'):
        call(hidden=torch.ones(2, 3).double(), weight=torch.ones(5, 3).double(), backend="triton")


@needs_triton
def test_triton_refuses_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(BackendError, match=r'the tensors are on cpu; it needs a CUDA device.*use backend="tiled"'):
        call(backend="triton")


def test_a_backend_that_cannot_run_is_an_error_of_the_engine() -> None:
    """So that the command line prints one line and exits with 2."""
    assert issubclass(BackendError, EngineError) and BackendError.exit_code == 2
