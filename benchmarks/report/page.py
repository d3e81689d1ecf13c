"""What does the page of a machine's results hold? Sections of pictures and tables as one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import cache, charts, gpu, memory, ops, scale, steps
from benchmarks.report.charts import Picture
from benchmarks.report.results import SUITES, Found, Results, Source, sources_of
from benchmarks.report.tables import Table, trimmed
from dpo_engine.errors import ConfigError

TEMPLATE = Path(__file__).with_name("page.html")
Records = Sequence[Found]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """How the records of a suite are shown."""

    title: str
    lead: str
    """What was measured, and how it is read."""
    tables: Callable[[Records], list[Table]]
    pictures: Callable[[Records], list[Picture]]


SHOWN = {
    "ops": Suite(
        title="The operator",
        lead="Time of one call as a multiple of the bare matrix products that it cannot do without, round by round in one run; its "
        "error against float64 from the same inputs; and what it takes beyond inputs and results. A fast answer that is far "
        "from float64 is marked as wrong.",
        tables=ops.tables,
        pictures=charts.time_over_floor,
    ),
    "steps": Suite(
        title="Training steps",
        lead="Whole optimiser steps on the same pairs in the same order, each row in a process of its own. Multiples are of TRL at "
        "its best setting in the same run, round by round.",
        tables=steps.tables,
        pictures=charts.pairs_per_second,
    ),
    "memory": Suite(
        title="Memory",
        lead="Peak resident memory, each figure from a fresh process: of one call of the operator by vocabulary, and of one "
        "optimiser step by part.",
        tables=memory.tables,
        pictures=charts.memory_by_vocabulary,
    ),
    "cache": Suite(
        title="The reference cache",
        lead="What writing, reading and filling it costs, and what a sweep of betas saves.",
        tables=cache.tables,
        pictures=lambda found: [],
    ),
    "scale": Suite(
        title="How cost grows",
        lead="A slope of 1 on logarithmic axes is cost in proportion to size. In brackets: the least and the largest slope of the "
        "rounds.",
        tables=scale.tables,
        pictures=charts.growth,
    ),
}
assert tuple(SHOWN) == SUITES


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    lead: str
    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    missing: str | None = None
    """The command that would measure it; None where it was measured."""


def sections(results: Results, parts: Mapping[tuple[str, str], gpu.Part]) -> list[Section]:
    """Every suite, measured or not, and the GPU."""
    made = []
    for name, suite in SHOWN.items():
        found = results.suites.get(name, ())
        made.append(
            Section(
                name=name,
                title=suite.title,
                lead=suite.lead,
                pictures=tuple(suite.pictures(found)),
                tables=tuple(map(trimmed, suite.tables(found))),
                missing=None if found else f"dpo-engine bench {name}",
            )
        )
    card = Section(
        name="gpu",
        title="On a GPU",
        lead="What a card can show: that the kernels are right on it, how fast they are, and what an 8B model takes.",
        pictures=(charts.planned_memory(parts), *charts.time_over_floor(gpu.operator(parts), "gpu-ops")),
        tables=tuple(map(trimmed, gpu.tables(parts))),
        missing=None if parts else gpu.COMMAND,
    )
    return [*made, card]


def render(made: Sequence[Section], results: Results) -> str:
    """The page as HTML."""
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError("jinja2 is not installed; expected it, for the page; run: pip install jinja2") from error
    found = [of for every in results.suites.values() for of in every]
    newest: Source | None = next(iter(sources_of(found)), None)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = data_uri
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(sections=made, results=results, newest=newest) + "\n"


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
