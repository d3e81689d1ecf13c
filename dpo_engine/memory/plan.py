"""Does a run fit a card, with how many tokens, and what is the cheapest change where it does not?

    plan = make_plan(shape, StepSettings(), card)
    plan.fits, plan.max_length, plan.max_tokens_per_forest, plan.change

A forest must hold the largest pair. Of data that was not looked at, that is two completions of `max_length` tokens with no
prompt in common, so `max_length` is half of what fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dpo_engine.errors import ConfigError
from dpo_engine.memory.cards import SIZES, Card, read_card
from dpo_engine.memory.shapes import ModelShape
from dpo_engine.memory.step import MIB, Parts, StepSettings, step_parts

LEAST_LENGTH = 256  # a run that cannot have this is none
MULTIPLE = 64
MOST_TOKENS = 131072
# A pair that speed is told for, and which part of a card's arithmetic training uses: nothing of it is measured.
USUAL_PAIR, USUAL_SCORED = 1024, 512
UTILISATION = (0.25, 0.5)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found."""

    shape: ModelShape
    settings: StepSettings
    card: Card
    fits: bool
    tokens: int
    """Of the forest that `parts` are of: the largest that fits, or where nothing does, the smallest that is of use."""
    max_length: int
    """The largest that is safe, or as it was asked for."""
    is_asked: bool
    safe_length: int
    """The largest that is safe for any pair."""
    largest_pair: int
    """Tokens of the largest pair of the data; 0 where none was looked at."""
    parts: Parts
    change: str | None
    """Where it does not fit: what to change, the cheapest first."""
    pairs_per_s: tuple[float, float] | None
    """By arithmetic, for pairs of `USUAL_PAIR` tokens; None for a card of unknown speed."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "schema": 1,
            "fits": self.fits,
            "model": self.shape.name,
            "gpu": self.card.name,
            "gpu_mb": round(self.card.memory / MIB, 1),
            "peak_mb": round(self.parts.total / MIB, 1),
            "parts": self.parts.in_mb(),
            "max_length": self.max_length if self.fits else None,
            "max_tokens_per_forest": self.tokens if self.fits else None,
            "change": self.change,
            "pairs_per_s": None if self.pairs_per_s is None else [round(rate, 3) for rate in self.pairs_per_s],
            "pairs_per_s_is": f"arithmetic for pairs of {USUAL_PAIR} tokens, not measured",
        }


def make_plan(
    shape: ModelShape,
    settings: StepSettings,
    card: Card,
    *,
    max_length: int | None = None,
    largest_pair: int | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        max_length: as the user wants it; the largest that is safe if not given.
        largest_pair: tokens of the largest pair of the data, where that is known.
    """
    if max_length is not None and max_length > shape.longest:
        raise ConfigError(
            f"max_length={max_length} is beyond the {shape.longest} positions that {shape.name} was made for"
        )
    least = min(LEAST_LENGTH, shape.longest)
    needed = largest_pair or 2 * (max_length or least)
    most = most_tokens(shape, settings, card.memory)
    fits = most >= needed
    safe = min(shape.longest, most // 2 // MULTIPLE * MULTIPLE)
    return Plan(
        shape=shape,
        settings=settings,
        card=card,
        fits=fits,
        tokens=most if fits else needed,
        max_length=max_length or max(safe, least),
        is_asked=max_length is not None,
        safe_length=max(safe, least),
        largest_pair=largest_pair or 0,
        parts=step_parts(shape, settings, most if fits else needed),
        change=None if fits else cheapest_change(shape, settings, card, needed),
        pairs_per_s=pairs_per_s(shape, settings, card),
    )


def most_tokens(shape: ModelShape, settings: StepSettings, memory: int) -> int:
    """The most tokens of a forest whose step stays within `memory` bytes; 0 if not even a few do."""
    low, high = 0, MOST_TOKENS // MULTIPLE
    while low < high:  # memory grows with the tokens
        middle = (low + high + 1) // 2
        if step_parts(shape, settings, middle * MULTIPLE).total <= memory:
            low = middle
        else:
            high = middle - 1
    return low * MULTIPLE


def cheapest_change(shape: ModelShape, settings: StepSettings, card: Card, needed: int) -> str:
    """What would make `needed` tokens fit: one setting, the cheapest first; then several; then fewer tokens; then a card."""
    changes = list(_changes(settings))
    for name, changed in changes:
        if most_tokens(shape, changed, card.memory) >= needed:
            return name
    together, names = settings, []
    for name, _ in changes:
        together = dict(_changes(together)).get(name, together)
        names.append(name)
        if most_tokens(shape, together, card.memory) >= needed:
            return ", ".join(names)
    for kept, said in ((settings, []), (together, names)):
        most = most_tokens(shape, kept, card.memory)
        if most >= 2 * LEAST_LENGTH:
            return ", ".join([*said, f"max_length: {most // 2 // MULTIPLE * MULTIPLE}"])
    larger = [size for size in SIZES if read_card(f"{size}GB").memory > card.memory]
    for kept, said in ((settings, []), (together, names)):
        for size in larger:
            if most_tokens(shape, kept, read_card(f"{size}GB").memory) >= needed:
                return f"a card of {size} GB" + (f", with {', '.join(said)}" if said else "") + "; or a smaller model"
    return "a smaller model: no known card has the memory"


def _changes(settings: StepSettings) -> Iterator[tuple[str, StepSettings]]:
    """Settings that take less memory, by what they cost: nothing, time, and then exactness."""
    if "8bit" not in settings.optimiser and settings.optimiser != "sgd":
        yield "optim: paged_adamw_8bit", replace(settings, optimiser="paged_adamw_8bit")
    if not settings.checkpointing:
        yield "gradient_checkpointing: true", replace(settings, checkpointing=True)
    elif not settings.offload and settings.device == "cuda":
        yield "activation_offload: true", replace(settings, offload=True)
    if not settings.lora_r:
        yield "lora_r: 16", replace(settings, lora_r=16, reference="adapters_off")
    elif settings.weights != "nf4":
        yield "load_in_4bit: true", replace(settings, weights="nf4")
    if settings.lora_r > 8:
        yield "lora_r: 8", replace(settings, lora_r=8)


def pairs_per_s(shape: ModelShape, settings: StepSettings, card: Card) -> tuple[float, float] | None:
    """The order of speed that the card's arithmetic allows, for pairs of `USUAL_PAIR` tokens."""
    if card.tflops is None:
        return None
    layers = 2 * (shape.linear_weights - shape.extra_linear) + 2 * shape.layers * shape.query_width * USUAL_PAIR
    passes = 2 + settings.checkpointing + (not settings.lora_r)  # forward, again, gradients of inputs, of weights
    head = (2 if settings.lora_r else 4) * 2 * shape.embedding * USUAL_SCORED
    work = passes * layers * USUAL_PAIR + head
    slow, fast = (rate * 1e12 * share / work for rate, share in zip(card.tflops, UTILISATION, strict=True))
    return slow, fast
