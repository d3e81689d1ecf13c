"""Which benchmarks does `dpo-engine bench` run? The table of suites; each holds its own table of cases and implementations.

A suite is a package or module with `main(arguments) -> exit status`, run in a process of its own. All take `--smoke` (tiny sizes,
nothing saved unless `--folder` says where), `--no_save`, `--folder`, `--threads`, `--rounds` and `--cases`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One question, and where it is answered."""

    question: str
    module: str
    cases: str
    """`module:NAME` of the table of its cases."""
    implementations: str
    """`module:NAME` of the table of who is measured in them."""
    dtypes: str = "float32"
    takes_data: bool = False
    """Whether it is told of `--data_dir`."""

    def entries(self) -> tuple[Sequence[str], Sequence[str]]:
        """Names of its cases, and of those who are measured in them."""
        (cases, implementations) = (
            getattr(import_module(place.split(":")[0]), place.split(":")[1])
            for place in (self.cases, self.implementations)
        )
        return list(cases), list(implementations)


SUITES: Mapping[str, Suite] = {
    "ops": Suite(
        question="What does each implementation of the operator cost beside the bare matrix products, and how exact is it?",
        module="benchmarks.ops",
        cases="benchmarks.ops.cases:CASES",
        implementations="benchmarks.ops.implementations:IMPLEMENTATIONS",
        dtypes="float32, bfloat16 (float16 by --dtype)",
    ),
    "memory": Suite(
        question="How much memory does a call take as the vocabulary grows, and a training step by part?",
        module="benchmarks.memory",
        cases="benchmarks.memory.run:CASES",
        implementations="benchmarks.memory.run:EVERYBODY",
    ),
    "cache": Suite(
        question="What does the reference cache cost, and what does it save?",
        module="benchmarks.cache",
        cases="benchmarks.cache:CASES",
        implementations="benchmarks.cache:IMPLEMENTATIONS",
    ),
    "scale": Suite(
        question="How does cost grow with rows, widths, lengths, shared prompts, pairs and cached rows?",
        module="benchmarks.scale",
        cases="benchmarks.scale.cases:CASES",
        implementations="benchmarks.scale.cases:IMPLEMENTATIONS",
    ),
    "steps": Suite(
        question="How fast does the engine train beside TRL, one feature at a time, and in how much memory?",
        module="benchmarks.steps",
        cases="benchmarks.steps.rows:DATA_SETS",
        implementations="benchmarks.steps.rows:ROWS",
        dtypes="bfloat16 where the machine multiplies in it, else float32",
        takes_data=True,
    ),
}

# What is done with results; none of it measures anything.
VERBS: Mapping[str, str] = {
    "report": "benchmarks.report",
    "readme": "benchmarks.report.readme",
    "compare": "benchmarks.report.compare",
}
