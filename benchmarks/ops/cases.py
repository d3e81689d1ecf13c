"""What is one operator call asked to do? Inputs, the four cases, and the bare matrix products that bound each from below.

    no_gradient       log-probs                                                                         1 GEMM
    frozen            log-probs, and the gradient of `hidden` for any upstream gradient                 2
    trainable         the same, and the gradient of `weight`                                            4
    preference_loss   the mean DPO loss of pairs whose reference sums are given, both gradients         3

A GEMM is `2 N V D` operations. 4 and 3 count one product that is done twice (the logits again) or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_engine.losses import dpo_loss

PAIR_LOSS = partial(dpo_loss, beta=0.1)


@dataclass(frozen=True, kw_only=True)
class Shape:
    rows: int  # N
    hidden: int  # D
    vocabulary: int  # V
    dtype: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def gemm_flop(self) -> float:
        """Operations of one product."""
        return 2.0 * self.rows * self.hidden * self.vocabulary

    def __str__(self) -> str:
        return f"N={self.rows}, D={self.hidden}, V={self.vocabulary}, {self.dtype}, {self.device}"


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    gemms: tuple[str, ...]  # the products of the floor: "logits", "d_hidden", "d_weight"
    gradients: tuple[str, ...]  # which of "hidden", "weight"
    is_loss: bool = False


CASES = {
    case.name: case
    for case in (
        Case(name="no_gradient", gemms=("logits",), gradients=()),
        Case(name="frozen", gemms=("logits", "d_hidden"), gradients=("hidden",)),
        Case(
            name="trainable",
            gemms=("logits", "logits", "d_hidden", "d_weight"),
            gradients=("hidden", "weight"),
        ),
        Case(
            name="preference_loss",
            gemms=("logits", "d_hidden", "d_weight"),
            gradients=("hidden", "weight"),
            is_loss=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one call. Completions lie one after the other, chosen and rejected in turn."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,)
    upstream: Tensor  # (N,), a tenth of it zero
    lengths: list[int]  # rows of each completion
    reference_chosen: Tensor  # (B,) sums
    reference_rejected: Tensor  # (B,)
    scored: Tensor | None = None  # where the N rows lie in `hidden`, if that is padded


def make_problems(shape: Shape, sets: int) -> list[Problem]:
    """Sets of inputs: logits of standard deviation 4, as of a language model, and upstream gradients that differ from
    row to row. `weight` is common to all: it is far larger than any cache.
    """
    generator = torch.Generator(shape.device).manual_seed(0)
    place: dict[str, Any] = {"generator": generator, "device": shape.device}
    weight = torch.randn(shape.vocabulary, shape.hidden, **place).mul_(4 / shape.hidden**0.5).to(shape.torch_dtype)
    lengths = pair_lengths(shape.rows)
    # The log-sum-exp of V such logits.
    nll = torch.randn(16, shape.vocabulary, **place).mul_(4).logsumexp(1).mean()
    problems = []
    for _ in range(sets):
        upstream = torch.randn(shape.rows, **place)
        upstream[::10] = 0
        hidden = torch.randn(shape.rows, shape.hidden, **place).to(shape.torch_dtype)
        labels = torch.randint(shape.vocabulary, (shape.rows,), **place)
        # Near the policy's own sums, so that no pair's loss is saturated.
        near = (hidden.float() * weight[labels].float()).sum(1) - nll
        reference = torch.stack([part.sum() for part in near.split(lengths)])
        reference += torch.randn(len(lengths), **place) * 10.0
        problems.append(
            Problem(
                hidden=hidden,
                weight=weight,
                labels=labels,
                upstream=upstream,
                lengths=lengths,
                reference_chosen=reference[0::2],
                reference_rejected=reference[1::2],
            )
        )
    return problems


def pair_lengths(rows: int) -> list[int]:
    """Rows of each completion, chosen and rejected in turn: pairs of up to 1024 rows, of different lengths."""
    in_pair = max(2, min(1024, rows // 4))
    lengths: list[int] = []
    while rows - sum(lengths) >= in_pair:
        chosen = max(1, in_pair * (5 + len(lengths) % 4) // 12)
        lengths += [chosen, in_pair - chosen]
    if lengths:
        lengths[-1] += rows - sum(lengths)  # what does not fill a pair
        return lengths
    raise ValueError(f"rows={rows}; expected at least 2, for a chosen and a rejected completion")


def completion_sums(token_logps: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(N,) -> the sums of chosen and of rejected completions, (B,) each."""
    sums = torch.stack([part.sum() for part in token_logps.split(list(lengths))])
    return sums[0::2], sums[1::2]


def pair_loss(token_logps: Tensor, problem: Problem) -> Tensor:
    """() mean DPO loss over pairs, by the engine's own formula."""
    chosen, rejected = completion_sums(token_logps, problem.lengths)
    references = (problem.reference_chosen.to(chosen.dtype), problem.reference_rejected.to(chosen.dtype))
    return PAIR_LOSS(chosen, rejected, *references).mean()


# ---- one call ----

# `(problem, hidden, weight) -> (N,) log-probs`, or `() -> what is to be differentiated`: sum of log-probs or mean loss.
Score = Callable[[Problem, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Answer:
    out: Tensor  # (N,) or ()
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.out, self.d_hidden, self.d_weight) if t is not None)


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Between forward and backward."""

    out: Tensor
    leaves: dict[str, Tensor]
    upstream: Tensor


def forward(case: Case, score: Score, problem: Problem) -> Pending:
    given = {"hidden": problem.hidden, "weight": problem.weight}
    inputs = {name: tensor.detach().requires_grad_(name in case.gradients) for name, tensor in given.items()}
    with torch.set_grad_enabled(bool(case.gradients)):
        out = score(problem, inputs["hidden"], inputs["weight"])
    return Pending(out=out, leaves={name: inputs[name] for name in case.gradients}, upstream=problem.upstream)


def backward(pending: Pending) -> Answer:
    if not pending.leaves:
        return Answer(out=pending.out)
    upstream = pending.upstream.to(pending.out.dtype) if pending.out.ndim else None
    grads = torch.autograd.grad(pending.out, list(pending.leaves.values()), upstream)
    named = {f"d_{name}": grad for name, grad in zip(pending.leaves, grads, strict=True)}
    return Answer(out=pending.out.detach(), **named)


def call(case: Case, score: Score, problem: Problem) -> Answer:
    """Forward, and backward where the case has one."""
    return backward(forward(case, score, problem))


# ---- the floor ----


def bare_gemms(case: Case, problems: Sequence[Problem], dtype: torch.dtype) -> Callable[[int], None]:
    """The case's products by the vendor's library, one after the other, into memory that is there already."""
    weight = problems[0].weight.to(dtype)
    hiddens = [problem.hidden.to(dtype) for problem in problems]
    (n, d), v = hiddens[0].shape, len(weight)
    place: dict[str, Any] = {"dtype": dtype, "device": weight.device}
    many = len(case.gemms) > 1
    logits = torch.empty(n, v, **place)
    # As large as probabilities times an upstream gradient are, and random: zeros would run faster.
    d_logits = torch.randn(n if many else 0, v, **place).mul_(1e-2)
    d_hidden = torch.empty(n if "d_hidden" in case.gemms else 0, d, **place)
    d_weight = torch.empty(v if "d_weight" in case.gemms else 0, d, **place)

    def run(number: int) -> None:
        hidden = hiddens[number % len(hiddens)]
        for product in case.gemms:
            if product == "logits":
                torch.mm(hidden, weight.t(), out=logits)
            elif product == "d_hidden":
                torch.mm(d_logits, weight, out=d_hidden)
            else:
                torch.mm(d_logits.t(), hidden, out=d_weight)

    return run
