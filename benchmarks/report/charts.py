"""What is drawn? A picture for each question, as PNG, with a text that says the same in words.

Each function takes records and returns the pictures of one question, none where nothing was measured. How they look: `drawing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import gpu, memory, ops, scale, steps
from benchmarks.report.drawing import (
    ACCENT,
    DASHES,
    GREYS,
    MARKERS,
    SOFT_ACCENT,
    as_png,
    bare_bars,
    end_labels,
    log_ticks,
    look_of,
    new_figure,
    open_frame,
    power_through,
    thousands,
    whisker,
)
from benchmarks.report.names import is_ours, row_title, title
from benchmarks.report.results import Found, Source, sources_of
from benchmarks.report.tables import short
from dpo_engine.memory.cards import read_card
from dpo_engine.memory.shapes import shipped_shape
from dpo_engine.memory.step import StepSettings, step_parts

PLANNED = ("mistral-7b", "llama-3.1-8b")
CARDS = (12, 16, 24)  # GB
LENGTHS = tuple(sorted({2**n * k // 4 for n in range(9, 14) for k in range(4, 9)}))  # 512 to 16384
NOT_MEASURED = f"measured: not measured on any card yet; run: {gpu.COMMAND} PART=memory"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG, and what it shows."""

    name: str
    """Of its file, without the ending."""
    png: bytes
    alt: str
    """Its figures in words."""
    caption: str
    sources: tuple[Source, ...] = ()
    wide: bool = True
    """Whether it has a line of the page for itself."""


def time_over_floor(found: Sequence[Found], name: str = "ops") -> list[Picture]:
    """A picture for each shape, `<name>-1`, ...: bars by case, the floor at 1."""
    return [
        picture
        for place, shape in enumerate(ops.shapes(found))
        if (picture := _bars_over_floor(f"{name}-{place + 1}", shape, ops.by_case(found, shape))) is not None
    ]


def _bars_over_floor(name: str, shape: tuple[Any, ...], cases: Mapping[str, Sequence[Found]]) -> Picture | None:
    shown = {case: [of for of in every if of["implementation"] not in ops.FLOORS] for case, every in cases.items()}
    there = {
        of["implementation"] for every in shown.values() for of in every if of.is_measured and ops.over_floor(of)[0]
    }
    shown = {case: [of for of in every if of["implementation"] in there] for case, every in shown.items()}
    shown = {case: every for case, every in shown.items() if every}
    if not shown:
        return None
    heights = [len(every) + 1.1 for every in shown.values()]
    figure = new_figure(0.27 * sum(heights) + 0.5)
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    longest = max([1.0, *(_ratio(of)["p80"] for every in shown.values() for of in every if _is_quoted(of))])
    said = []
    for axis, (case, every) in zip(axes, shown.items(), strict=True):
        products = ops.products(cases[case])
        words = ops.CASES.get(case, case) + (f", {products}" if products else "")
        axis.set_title(words, loc="left", fontsize=10, fontweight="bold")
        said.append(f"{words}: " + ", ".join(_bar_over_floor(axis, place, of) for place, of in enumerate(every)))
        axis.axvline(1.0, color="black", linewidth=1)
        bare_bars(axis, [title(of["implementation"]) for of in every], [is_ours(of["implementation"]) for of in every])
        axis.set_xlim(0, 1.22 * longest)
    figure.supxlabel("time as a multiple of the bare matrix products; whiskers p20–p80", fontsize=9.5)
    floors = {ops.over_floor(of)[1] for every in shown.values() for of in every if _is_quoted(of)}
    emulated = ", of float32 where bfloat16 is emulated" if "float32 floor" in floors else ""
    return Picture(
        name=name,
        png=as_png(figure),
        alt=f"Time as a multiple of the bare matrix products at {ops.shape_words(shape)}. {'. '.join(said)}.",
        caption=f"Time against the floor at {ops.shape_words(shape)}: shorter is faster, 1 is the bare matrix products{emulated}.",
        sources=sources_of([of for every in cases.values() for of in every]),
    )


def _is_quoted(of: Found) -> bool:
    return of.is_measured and not of.unquotable and not of.wrong and ops.over_floor(of)[0] is not None


def _ratio(of: Found) -> Mapping[str, float]:
    return ops.over_floor(of)[0] or {}


def _bar_over_floor(axis: Any, place: int, of: Found) -> str:
    """Draw one bar, or why there is none; returns it in words."""
    name = title(of["implementation"])
    if not _is_quoted(of):
        why = ops.remark(of) if of.is_measured else of.status
        axis.text(
            0.03,
            place,
            short(why or "no floor", 64),
            va="center",
            fontsize=8,
            color=GREYS[1],
            style="italic",
            backgroundcolor="white",
            zorder=3,
        )
        return f"{name}: {why or 'no floor'}"
    ratio, ours = _ratio(of), is_ours(of["implementation"])
    axis.barh(place, ratio["median"], height=0.68, color=ACCENT if ours else GREYS[2])
    whisker(axis, place, ratio)
    words = f"{ratio['median']:.2f}" + (" (far from float64)" if (of.get("errors") or {}).get("far") else "")
    axis.text(ratio["p80"], place, f"  {words}", va="center", fontsize=9, fontweight="bold" if ours else None)
    return f"{name} {words}"


def memory_by_vocabulary(found: Sequence[Found]) -> list[Picture]:
    """A picture for each shape: a line for each implementation, both axes logarithmic."""
    pictures = []
    for place, (key, by_name) in enumerate(memory.by_vocabulary(found).items()):
        lines = {
            name: [(size, value) for size, of in of_name.items() if (value := memory.extra(of)) is not None]
            for name, of_name in by_name.items()
        }
        lines = {name: points for name, points in lines.items() if points}
        if not lines:
            continue
        figure = new_figure(4.0)
        axis = figure.add_subplot()
        ends = []
        for name, points in lines.items():
            at, values = [size for size, _ in points], [max(1.0, value) for _, value in points]
            look = look_of(name, list(lines))
            axis.plot(at, values, markersize=5, linewidth=2.2 if is_ours(name) else 1.4, **look)
            ends.append((values[-1], title(name), look["color"], is_ours(name)))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        sizes = sorted({size for points in lines.values() for size, _ in points})
        axis.set_xticks(sizes, [thousands(size) for size in sizes])
        axis.set_xticks([], minor=True)
        log_ticks(axis.yaxis)
        end_labels(axis, ends, max(sizes))
        axis.set_xlabel("vocabulary, words")
        axis.set_ylabel("MiB beyond inputs and results")
        axis.grid(alpha=0.25, which="major")
        open_frame(axis)
        said = [
            f"{title(name)} from {points[0][1]:.3g} MiB at V={points[0][0]} to {points[-1][1]:.3g} at V={points[-1][0]}"
            for name, points in lines.items()
        ]
        words = memory.settings_words(key)
        pictures.append(
            Picture(
                name=f"memory-{place + 1}",
                png=as_png(figure),
                alt=f"Extra memory of a frozen head's forward and backward pass by vocabulary at {words}: {'; '.join(said)}.",
                caption=f"Memory against vocabulary, frozen head, {words}: what a call takes beyond inputs and results. "
                "Less than 1 MiB is drawn at 1.",
                sources=sources_of([of for of_name in by_name.values() for of in of_name.values()]),
            )
        )
    return pictures


def pairs_per_second(found: Sequence[Found]) -> list[Picture]:
    """One picture: for each data set the engine's features one after the other, then TRL."""
    runs = {key: [of for of in run if steps.speed(of)] for key, run in steps.by_run(found).items()}
    runs = {key: run for key, run in runs.items() if run}
    if not runs:
        return []
    heights = [len(run) + 1.2 for run in runs.values()]
    figure = new_figure(0.27 * sum(heights) + 0.5)
    axes = figure.subplots(len(runs), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    said = []
    for axis, (key, run) in zip(axes, runs.items(), strict=True):
        axis.set_title(f"{key[0]}, {key[3]} pairs a step", loc="left", fontsize=9.5, fontweight="bold")
        longest, words = 0.0, []
        for place, of in enumerate(run):
            rate, ours = steps.speed(of), is_ours(of["implementation"])
            assert rate is not None
            axis.barh(place, rate["median"], height=0.68, color=ACCENT if ours else GREYS[2])
            whisker(axis, place, rate)
            multiple = steps.times(of, steps.base_of(of, steps.by_run(found)[key]))
            label = f"{rate['median']:.3g}" + (f"  ({multiple['median']:.2f}×)" if multiple else "")
            axis.text(rate["p80"], place, f"  {label}", va="center", fontsize=9, fontweight="bold" if ours else None)
            words.append(f"{row_title(of['implementation'])} {label}")
            longest = max(longest, rate["p80"])
        axis.set_xlim(0, 1.75 * longest)
        bare_bars(axis, [row_title(of["implementation"]) for of in run], [is_ours(of["implementation"]) for of in run])
        said.append(f"{key[0]}: {', '.join(words)}")
    figure.supxlabel("pairs a second (× TRL's best of the same run); whiskers p20–p80", fontsize=9.5)
    return [
        Picture(
            name="steps",
            png=as_png(figure),
            alt=f"Pairs a second, in brackets as a multiple of TRL's best. {'. '.join(said)}.",
            caption="Training speed: longer is faster. Each row of the engine adds one thing to the row above it.",
            sources=sources_of([of for run in runs.values() for of in run]),
        )
    ]


def planned_memory(parts: Mapping[tuple[str, str], gpu.Part]) -> Picture:
    """What `dpo-engine plan` predicts for QLoRA by length, and what a card took where one was asked."""
    figure = new_figure(4.2)
    axis = figure.add_subplot()
    ends, said = [], []
    for model, dash in zip(PLANNED, DASHES, strict=False):
        shape = shipped_shape(model)
        # As the plan takes it: two completions of max_length with no prompt in common.
        values = [step_parts(shape, StepSettings(), 2 * length).total / 2**30 for length in LENGTHS]
        axis.plot(LENGTHS, values, color=ACCENT, linestyle=dash, linewidth=2)
        ends.append((values[-1], f"{model}, planned", ACCENT, True))
        at = dict(zip(LENGTHS, values, strict=True))
        said.append(f"{model} {at[1024]:.1f} GiB at 1024 tokens, {at[4096]:.1f} at 4096, {at[16384]:.1f} at 16384")
    for size in CARDS:
        usable = read_card(f"{size}GB").memory / 2**30
        axis.axhline(usable, color=GREYS[2], linewidth=1, linestyle=DASHES[1])
        axis.text(LENGTHS[0], usable, f"{size} GB card", fontsize=8.5, color=GREYS[1], va="bottom")
    points = gpu.measured_lengths(parts)
    for number_, (card, record) in enumerate(points):
        needed = (record["peak_mb"] + gpu.CONTEXT_MB) / 1024
        axis.plot(record["length"], needed, "o", color="black", markersize=6)
        if number_ == len(points) - 1:
            axis.annotate("measured", (record["length"], needed), (8, -12), textcoords="offset points", fontsize=9)
        said.append(f"measured on {card} at {record['length']} tokens: {needed:.1f} GiB")
    if not points:
        axis.text(0.03, 0.03, NOT_MEASURED.replace("; ", ";\n"), transform=axis.transAxes, fontsize=8.5, style="italic")
        said.append(NOT_MEASURED)
    axis.set_xscale("log", base=2)
    ticks = [length for length in LENGTHS if length & (length - 1) == 0]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_ylim(0)
    end_labels(axis, ends, LENGTHS[-1])
    axis.set_xlabel("max_length, tokens")
    axis.set_ylabel("GiB of the card")
    open_frame(axis)
    measured = (
        "Points: measured, of a Llama-3.1-8B-shaped model, a quarter of each pair is prompt, so a little below the line."
        if points
        else f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."
    )
    return Picture(
        name="planned-memory",
        png=as_png(figure),
        alt=f"Memory of a QLoRA step of one pair by max_length, by the plan's arithmetic: {'; '.join(said)}.",
        caption="Memory by length, QLoRA of 7B and 8B models (NF4, r=16, all linear layers, checkpointing): what `dpo-engine plan` "
        f"predicts for any pair of that length. Arithmetic, not a measurement. {measured}",
        sources=tuple(source for (_, part), (source, _) in parts.items() if part == "memory" and points),
    )


def growth(found: Sequence[Found]) -> list[Picture]:
    """A picture for each case: points, and the fitted power with its slope."""
    every = scale.series(found)
    cases = dict.fromkeys(key[0] for key in every)
    made = [_growth(case, {key: of for key, of in every.items() if key[0] == case}) for case in cases]
    return [picture for picture in made if picture is not None]


def _growth(case: str, every: Mapping[scale.Series, tuple[list[Found], Found | None]]) -> Picture | None:
    lines = {key: ([of for of in points if scale.value(of)], fit) for key, (points, fit) in every.items()}
    lines = {key: (points, fit) for key, (points, fit) in lines.items() if points}
    if not lines:
        return None
    x_words, what = scale.CASES.get(case, ("x", case))
    heading = what if what.startswith("linear_") else what[0].upper() + what[1:]
    is_log = all(of["x"] > 0 and scale.value(of)[0] > 0 for points, _ in lines.values() for of in points)
    figure = new_figure(3.4, width=4.6)
    axis = figure.add_subplot()
    said = []
    for place, (key, (points, fit)) in enumerate(lines.items()):
        colour, marker = (ACCENT, SOFT_ACCENT)[place % 2], MARKERS[place % len(MARKERS)]
        seen = {of["x"]: scale.value(of) for of in points}
        for of in points:
            middle, low, high, _ = seen[of["x"]]
            inside = of.get("in_fit") is not False
            axis.errorbar(
                of["x"],
                middle,
                yerr=[[middle - low], [high - middle]],
                fmt=marker,
                color=colour,
                markerfacecolor=colour if inside else "white",
                markersize=5.5,
                elinewidth=1,
            )
        words = "slope not to be quoted"
        if fit is not None and not fit.unquotable and fit.is_measured:
            over = fit.get("over", "x")
            words = f"slope {scale.slope_words(fit)}" + ("" if over == "x" else " *")
            if is_log and over == "x":
                inside_x = [x for x in seen if fit["x_from"] <= x <= fit["x_to"]]
                line = power_through(inside_x, [seen[x][0] for x in inside_x], fit["slope"])
                axis.plot(inside_x, line, color=colour, linewidth=1.2)
        elif fit is None:
            words = "no slope"
        label, height = f"{scale.name_of(key)}: {words}", 0.97 - 0.09 * place
        axis.text(0.08, height, label, transform=axis.transAxes, fontsize=8.5, va="top")
        axis.plot(0.04, height - 0.03, marker, color=colour, markersize=5.5, transform=axis.transAxes)
        shown = ", ".join(f"{scale.size_words(x)}: {value[0]:.3g} {value[3]}" for x, value in seen.items())
        said.append(f"{label}; by {x_words}: {shown}")
    if is_log:
        axis.set_xscale("log")
        axis.set_yscale("log")
        xs = sorted({of["x"] for points, _ in lines.values() for of in points})
        every_other = xs[:: max(1, -(-len(xs) // 6))]
        axis.set_xticks(every_other, [thousands(x) for x in every_other])
        axis.set_xticks([], minor=True)
    low, high = axis.get_ylim()
    room = 0.12 * len(lines)  # for the words above the points
    axis.set_ylim(low if is_log else 0, high * (high / low) ** (room / (1 - room)) if is_log else high / (1 - room))
    if is_log:
        log_ticks(axis.yaxis)
    axis.set_title(heading, loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel(x_words)
    unit = scale.value(next(iter(lines.values()))[0][0])[3]
    axis.set_ylabel({"s": "seconds", "ms": "milliseconds"}.get(unit, unit))
    axis.grid(alpha=0.25, which="major")
    open_frame(axis)
    shown = "both axes logarithmic" if is_log else "plain axes"
    others = [fit["over"] for _, fit in lines.values() if fit is not None and fit.get("over", "x") != "x"]
    starred = f" * The slope is taken over {others[0].replace('_', ' ')}." if others else ""
    hollow = any(of.get("in_fit") is False for points, _ in lines.values() for of in points)
    return Picture(
        name=f"scale-{case}",
        png=as_png(figure),
        alt=f"{heading}. {'. '.join(said)}.",
        caption=f"{heading}: medians with p20–p80, {shown}"
        + (", hollow points not in the fit." if hollow else ".")
        + starred,
        sources=sources_of([of for points, _ in lines.values() for of in points]),
        wide=False,
    )
