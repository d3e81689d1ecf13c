"""Does a merged model say what the adapter on its base says?

    probes = probe_sequences(tokenizer, config)
    wanted = answers(policy, probes)                 log-probs of texts and of its own greedy continuations
    found = answers(merged, probes, wanted)          of the same tokens
    require_same(compare(wanted, found), dtype)

All is computed in float32, so that what differs is the weights. Float32 weights may differ by the order of additions alone, and
a merge is held to that before it is rounded. What rounding to 16 bits adds is measured on the files as they were written, set
beside what the adapter itself changes, and refused beyond `MOST_MEAN`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_engine.errors import ExportError

EXACT = 1e-4
"""Float32: most nats a token, times max(1, |log-prob|)."""
MOST_MEAN = 0.2
"""16 bits: most nats a token on average. On SmolLM2-135M, a small model that feels rounding most, an adapter that moves tokens by
0.23 to 0.33 nats costs 0.03 to 0.055 in bfloat16 and 0.0015 in float16: four times the worst of these is damage."""
NOTABLE = 0.1
"""Rounding that costs more than this share of what the adapter changes is pointed out."""
GREEDY_TOKENS = 24
_TEXTS = (
    "The Thames flows through London. In 1969, two people walked on the Moon; 3 * 7 = 21.",
    "Why is the sky blue?",
    "def add(a, b):\n    return a + b\n",
)


@dataclass(frozen=True)
class Answers:
    """What a model says of the probes."""

    continuations: list[list[int]]
    """Greedy, of each probe."""
    logps: list[Tensor]
    """(tokens - 1,) of each probe and what was continued there."""
    margins: list[Tensor]
    """(continued,) how far the best token is before the second, at each place that was continued."""


@dataclass(frozen=True)
class Difference:
    """Of two models, over the same tokens, in nats."""

    tokens: int
    mean: float
    max: float
    relative: float
    """Largest of |difference| / max(1, |log-prob|)."""
    greedy: int
    """Tokens that both were asked for."""
    ties: int
    """Continuations that part where the first model's two best tokens are closer than the difference."""
    parted: int
    """Continuations that part elsewhere."""

    def line(self) -> str:
        """For people."""
        greedy = f"the {self.greedy} greedy tokens are the same"
        if self.ties or self.parted:
            greedy = f"greedy tokens part in {self.ties + self.parted} continuations, in {self.ties} of them at a tie"
        return f"{self.tokens} tokens: mean {self.mean:.2e}, largest {self.max:.2e} nats; {greedy}"


def probe_sequences(tokenizer: Any, config: Any) -> list[list[int]]:
    """A few texts as token ids; one as a user's turn where there is a chat template."""
    text_config = config.get_text_config()
    longest = min(64, int(getattr(text_config, "max_position_embeddings", None) or 64) - GREEDY_TOKENS)
    sequences = [list(tokenizer(text).input_ids) for text in _TEXTS]
    if getattr(tokenizer, "chat_template", None):
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": _TEXTS[1]}], tokenize=False, add_generation_prompt=True
        )
        sequences[1] = list(tokenizer(turn, add_special_tokens=False).input_ids)
    usable = [ids[-max(2, longest) :] for ids in sequences]
    return [[token for token in ids if token < text_config.vocab_size] for ids in usable]


def answers(model: Any, probes: Sequence[Sequence[int]], of: Answers | None = None) -> Answers:
    """Greedy continuations by `model`, and its log-probs of the probes with them, or with those of `of`."""
    continuations = [_greedy(model, probe) for probe in probes]
    scored = continuations if of is None else of.continuations
    logps, margins = [], []
    for probe, continuation in zip(probes, scored, strict=True):
        ids = torch.tensor([[*probe, *continuation]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        distribution = logits[0, :-1].float().log_softmax(-1)
        logps.append(distribution.gather(-1, ids[0, 1:, None]).squeeze(-1).cpu())
        best = distribution[len(probe) - 1 :].topk(2).values
        margins.append((best[:, 0] - best[:, 1]).cpu())
    return Answers(continuations=continuations, logps=logps, margins=margins)


def compare(wanted: Answers, found: Answers) -> Difference:
    """`found` against `wanted`, which were asked the same."""
    one, other = torch.cat(wanted.logps), torch.cat(found.logps)
    gaps = (one - other).abs()
    largest = float(gaps.max()) if bool(gaps.isfinite().all()) else float("inf")
    ties = parted = 0
    for first, second, margins in zip(wanted.continuations, found.continuations, wanted.margins, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if place is None:
            parted += len(first) != len(second)
        elif float(margins[place]) <= 2 * largest:
            ties += 1
        else:
            parted += 1
    return Difference(
        tokens=len(gaps),
        mean=float(gaps.mean()) if largest < float("inf") else largest,
        max=largest,
        relative=float((gaps / one.abs().clamp(min=1)).max()) if largest < float("inf") else largest,
        greedy=sum(map(len, wanted.continuations)),
        ties=ties,
        parted=parted,
    )


def require_same(difference: Difference, dtype: torch.dtype) -> None:
    """Raise an `ExportError` unless a model written in `dtype` is the adapted one."""
    if dtype == torch.float32 and difference.relative > EXACT:
        raise ExportError(
            f"the merged model is not the adapted one: {difference.line()}; expected at most "
            f"{EXACT:g} * max(1, |log-prob|) a token: nothing was kept, serve base and adapter as they are"
        )
    if difference.mean > MOST_MEAN:
        raise ExportError(
            f"rounding to {str(dtype).removeprefix('torch.')} changes the merged model: {difference.line()}; expected a mean of at "
            f"most {MOST_MEAN}: nothing was kept, use --dtype float32"
        )
    if difference.parted:
        raise ExportError(
            f"the merged model answers otherwise than the adapted one: {difference.line()}; nothing was kept, use --dtype float32 "
            "or serve base and adapter as they are"
        )


def _greedy(model: Any, probe: Sequence[int]) -> list[int]:
    """The model's likeliest tokens, whatever its generation config says of sampling and penalties."""
    ids = torch.tensor([list(probe)], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0,  # one row: nothing is padded
        )
    return [int(token) for token in output[0, len(probe) :]]
