"""Who computes log-probs, and by which call? One entry each: the engine's backends, the definition, and peers.

To add one, write a function that returns a `Score` and put an entry into `IMPLEMENTATIONS`. A peer is imported where it is
used; what is not installed is "n/a", never an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad
from torch.utils.checkpoint import checkpoint

from benchmarks.ops.cases import CASES, PAIR_LOSS, Case, Problem, Score, Shape, pair_loss
from dpo_engine.errors import BackendError
from dpo_engine.ops import linear_logps, linear_preference_loss

TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, labels) -> (N,)
LARGE_CHUNK = 4096  # rows; Liger's own choice is smaller
TORCH_CHUNK = 512  # rows


class NotAvailable(Exception):
    """An implementation that is not there or does not do what the case asks."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    name: str
    build: Callable[[Case, Shape], Score]
    packages: tuple[str, ...] = ()
    cuda_only: bool = False
    cannot: Mapping[str, str] = field(default_factory=dict)  # case -> why
    adapt: Callable[[Problem], Problem] = lambda problem: problem
    multiplies_given_dtype: bool = True  # False: it looks for the dtype that this machine multiplies fast in
    compiles: bool = False  # for each shape anew, when first called
    note: str | None = None  # where it computes something else

    def score(self, case: Case, shape: Shape) -> Score:
        """What to call for this case.

        Raises:
            NotAvailable: with the reason.
        """
        if case.name in self.cannot:
            raise NotAvailable(self.cannot[case.name])
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise NotAvailable(f"{', '.join(missing)} is not installed")
        if self.cuda_only and shape.device != "cuda":
            raise NotAvailable("its kernels run on CUDA only")
        return self.build(case, shape)


def per_token(token_logps: TokenLogps, case: Case) -> Score:
    """A function of log-probs as a score; for a loss, what everybody writes around it."""

    def score(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
        logps = token_logps(hidden, weight, problem.labels)
        return pair_loss(logps, problem) if case.is_loss else logps

    return score


# ---- the engine ----


def engine(backend: str, case: Case, shape: Shape) -> Score:
    probe = torch.ones(1, 16, dtype=shape.torch_dtype, device=shape.device)
    try:
        engine_logps(probe, probe, torch.zeros(1, dtype=torch.int64, device=shape.device), backend=backend)
    except BackendError as error:
        raise NotAvailable(str(error)) from None
    if not case.is_loss:
        return per_token(partial(engine_logps, backend=backend), case)

    def score(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
        references = problem.reference_chosen, problem.reference_rejected
        return linear_preference_loss(
            hidden, weight, problem.labels, problem.lengths, PAIR_LOSS, *references, backend=backend
        )

    return score


def engine_logps(hidden: Tensor, weight: Tensor, labels: Tensor, *, backend: str) -> Tensor:
    return linear_logps(hidden, weight, labels, ignore_index=None, backend=backend)


# ---- torch alone ----


def definition(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits in the dtype of the inputs, then float32."""
    return linear(hidden, weight).float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def in_float32(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Both inputs are taken to float32 first."""
    return definition(hidden.float(), weight.float(), labels)


def naive_float32(case: Case, shape: Shape) -> Score:
    if shape.dtype == "float32":
        raise NotAvailable("the same as naive")
    return per_token(in_float32, case)


def in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What people write against the peak: rows in chunks, each computed again in the backward pass."""
    parts = zip(hidden.split(TORCH_CHUNK), labels.split(TORCH_CHUNK), strict=True)
    return torch.cat([checkpoint(definition, part, weight, these, use_reentrant=False) for part, these in parts])


def by_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -cross_entropy(linear(hidden, weight).float(), labels, reduction="none")


def compiled(case: Case, shape: Shape) -> Score:
    torch._dynamo.reset()  # or the cache of another shape's graphs runs full
    return per_token(torch.compile(by_cross_entropy, dynamic=False), case)


def torch_linear_cross_entropy(chunked: bool, case: Case, shape: Shape) -> Score:
    needed = (torch.nn, "LinearCrossEntropyOptions") if chunked else (torch.nn.functional, "linear_cross_entropy")
    if not hasattr(*needed):
        raise NotAvailable(f"torch {torch.__version__} has no {needed[1]}")
    function: Any = torch.nn.functional.linear_cross_entropy
    options: dict[str, Any] = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}

    def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -function(hidden, weight, labels, reduction="none", **options)

    return per_token(token_logps, case)


# ---- other packages ----


def trl_chunked(case: Case, shape: Shape) -> Score:
    """The head of TRL's trainers since 1.15; its loss around it is TRL's own sums and ours alike."""
    if importlib.util.find_spec("trl.kernels") is None:
        raise NotAvailable("this trl has no chunked head; 1.15 or newer has")
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, columns, None, 1.0, ())[0]

    return per_token(token_logps, case)


def liger_cross_entropy(reduction: str, large_chunks: bool, case: Case, shape: Shape) -> Score:
    """Liger's fused linear cross-entropy, in chunks of `LARGE_CHUNK` rows or in those that it chooses itself."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    chunks = -(-shape.rows // LARGE_CHUNK)
    budget = (max(1, -(-shape.vocabulary // (shape.hidden * chunks))),) if large_chunks else ()

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        options = (None, None, -100, 0.0, 0.0, reduction, None, False, None, False, False, False, None, None, *budget)
        return -LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *options)[0]

    if reduction == "none":
        return per_token(loss, case)
    return lambda problem, hidden, weight: loss(hidden, weight, problem.labels)


def liger_dpo(case: Case, shape: Shape) -> Score:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    function = LigerFusedLinearDPOLoss(beta=PAIR_LOSS.keywords["beta"], use_ref_model=False)
    return lambda problem, hidden, weight: function(weight, hidden, problem.labels)[0]


def padded(problem: Problem) -> Problem:
    """Pairs as Liger takes them: all chosen, then all rejected, each padded to the longest; no reference."""
    longest = max(problem.lengths)
    order = [*range(0, len(problem.lengths), 2), *range(1, len(problem.lengths), 2)]
    hiddens, labels = problem.hidden.split(problem.lengths), problem.labels.split(problem.lengths)
    rows = [torch.arange(n, device=problem.labels.device) for n in problem.lengths]
    scored = torch.cat([order.index(i) * longest + rows[i] for i in range(len(rows))])
    return replace(
        problem,
        hidden=torch.stack([pad(hiddens[i], (0, 0, 0, longest - len(hiddens[i]))) for i in order]),
        labels=torch.stack([pad(labels[i], (0, longest - len(labels[i])), value=-100) for i in order]),
        reference_chosen=torch.zeros_like(problem.reference_chosen),
        reference_rejected=torch.zeros_like(problem.reference_rejected),
        scored=scored,
    )


def cut_cross_entropy(filtered: bool, case: Case, shape: Shape) -> Score:
    from cut_cross_entropy import linear_cross_entropy

    filters: dict[str, Any] = {} if filtered else {"filter_eps": None}

    def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", **filters).float()

    return per_token(token_logps, case)


def only(case: str, why: str) -> dict[str, str]:
    return {name: why for name in CASES if name != case}


SCALAR = "gives a sum only"
IMPLEMENTATIONS = {
    entry.name: entry
    for entry in (
        *(
            Implementation(name=f"engine {backend}", build=partial(engine, backend), multiplies_given_dtype=False)
            for backend in ("tiled", "triton", "triton_epilogue")
        ),
        Implementation(name="naive", build=lambda case, shape: per_token(definition, case)),
        Implementation(name="naive float32", build=naive_float32, multiplies_given_dtype=False),
        Implementation(
            name="chunked",
            build=lambda case, shape: per_token(in_chunks, case),
            note=f"plain torch, {TORCH_CHUNK} rows at a time under activation checkpointing",
        ),
        Implementation(name="torch.compile", build=compiled, compiles=True),
        Implementation(name="torch lce", build=partial(torch_linear_cross_entropy, False)),
        Implementation(name="torch lce chunked", build=partial(torch_linear_cross_entropy, True)),
        Implementation(name="trl", build=trl_chunked, packages=("trl",)),
        *(
            Implementation(
                name=f"liger{name}",
                build=partial(liger_cross_entropy, "none", large),
                packages=("liger_kernel",),
                cuda_only=True,
                note=f"chunks of up to {LARGE_CHUNK} rows" if large else None,
            )
            for name, large in (("", False), (" large chunks", True))
        ),
        *(
            Implementation(
                name=f"liger sum{name}",
                build=partial(liger_cross_entropy, "sum", large),
                packages=("liger_kernel",),
                cuda_only=True,
                cannot={"no_gradient": SCALAR, "preference_loss": SCALAR},
                adapt=lambda problem: replace(problem, upstream=torch.ones_like(problem.upstream)),
                note="one sum of all log-probs, so that no row can have a gradient of its own",
            )
            for name, large in (("", False), (" large chunks", True))
        ),
        Implementation(
            name="liger dpo",
            build=liger_dpo,
            packages=("liger_kernel",),
            cannot=only("preference_loss", "gives a loss of pairs only"),
            adapt=padded,
            compiles=True,
            note="takes no reference sums: they are 0 here; rows padded to the longest completion",
        ),
        Implementation(
            name="cce",
            build=partial(cut_cross_entropy, True),
            packages=("cut_cross_entropy",),
            cuda_only=True,
            note="leaves small gradients out, as it does by default",
        ),
        Implementation(
            name="cce unfiltered",
            build=partial(cut_cross_entropy, False),
            packages=("cut_cross_entropy",),
            cuda_only=True,
        ),
    )
}


def peer_errors() -> tuple[type[Exception], ...]:
    """What foreign code raises when it cannot do what it was asked."""
    known: tuple[type[Exception], ...] = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        NameError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    )
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        known = (*known, TritonError)
    return known
