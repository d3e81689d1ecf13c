"""What can stand where a trainer expects logits, when only their answers were computed?

Trainers build (B, L, V) logits and then ask the same few questions of them: the log-prob of each label, an entropy, the mean over
the vocabulary, whether the label leads. `ScoredLogits` holds the answers, one number a position, and answers by the same calls:

    logits[..., :-1, :]   logits[mask]   logits.chunk(2, dim=0)   logits.view(-1, V)   logits.detach()     # other positions
    selective_log_softmax(logits, labels)   entropy_from_logits(logits)   logits.mean(-1)   logits.argmax(-1)
    cross_entropy(logits, labels)   log_softmax(logits, -1).gather(-1, labels)   logsumexp(2 * logits, -1)

It is no tensor, and whatever else it is asked raises a `TypeError` that names the question: nothing is answered by a guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class ScoredLogits:
    """Answers of shape (...) in the place of logits of shape (..., V). A position that was not scored holds zeros."""

    vocabulary: int
    labels: Tensor
    """int64, the token that was scored at each position."""
    scored: Tensor
    """bool, where it was."""
    token_logps: Tensor
    """float32, log-prob of the label; takes a gradient."""
    entropy: Tensor | None = None
    log_sum_squares: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None
    power: int = 1
    """By what the logits were multiplied (2 in `logsumexp(2 * logits)`)."""
    normalised: bool = False
    """Whether they went through a log-softmax."""

    # What a tensor would say of itself.

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.labels.shape, self.vocabulary))

    @property
    def ndim(self) -> int:
        return self.labels.ndim + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.token_logps.dtype

    @property
    def device(self) -> torch.device:
        return self.token_logps.device

    @property
    def requires_grad(self) -> bool:
        return self.token_logps.requires_grad

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return len(self.labels)

    # Other positions of the same.

    def _at(self, choose: Callable[[Tensor], Tensor]) -> ScoredLogits:
        """The same answers at positions that `choose` takes from each."""
        taken: dict[str, Any] = {
            field.name: choose(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **taken)

    def __getitem__(self, key: Any) -> ScoredLogits:
        places = self._without_vocabulary(key if isinstance(key, tuple) else (key,))
        return self._at(lambda answers: answers[places])

    def _without_vocabulary(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """An index of (..., V) as one of (...)."""
        masks = (part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in key)
        takes = sum(0 if part is None or part is Ellipsis else n for part, n in zip(key, masks, strict=True))
        at = next((i for i, part in enumerate(key) if part is Ellipsis), None)
        if at is not None:
            key, takes = key[:at] + (slice(None),) * (self.ndim - takes) + key[at + 1 :], self.ndim
        if takes < self.ndim:
            return key
        return key[:-1] if isinstance(key[-1], slice) and key[-1] == slice(None) else self._refuse(f"logits[{key!r}]")

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[ScoredLogits, ...]:
        return self._parted(lambda answers: answers.chunk(chunks, self._position(dim)))

    def split(self, size: Any, dim: int = 0) -> tuple[ScoredLogits, ...]:
        return self._parted(lambda answers: answers.split(size, self._position(dim)))

    def _parted(self, part: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[ScoredLogits, ...]:
        return tuple(self._at(_nth(part, i)) for i in range(len(part(self.labels))))

    def index_select(self, dim: int, index: Tensor) -> ScoredLogits:
        return self._at(lambda answers: answers.index_select(self._position(dim), index))

    def view(self, *shape: Any) -> ScoredLogits:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes[-1] != self.vocabulary:
            return self._refuse(f"view{tuple(sizes)}")
        return self._at(lambda answers: answers.reshape(sizes[:-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> ScoredLogits:
        last = self._position(end_dim)
        return self._at(lambda answers: answers.flatten(start_dim, last))

    def unsqueeze(self, dim: int) -> ScoredLogits:
        return self._at(lambda answers: answers.unsqueeze(self._position(dim)))

    def _position(self, dim: int) -> int:
        """`dim` of (..., V) as one of (...)."""
        place = dim % self.ndim
        return place if place < self.labels.ndim else self._refuse(f"an operation along the vocabulary (dim={dim})")

    # The same numbers.

    def contiguous(self) -> ScoredLogits:
        return self

    clone = contiguous

    def float(self) -> ScoredLogits:
        return self

    def detach(self) -> ScoredLogits:
        return self._at(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> ScoredLogits:
        """To another device; the answers stay float32, whatever dtype logits would have been cast to."""
        targets = [x.device if isinstance(x, Tensor) else x for x in (*args, kwargs.get("device"))]
        places = [x for x in targets if isinstance(x, (str, int, torch.device)) and not isinstance(x, bool)]
        return self._at(lambda answers: answers.to(places[0])) if places else self

    def __mul__(self, factor: Any) -> ScoredLogits:
        if factor == 2 and self.power == 1:
            return dataclasses.replace(self, power=2)
        return self._refuse(f"a product with {factor!r}")

    __rmul__ = __mul__

    # The questions.

    def logps_of(self, labels: Tensor) -> Tensor:
        """(...) log-probs of `labels`, 0 where nothing was scored.

        Trainers ask for label 0 where they will throw the answer away; there it is 0, unless that is the token that was scored.

        Raises:
            ValueError: a scored position is asked for another label than that (on a GPU, a device assertion).
        """
        self._must_be_plain("log-probs of labels")
        if labels.shape != self.labels.shape:
            raise ValueError(
                f"log-probs of labels {tuple(labels.shape)} were asked of logits {tuple(self.shape)}; "
                f"expected {tuple(self.labels.shape)}"
            )
        known = labels == self.labels
        self._check(~self.scored | known | (labels == 0), "another label than the next token was asked for")
        return torch.where(known, self.token_logps, 0.0)

    def entropies(self) -> Tensor:
        """(...) entropy in nats, without gradient; 0 where nothing was scored."""
        self._must_be_plain("an entropy")
        return self._have(self.entropy, "an entropy")

    def cross_entropy(self, labels: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
        """`torch.nn.functional.cross_entropy`, of positions that were all scored."""
        counts = labels != ignore_index
        self._check(~counts | self.scored, "a cross-entropy counts a position that was not scored")
        self._check(~counts | (labels == self.labels), "a cross-entropy has another label than the next token")
        losses = torch.where(counts, -self.token_logps, 0.0)
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()

    def log_softmax(self, dim: int = -1, dtype: torch.dtype | None = None) -> ScoredLogits:
        self._along_vocabulary(dim)
        return dataclasses.replace(self, normalised=True)

    def gather(self, dim: int, index: Tensor) -> Tensor:
        """(..., 1) log-probs, after a log-softmax."""
        self._along_vocabulary(dim)
        if not self.normalised or index.shape[-1] != 1:
            return self._refuse("single logits")
        return self.logps_of(index.squeeze(-1)).unsqueeze(-1)

    def logsumexp(self, dim: int) -> Tensor:
        """(...) of the log-probs: 0, or `log sum_v p_v**2` after a multiplication by 2.

        Of the log-probs also where the logits themselves are meant: a constant is free in them, and
        `logsumexp(2 z) - 2 logsumexp(z)`, which is what is made of it, does not depend on it.
        """
        self._along_vocabulary(dim)
        if self.power == 1:
            return torch.zeros_like(self.token_logps)
        return self._have(self.log_sum_squares, "a sum of squared probabilities")

    def argmax(self, dim: int | None = None) -> Tensor:
        """(...) the label where no other token has a larger logit, else -1: enough to count how often the label leads."""
        self._along_vocabulary(dim)
        return torch.where(self._have(self.is_top1, "which token leads"), self.labels, -1)

    def mean(self, dim: int | None = None) -> Tensor:
        """() over everything, or (...) over the vocabulary; without gradient."""
        self._must_be_plain("a mean")
        means = self._have(self.mean_logits, "a mean over the vocabulary")
        if dim is None:
            return means.mean()
        self._along_vocabulary(dim)
        return means

    def sum(self) -> Tensor:
        """() over everything, without gradient."""
        return self.mean(-1).sum() * self.vocabulary

    nansum = sum

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer, given = _ANSWERS.get(function), kwargs or {}
        stands = args[0] if args else given.get("input")
        if answer is None or not isinstance(stands, ScoredLogits):
            name = getattr(function, "__name__", function)
            other = next(x for x in (*args, *given.values()) if isinstance(x, ScoredLogits))
            return other._refuse(f"torch's {name}")
        return answer(*args, **given)

    # Saying no.

    def _have(self, answers: Tensor | None, what: str) -> Tensor:
        if answers is None:
            return self._refuse(f"{what}, which this pass did not compute,")
        return answers

    def _must_be_plain(self, what: str) -> None:
        if self.power != 1:
            self._refuse(f"{what} of multiplied logits")

    def _along_vocabulary(self, dim: int | None) -> None:
        if dim is None or dim % self.ndim != self.ndim - 1:
            self._refuse(f"a reduction along dim={dim}")

    def _check(self, holds: Tensor, otherwise: str) -> None:
        if holds.device.type != "cpu":
            torch._assert_async(holds.all())
        elif not bool(holds.all()):
            at = tuple(int(i) for i in (~holds).nonzero()[0])
            raise ValueError(
                f"{otherwise} at {at}; call dpo_engine's uninstall() and report this with the trainer's version"
            )

    def _refuse(self, what: str) -> Any:
        raise TypeError(
            f"{what} was asked of logits {tuple(self.shape)} that dpo_engine did not build; "
            "call uninstall() for code that needs the logits themselves"
        )


def _nth(part: Callable[[Tensor], tuple[Tensor, ...]], i: int) -> Callable[[Tensor], Tensor]:
    return lambda answers: part(answers)[i]


def _cross_entropy(
    logits: ScoredLogits,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if weight is not None or size_average is not None or reduce is not None or label_smoothing:
        return logits._refuse("a weighted or smoothed cross-entropy")
    return logits.cross_entropy(target, ignore_index, reduction)


def _log_softmax(logits: ScoredLogits, dim: int = -1, *_: Any, **__: Any) -> ScoredLogits:
    return logits.log_softmax(dim)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    F.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    torch.logsumexp: ScoredLogits.logsumexp,
    torch.gather: ScoredLogits.gather,
    torch.flatten: ScoredLogits.flatten,
    torch.chunk: ScoredLogits.chunk,
    torch.mul: ScoredLogits.__mul__,
}
