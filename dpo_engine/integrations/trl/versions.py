"""Which names of which TRL release are replaced, and by what?

Three eras, of which TRL's own names tell:

    0.19 - 0.28   `concatenated_forward` builds the logits of [chosen, rejected]
    0.29 - 1.14   `_compute_loss` does
    1.14 - 1.16   `_ChunkedLogProbFunction` scores for DPO, KTO, GRPO, RLOO and SFT (1.14: where asked to)

CPO, SimPO and ORPO, and KTO until 1.14, build logits in every era. All names below were looked up in every listed release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_engine.errors import IntegrationError
from dpo_engine.integrations.patches import Place
from dpo_engine.integrations.scoring import Scored


def _nothing(trainer: Any) -> tuple[str, ...]:
    return ()


def _entropy(trainer: Any) -> tuple[str, ...]:
    return ("entropy",)


def _weighting(trainer: Any) -> tuple[str, ...]:
    """WPO weighs pairs by the sum of squared probabilities."""
    return ("log_sum_squares",) if getattr(trainer, "use_weighting", False) else ()


_FUSED_TRAINERS = ("DPO", "KTO", "GRPO", "RLOO", "SFT")
FIRST, LAST = (0, 19), (1, 16)
KNOWN = "0.19 to 0.29 and 1.0 to 1.16"
_LAST_OF_0 = (0, 29)


@dataclass(frozen=True, kw_only=True)
class LogitsMethod:
    """A method of a trainer that asks models for logits and puts only the questions of `ScoredLogits` to them."""

    trainer: str
    place: Place
    extras: Callable[[Any], tuple[str, ...]] = _nothing
    """What it asks beside log-probs, from the trainer."""
    mean_logits: str = "all"
    """At which positions it takes means of logits."""
    of_every_pass: bool = False
    """Whether it asks for extras and means of the reference too, though it drops them."""
    batches: Callable[[dict[str, Any], int], list[Scored]] = lambda batch, padding: []
    """Which tokens its batch says are scored, by the label of those that are not."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is replaced in one TRL release."""

    methods: tuple[LogitsMethod, ...]
    log_softmaxes: tuple[Place, ...]
    """`selective_log_softmax` and its kin, in every module that took their names."""
    flush_left: Place | None = None
    """Where the old DPO trainer lets it be known which tokens are scored."""
    concatenated_inputs: tuple[Place, ...] = ()
    """Where CPO and ORPO do."""
    fused: tuple[Place, ...] = ()
    """`_ChunkedLogProbFunction`, in every module that took its name."""
    fused_fields: tuple[str, ...] = ()
    compaction: Place | None = None
    """What decides whether only scored positions reach the fused head."""
    fused_trainers: tuple[str, ...] = ()
    """Those that score by it."""
    classes: tuple[Place, ...] = ()
    """The trainers' classes where none of their own methods is replaced: they must be TRL's own all the same."""

    def trainers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.fused_trainers, *(method.trainer for method in self.methods))))


def release(version: str) -> Release:
    """What to replace in TRL `version`.

    Raises:
        IntegrationError: it is not known.
    """
    numbers = _numbers(version)
    if numbers is None or not FIRST <= numbers <= LAST or (_LAST_OF_0 < numbers < (1, 0)):
        raise IntegrationError(
            f"TRL {version} is not known; expected {KNOWN}: install one of them, or leave install() out (nothing was changed)"
        )
    fused = numbers >= (1, 15)
    methods: list[LogitsMethod] = []
    if not fused:
        methods += _dpo(numbers) + _kto(numbers)
    methods += _concatenated("CPO", numbers) + _concatenated("ORPO", numbers)
    modules = tuple(dict.fromkeys(method.place.module for method in methods))
    homes = [Place(module, "selective_log_softmax") for module in modules]
    entropy = "selective_log_softmax_and_entropy" if numbers == (1, 14) else "entropy_from_logits"
    homes += [Place(m.place.module, entropy) for m in methods if "entropy" in m.extras(None)]
    return Release(
        methods=tuple(methods),
        log_softmaxes=tuple(dict.fromkeys(homes)),
        flush_left=Place("trl.trainer.dpo_trainer", "flush_left") if numbers < (0, 29) else None,
        concatenated_inputs=tuple(
            Place(m.place.module, f"{m.trainer}Trainer.concatenated_inputs")
            for m in methods
            if m.trainer in ("CPO", "ORPO")
        ),
        fused=_fused(numbers),
        fused_fields=("entropy",) if numbers == (1, 14) else ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        compaction=Place("trl.trainer.utils", "_use_triton") if numbers >= (1, 16) else None,
        fused_trainers=_FUSED_TRAINERS if fused else (),
        classes=tuple(Place(f"trl.trainer.{name.lower()}_trainer", f"{name}Trainer") for name in _FUSED_TRAINERS)
        if fused
        else (),
    )


def _numbers(version: str) -> tuple[int, int] | None:
    """(major, minor) of a release; None for development versions and anything else."""
    parts = version.split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts):
        return None
    return int(parts[0]), int(parts[1])


def _dpo(numbers: tuple[int, int]) -> list[LogitsMethod]:
    module = "trl.trainer.dpo_trainer"
    if numbers < (0, 29):
        return [
            LogitsMethod(
                trainer="DPO",
                place=Place(module, "DPOTrainer.concatenated_forward"),
                extras=_weighting,
                mean_logits="scored",
                of_every_pass=True,
            )
        ]
    return [
        LogitsMethod(
            trainer="DPO",
            place=Place(module, "DPOTrainer._compute_loss"),
            extras=lambda trainer: ("entropy", "is_top1", *_weighting(trainer)),
            mean_logits="scored",
            batches=_by_mask,
        ),
        LogitsMethod(
            trainer="DPO",
            place=Place(module, "DPOTrainer.compute_ref_log_probs"),
            mean_logits="none",
            batches=_by_mask,
        ),
    ]


def _kto(numbers: tuple[int, int]) -> list[LogitsMethod]:
    module = "trl.experimental.kto.kto_trainer" if (0, 26) <= numbers < (1, 8) else "trl.trainer.kto_trainer"
    asks_entropy = numbers >= (1, 8)
    names = ["_compute_kl_logps"]
    names += (
        ["forward", "compute_reference_log_probs"] if numbers < (1, 6) else ["_compute_loss", "compute_ref_log_probs"]
    )
    return [
        LogitsMethod(
            trainer="KTO",
            place=Place(module, f"KTOTrainer.{name}"),
            extras=_entropy if asks_entropy and name == "_compute_loss" else _nothing,
            mean_logits="all" if name in ("forward", "_compute_loss") else "none",
            batches=_by_mask,
        )
        for name in names
    ]


def _concatenated(name: str, numbers: tuple[int, int]) -> list[LogitsMethod]:
    lower = name.lower()
    module = f"trl.trainer.{lower}_trainer" if numbers < (0, 26) else f"trl.experimental.{lower}.{lower}_trainer"
    return [LogitsMethod(trainer=name, place=Place(module, f"{name}Trainer.concatenated_forward"))]


def _fused(numbers: tuple[int, int]) -> tuple[Place, ...]:
    if numbers < (1, 14):
        return ()
    modules = ["utils", "dpo_trainer", "kto_trainer", "grpo_trainer"] if numbers == (1, 14) else ["utils"]
    return tuple(Place(f"trl.trainer.{module}", "_ChunkedLogProbFunction") for module in modules)


def _by_mask(batch: dict[str, Any], padding: int) -> list[Scored]:
    """Batches that carry a completion mask, or labels that are `padding` outside of completions; and those of KTO's KL."""
    found = []
    for kl in ("", "KL_"):
        for ids, mask in (
            (f"{kl}input_ids", f"{kl}completion_mask"),
            (f"{kl}completion_input_ids", f"{kl}completion_mask"),
            (f"{kl}completion_input_ids", f"{kl}completion_labels"),
        ):
            if ids in batch and mask in batch:
                value = batch[mask] != padding if mask.endswith("labels") else batch[mask]
                found.append(Scored(input_ids=batch[ids], mask=value))
                break
    return found
