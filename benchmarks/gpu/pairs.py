"""How long are the pairs that a card is timed on? Log-normal lengths shaped like three public data sets; random token ids.

What is published and what is assumed stands beside each. Lengths of a pair are drawn independently of each other.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

FIRST_ID = 2  # ids below it are the padding and end tokens of the stand-in tokenizer


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of prompts and completions: `exp(normal(log(median), sigma))`."""

    prompt_median: float
    prompt_sigma: float
    completion_median: float
    completion_sigma: float
    source: str


# Medians: arXiv 2410.20305, table of data sets, "median overall length" l and "median prefix to completion length ratio" q,
# read as prompt = l * q / (1 + q) and one completion = l / (1 + q).
LENGTHS = {
    "hh": Lengths(
        prompt_median=127,
        prompt_sigma=0.75,
        completion_median=59,
        completion_sigma=0.9,
        source="l=186, q=2.15; sigmas: of HH-RLHF harmless-base test, SmolLM2 tokens, first 800 usable pairs (0.75; 0.87, 0.91)",
    ),
    "tldr": Lengths(
        prompt_median=382,
        prompt_sigma=0.35,
        completion_median=34,
        completion_sigma=0.3,
        source="l=416, q=11.14; sigmas assumed: posts and summaries of TL;DR were filtered by length (arXiv 2009.01325)",
    ),
    "ultrafeedback": Lengths(
        prompt_median=121,
        prompt_sigma=0.9,
        completion_median=288,
        completion_sigma=0.7,
        source="l=409, q=0.42; sigmas assumed, as wide as instructions and answers of many kinds",
    ),
}


def draw_pairs(
    lengths: Lengths, count: int, *, vocabulary: int, max_length: int, scale: float = 1.0, seed: int = 0
) -> list[dict[str, Any]]:
    """`count` pairs of random ids in [FIRST_ID, vocabulary), none longer than `max_length`.

    Args:
        scale: multiplies every length, for a trial on a small model.

    Returns:
        For each pair `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """
    draw = random.Random(seed)

    def ids(median: float, sigma: float, most: int) -> list[int]:
        length = round(scale * draw.lognormvariate(math.log(median), sigma))
        return [draw.randrange(FIRST_ID, vocabulary) for _ in range(min(max(length, 2), most))]

    pairs = []
    for _ in range(count):
        prompt = ids(lengths.prompt_median, lengths.prompt_sigma, max_length // 2)
        room = max_length - len(prompt)
        chosen, rejected = (ids(lengths.completion_median, lengths.completion_sigma, room) for _ in range(2))
        pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs
