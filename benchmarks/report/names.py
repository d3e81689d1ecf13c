"""What is each implementation called, in which order do they stand, and which are ours?"""

from __future__ import annotations

from benchmarks.steps.rows import ROWS

OURS = "engine"
TITLES = {
    "floor": "bare matrix products",
    "float32 floor": "bare matrix products, float32",
    "engine": "dpo-engine",
    "engine tiled": "dpo-engine",
    "engine triton": "dpo-engine, Triton",
    "engine triton_epilogue": "dpo-engine, Triton epilogue",
    "naive": "definition, with logits",
    "naive float32": "definition, in float32",
    "chunked": "definition, in chunks",
    "torch.compile": "definition, torch.compile",
    "torch lce": "F.linear_cross_entropy",
    "torch lce chunked": "F.linear_cross_entropy, chunked",
    "trl": "TRL's operator",
    "liger": "Liger",
    "liger large chunks": "Liger, large chunks",
    "liger sum": "Liger, summed",
    "liger sum large chunks": "Liger, summed, large chunks",
    "liger dpo": "Liger, DPO loss",
    "cce": "cut-cross-entropy",
    "cce unfiltered": "cut-cross-entropy, unfiltered",
}
"""Of the operator's implementations."""


def title(implementation: str) -> str:
    """As tables and pictures call an implementation of the operator; its own name where that is not known here."""
    return TITLES.get(implementation, implementation)


def row_title(implementation: str) -> str:
    """As they call a way to train."""
    return ROWS[implementation].title if implementation in ROWS else title(implementation)


def is_ours(implementation: str) -> bool:
    return implementation.startswith(OURS)


def order(implementation: str) -> tuple[int, str]:
    """Sorts implementations of the operator as `TITLES` does, what is not known last."""
    return _place(implementation, list(TITLES))


def row_order(implementation: str) -> tuple[int, str]:
    """Sorts ways to train as the suite `steps` does."""
    return _place(implementation, list(ROWS))


def _place(name: str, names: list[str]) -> tuple[int, str]:
    return (names.index(name) if name in names else len(names), name)
