"""Does what stands in the place of logits answer as the logits would?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dpo_engine.integrations.scored_logits import ScoredLogits
from dpo_engine.ops import linear_logps
from dpo_engine.ops.mean_logits import mean_logits

B, L, D, V = 4, 6, 8, 11


@pytest.fixture(scope="module")
def both() -> tuple[Tensor, ScoredLogits]:
    """Logits, and what stands for them with every position scored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, L, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(V, (B, L), generator=generator)
    logps, extras = linear_logps(hidden, weight, labels, extras=("entropy", "log_sum_squares", "is_top1"))
    stand = ScoredLogits(
        vocabulary=V,
        labels=labels,
        scored=torch.ones_like(labels, dtype=torch.bool),
        token_logps=logps,
        **extras._asdict(),
        mean_logits=mean_logits(hidden, weight),
    )
    return hidden @ weight.T, stand


def nll(logits: Any, labels: Tensor) -> Tensor:
    """As TRL's ORPO and CPO write it."""
    labels = torch.where(torch.arange(L) % 3 == 0, -100, labels)
    return torch.nn.CrossEntropyLoss()(logits[..., :-1, :].contiguous().view(-1, V), labels[..., :-1].reshape(-1))


def wpo(logits: Any, labels: Tensor) -> Tensor:
    """As TRL 1.13 writes it."""
    return torch.logsumexp(2.0 * logits, dim=-1) - 2.0 * torch.logsumexp(logits, dim=-1)


MASK = torch.arange(B * L).view(B, L) % 2 == 0
QUESTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "the mean of all": lambda z, y: z.detach().mean(),
    "the mean over the vocabulary": lambda z, y: z.mean(-1),
    "the sum of all": lambda z, y: z.nansum(),
    "means of masked positions": lambda z, y: z[:2][MASK[:2]].mean(-1).sum(),
    "the mean of a half": lambda z, y: z.chunk(2, dim=0)[1].mean(),
    "rows by index": lambda z, y: z.index_select(0, torch.tensor([2, 0])).mean(-1),
    "rows by list": lambda z, y: z[[3, 1], ...].nansum(),
    "all but the last": lambda z, y: z[..., :-1, :].mean(-1),
    "the last three": lambda z, y: z[:, -3:].mean(-1),
    "how often the label leads": lambda z, y: (z.argmax(dim=-1) == y).sum(),
    "cross-entropy": nll,
    "cross-entropy of flattened positions": lambda z, y: F.cross_entropy(
        torch.flatten(z[:2, :-1], end_dim=1), torch.flatten(y[:2, :-1], end_dim=1), ignore_index=0
    ),
    "the sum of squared probabilities": wpo,
    "the same of log-probs": lambda z, y: torch.logsumexp(2 * F.log_softmax(z, dim=-1), dim=-1),
    "gathered log-probs": lambda z, y: torch.gather(z.log_softmax(-1), dim=2, index=y.unsqueeze(2)).squeeze(2),
    "gathered log-probs of float32": lambda z, y: z.to(torch.float64).log_softmax(-1).gather(2, y.unsqueeze(2)),
    "its shape": lambda z, y: torch.tensor([*z[:, :-1, :].shape, z.size(-1), z.ndim, len(z)]),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_that_of_the_logits(question: str, both: tuple[Tensor, ScoredLogits]) -> None:
    logits, stand = both
    ask = QUESTIONS[question]
    torch.testing.assert_close(ask(stand, stand.labels), ask(logits, stand.labels), check_dtype=False)


@pytest.mark.parametrize(
    "question",
    [
        lambda z: z[..., 0],
        lambda z: z[0, 0, 3],
        lambda z: z[:, :, :4],
        lambda z: z.mean(0),
        lambda z: z.argmax(),
        lambda z: z.view(-1),
        lambda z: z.chunk(2, dim=-1),
        lambda z: z * 0.5,
        lambda z: (2 * z) * 2,
        lambda z: (2 * z).mean(),
        lambda z: z.gather(-1, torch.zeros(B, L, 1, dtype=torch.long)),
        lambda z: torch.softmax(z, -1),
        lambda z: F.cross_entropy(z, torch.zeros(B, L, dtype=torch.long), label_smoothing=0.1),
        lambda z: torch.topk(z, 2),
        lambda z: z.flatten(),
    ],
)
def test_other_questions_are_refused_by_name(question: Any, both: tuple[Tensor, ScoredLogits]) -> None:
    with pytest.raises((TypeError, AttributeError), match=r"did not build|no attribute"):
        question(both[1])


def test_another_label_than_was_scored_is_an_error(both: tuple[Tensor, ScoredLogits]) -> None:
    stand = both[1]
    other = stand.labels.clone()
    other[1, 2] = (other[1, 2] + 1) % V if (other[1, 2] + 1) % V else 1
    with pytest.raises(ValueError, match=r"another label.* at \(1, 2\)"):
        stand.logps_of(other)
    with pytest.raises(ValueError, match="expected"):
        stand.logps_of(other[:, 1:])


def test_a_label_that_trainers_throw_away_costs_nothing_and_gives_nothing(both: tuple[Tensor, ScoredLogits]) -> None:
    stand = both[1]
    asked = torch.where(MASK, stand.labels, 0)
    expected = torch.where(asked == stand.labels, stand.token_logps, 0.0)
    assert torch.equal(stand.logps_of(asked), expected)


def test_a_cross_entropy_over_what_was_not_scored_is_an_error(both: tuple[Tensor, ScoredLogits]) -> None:
    import dataclasses

    stand = dataclasses.replace(both[1], scored=MASK)
    with pytest.raises(ValueError, match="not scored"):
        stand.cross_entropy(stand.labels)


def test_what_was_not_computed_is_not_made_up(both: tuple[Tensor, ScoredLogits]) -> None:
    import dataclasses

    bare = dataclasses.replace(both[1], entropy=None, is_top1=None, mean_logits=None, log_sum_squares=None)
    for ask in (bare.entropies, bare.mean, lambda: bare.argmax(-1), lambda: (2 * bare).logsumexp(-1)):
        with pytest.raises(TypeError, match="this pass did not compute"):
            ask()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mean_of_logits_is_that_of_the_logits(softcap: float | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias, a, b = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((3, 5, 16), (9000, 16), (9000,), (3, 5, 2), (9000, 2))
    )
    z = 0.7 * (hidden.double() @ weight.double().T + a.double() @ b.double().T + bias.double())
    expected = (z if softcap is None else softcap * torch.tanh(z / softcap)).mean(-1) / 1.3
    found = mean_logits(hidden, weight, bias, 0.7, softcap, 1.3, lora=(a, b))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
