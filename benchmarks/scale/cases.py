"""Which sizes are varied, over which values, with what held, and what is claimed of it? One entry each.

Values are at least 16 times apart, and begin where what a call or a step costs in any case is small beside it. `fitted_from`
leaves out of the slope what lies below; it is measured and shown all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.scale.fit import LINEAR, Claim, SameEach
from benchmarks.scale.series import Series

Measure = Callable[..., list[Series]]


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    varies: str  # what x is
    values: tuple[float, ...]
    fixed: Mapping[str, Any]
    module: str  # of benchmarks.scale: who measures it
    claim: Claim | None = None
    says: str = ""  # what to expect, where nothing is claimed
    claimed_of: tuple[str, ...] | None = None  # implementations; None: all of them
    fitted_from: float = 0.0
    most_rounds: int | None = None  # a case that takes long has fewer than others
    smoke_values: tuple[float, ...]
    smoke_fixed: Mapping[str, Any] = field(default_factory=dict)  # over `fixed`


# ---- models ----

STEP_MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TINY_MODEL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# For a few seconds only: no slope means anything at these sizes.
SMOKE_STEP = {"model": TINY_MODEL, "lora_r": 2}

IMPLEMENTATIONS = ("engine_frozen", "engine_trainable", "engine_shared", "engine_packed", "engine", "engine_read")
CASES = {
    case.name: case
    for case in (
        Case(
            name="rows",
            varies="rows N of one linear_logps call",
            # A row tile has 1024 rows: below, the weight is read for fewer rows than it could be.
            values=(256, 512, 1024, 2048, 4096, 8192, 16384),
            fitted_from=1024,
            fixed={"hidden": 512, "vocabulary": 4096},
            module="operator",
            claim=LINEAR,
            smoke_values=(16, 32, 64),
            smoke_fixed={"hidden": 16, "vocabulary": 300},
        ),
        Case(
            name="hidden",
            varies="hidden size D of one linear_logps call",
            # The pass over the logits costs the same whatever D; at 256 it is about a tenth of the products.
            values=(256, 512, 1024, 2048, 4096),
            fixed={"rows": 1024, "vocabulary": 8192},
            module="operator",
            claim=LINEAR,
            smoke_values=(16, 32, 64),
            smoke_fixed={"rows": 32, "vocabulary": 300},
        ),
        Case(
            name="vocabulary",
            varies="vocabulary V of one linear_logps call",
            # A slab has 2048 words; the smallest V has four.
            values=(8192, 16384, 32768, 65536, 131072),
            fixed={"rows": 1024, "hidden": 256},
            module="operator",
            claim=LINEAR,
            smoke_values=(300, 600, 1200),
            smoke_fixed={"rows": 32, "hidden": 16},
        ),
        Case(
            name="length",
            varies="tokens of prompt and completion, half of them prompt",
            values=(128, 256, 512, 1024, 2048),
            fixed={"model": STEP_MODEL, "lora_r": 16, "pairs": 2, "forest_tokens": "pair"},
            module="steps",
            says="attention looks at every pair of tokens: above 1 at the long end",
            smoke_values=(8, 16, 32),
            smoke_fixed={**SMOKE_STEP, "pairs": 2},
        ),
        Case(
            name="shared_tokens",
            varies="computed tokens of a step, all in one forest",
            values=(2, 4, 8, 16, 32),  # pairs
            fixed={"model": STEP_MODEL, "lora_r": 16, "prompt": 96, "completion": 81, "forest_tokens": "step"},
            module="steps",
            claim=LINEAR,
            smoke_values=(1, 2, 4),
            smoke_fixed={**SMOKE_STEP, "prompt": 6, "completion": 4},
        ),
        Case(
            name="pairs",
            varies="pairs of a step, forests of at most 512 tokens",
            values=(4, 8, 16, 32, 64),
            fixed={
                "model": STEP_MODEL,
                "lora_r": 16,
                "prompt": 96,
                "completion": 81,
                "lengths_differ": True,
                "forest_tokens": 512,
            },
            module="steps",
            claim=LINEAR,
            smoke_values=(1, 2, 4),
            smoke_fixed={**SMOKE_STEP, "prompt": 6, "completion": 4, "forest_tokens": 40},
        ),
        Case(
            name="prompt_share",
            varies="the prompt's share of prompt and completion",
            values=(0.0, 0.25, 0.5, 0.75, 0.9),
            fixed={"model": STEP_MODEL, "lora_r": 16, "pairs": 4, "completion": 64, "forest_tokens": "pair"},
            module="steps",
            says="time saved by sharing over tokens saved: 1 were tokens all that counts",
            smoke_values=(0.0, 0.5, 0.75),
            smoke_fixed={**SMOKE_STEP, "pairs": 2, "completion": 6},
        ),
        Case(
            name="cache_rows",
            varies="rows whose reference log-probs are kept",
            values=(1_000, 10_000, 100_000),
            fixed={"model": TINY_MODEL, "forest_tokens": 512, "longest": 6},
            module="cache_rows",
            claim=SameEach(text="a row of 100 000 costs within 10 % of one of 10 000", bound=0.10),
            most_rounds=2,
            smoke_values=(30, 60, 120),
        ),
    )
}
