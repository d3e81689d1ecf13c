"""How do time and size of the reference cache grow with the rows of a data set?

A model so small that a forward is next to nothing, and short rows: what is left is packing, addresses, checksums and the disk.
Building starts from an empty folder every time; reading opens it anew.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Neighbours, time_alternating
from benchmarks.scale.series import Point, Series
from dpo_engine import ReferenceCache, prepare_model
from dpo_engine.batch import Tree


def measure(
    varied: str, values: Sequence[float], fixed: Mapping[str, Any], rounds: int, fitted_from: float
) -> list[Series]:
    """Building and reading caches of all sizes, in turn."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**fixed["model"])).requires_grad_(False).eval()
    layout = prepare_model(model)
    trees = _trees(int(max(values)), fixed, random.Random(0))
    sizes: dict[float, int] = {}
    with tempfile.TemporaryDirectory(prefix="dpo-scale-cache-") as folder:

        def build(rows: int) -> None:
            place = Path(folder) / str(rows)
            shutil.rmtree(place, ignore_errors=True)
            ReferenceCache(place).token_logps(model, trees[:rows], layout=layout, max_tokens=fixed["forest_tokens"])
            sizes[rows] = sum(path.stat().st_size for path in place.rglob("*.sqlite"))

        def read(rows: int) -> None:
            ReferenceCache(Path(folder) / str(rows)).token_logps(
                model, trees[:rows], layout=layout, max_tokens=fixed["forest_tokens"]
            )

        works = {"engine": build, "engine_read": read}  # a size is read after it was built, in either order of turns
        neighbours = Neighbours()  # a round takes minutes: none is taken again
        runs: dict[str, Callable[[int], object]] = {}
        for value in values:
            runs[f"engine {value}"] = lambda _, rows=int(value): build(rows)
        built = time_alternating(runs, rounds=rounds, warmup=0, neighbours=neighbours)
        runs = {f"engine_read {value}": (lambda _, rows=int(value): read(rows)) for value in values}
        timings = built | time_alternating(runs, rounds=rounds, warmup=1, neighbours=neighbours)
    return [
        Series(
            implementation=name,
            disturbed=neighbours.why,
            points=[
                Point(
                    x=value,
                    timing=timings[f"{name} {value}"],
                    seen={
                        "bytes": sizes[int(value)],
                        "bytes_a_row": round(sizes[int(value)] / value, 2),
                        "rows_per_s": round(value / timings[f"{name} {value}"].median),
                    },
                    in_fit=value >= fitted_from,
                )
                for value in values
            ],
        )
        for name in works
    ]


def _trees(count: int, fixed: Mapping[str, Any], draw: random.Random) -> list[Tree]:
    """Pairs of 2 to `longest` tokens each; all different, since equal rows are computed once."""
    vocabulary, longest = fixed["model"]["vocab_size"], fixed["longest"]
    seen: set[tuple[int, ...]] = set()
    trees: list[Tree] = []
    while len(trees) < count:
        prompt, chosen, rejected = (
            [draw.randrange(vocabulary) for _ in range(draw.randint(2, longest))] for _ in range(3)
        )
        key = (*prompt, -1, *chosen, -1, *rejected)
        if key not in seen:
            seen.add(key)
            trees.append(Tree(prompt_ids=prompt, completions=[chosen, rejected]))
    return trees
