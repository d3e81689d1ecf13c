"""Is what stands for TRL's chunked log-prob function right in every output and gradient that TRL may ask for?"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

trl_utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed: pip install 'dpo-engine[trl]'")
if not hasattr(trl_utils, "_ChunkedLogProbFunction"):
    pytest.skip("this TRL has no fused head", allow_module_level=True)

from dpo_engine.integrations.trl.fused_head import FusedHead  # noqa: E402

FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
N, D, V = 7, 16, 37


def head(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D)) + (((V,),) if bias else ())
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def by_definition(
    inputs: list[Tensor], targets: Tensor, temperature: float, softcap: float | None, scale: float
) -> dict[str, Tensor]:
    wide = [x.double() for x in inputs]
    z = scale * (wide[0] @ wide[1].T + (wide[2] if len(wide) > 2 else 0))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logps = z.log_softmax(-1)
    return {
        "log_probs": logps.gather(-1, targets[:, None]).squeeze(-1),
        "entropy": -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": (2 * logps).logsumexp(-1).detach(),
        "mean_logits": z.mean(-1).detach(),
        "is_top1": z.argmax(-1) == targets,
    }


def ask(inputs: list[Tensor], targets: Tensor, *rest: Any) -> dict[str, Tensor | None]:
    hidden, weight, bias = (*inputs, None)[:3]
    answer = FusedHead(trl_utils._ChunkedLogProbFunction, FIELDS).apply(hidden, weight, bias, targets, *rest)
    return dict(zip(("log_probs", *FIELDS), answer, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 4.0, 0.5)])
def test_every_output_and_gradient_is_that_of_the_definition(
    bias: bool, temperature: float, softcap: float | None, scale: float
) -> None:
    inputs = head(bias=bias)
    targets = torch.arange(N) * 3
    found = ask(inputs, targets, temperature, 16, softcap, scale, FIELDS)
    expected = by_definition(inputs, targets, temperature, softcap, scale)
    for name, value in expected.items():
        assert found[name] is not None
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 2, N)
    for of in (("log_probs",), ("entropy",), ("log_probs", "entropy")):
        ours = torch.autograd.grad(sum((found[n] * weights).sum() for n in of), inputs, retain_graph=True)  # type: ignore[operator,arg-type]
        true = torch.autograd.grad(sum((expected[n] * weights).sum() for n in of), inputs, retain_graph=True)
        for a, b in zip(ours, true, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_from_the_entropy() -> None:
    hidden, weight = head(bias=False)
    found = ask([hidden, weight.detach()], torch.arange(N), 1.0, 16, None, 1.0, ("entropy",))
    expected = by_definition([hidden, weight.detach()], torch.arange(N), 1.0, None, 1.0)
    (ours,) = torch.autograd.grad(found["entropy"].sum(), hidden)  # type: ignore[union-attr]
    (true,) = torch.autograd.grad(expected["entropy"].sum(), hidden)
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_answered() -> None:
    found = ask(head(), torch.arange(N), 1.0, 16, None, 1.0, ("log_probs", "is_top1"))
    assert [name for name, value in found.items() if value is not None] == ["log_probs", "is_top1"]


def test_no_token_is_no_answer_that_still_trains() -> None:
    hidden, weight = head(bias=False)
    none = hidden[:0]
    found = ask([none, weight], torch.arange(0), 1.0, 16, None, 1.0, FIELDS)
    assert found["log_probs"].shape == (0,)  # type: ignore[union-attr]
    found["log_probs"].sum().backward()  # type: ignore[union-attr]
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


def test_two_dtypes_outside_autocast_are_left_to_trl_and_said() -> None:
    hidden, weight = head(bias=False)
    narrow = weight.detach().bfloat16()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = ask([hidden, narrow], torch.arange(N), 1.0, 16, None, 1.0, ("log_probs",))
    assert any("left to TRL's own operator" in str(warning.message) for warning in seen)
    expected = by_definition([hidden, narrow], torch.arange(N), 1.0, None, 1.0)["log_probs"]
    torch.testing.assert_close(found["log_probs"].double(), expected, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
