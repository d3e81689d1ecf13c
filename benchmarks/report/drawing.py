"""How does a picture look? Colours, sizes, and the parts that pictures have in common.

The engine has one colour in all of them, which anyone tells from grey; peers are greys, told apart by marker, dash and a label
at the line or bar itself. A picture is as wide as a phone's screen at a readable size: panels stand below each other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.names import is_ours
from dpo_engine.errors import ConfigError

ACCENT, SOFT_ACCENT = "#0b5cad", "#6fa8dc"  # the second for a second line of the engine in one picture
GREYS = ("#3d3d3d", "#6e6e6e", "#9a9a9a")
MARKERS, DASHES = "osD^vPX*", ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
WIDTH, DPI = 6.0, 160


def new_figure(height: float, width: float = WIDTH) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "matplotlib is not installed; expected it, to draw; run: pip install 'dpo-engine[bench]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Any) -> bytes:
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=DPI, metadata={"Software": None})
    return made.getvalue()


def bare_bars(axis: Any, names: Sequence[str], ours: Sequence[bool]) -> None:
    """Names at bars that run from top to bottom, and no frame."""
    axis.set_yticks(range(len(names)), names)
    for label, mine in zip(axis.get_yticklabels(), ours, strict=True):
        label.set(color=ACCENT if mine else "black", fontsize=9)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def log_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, and more of them where it spans little. Its limits must be set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def open_frame(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def whisker(axis: Any, place: int, values: Mapping[str, float]) -> None:
    if values["p20"] < values["p80"]:
        axis.plot([values["p20"], values["p80"]], [place, place], color="black", linewidth=1.2, solid_capstyle="butt")


def look_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Of a line: the engine's full and in its colour, peers in greys with marker and dash of their own."""
    place = [other for other in names if is_ours(other) == is_ours(name)].index(name)
    if is_ours(name):
        return {"color": ACCENT, "marker": MARKERS[place % len(MARKERS)], "linestyle": DASHES[place % len(DASHES)]}
    look = {"color": GREYS[place % len(GREYS)], "marker": MARKERS[(place + 1) % len(MARKERS)]}
    return {**look, "linestyle": DASHES[(place + 1) % len(DASHES)]}


def end_labels(axis: Any, ends: Sequence[tuple[float, str, str, bool]], last: float) -> None:
    """Names at the ends of lines, moved apart where they would lie over each other. The axis must have its scale."""
    axis.figure.canvas.draw()
    _, height = axis.transAxes.transform((1, 1)) - axis.transAxes.transform((0, 0))
    to_share = axis.transAxes.inverted()
    places = [to_share.transform(axis.transData.transform((last, value)))[1] for value, *_ in ends]
    least = 11.5 * axis.figure.dpi / 72 / height
    at = dict(zip(range(len(ends)), places, strict=True))
    below = -math.inf
    for index in sorted(at, key=lambda index: at[index]):
        at[index] = below = max(at[index], below + least)
    for index, (_, label, colour, ours) in enumerate(ends):
        axis.text(
            1.02,
            at[index],
            label,
            transform=axis.transAxes,
            va="center",
            fontsize=9,
            color=colour,
            fontweight="bold" if ours else None,
        )


def power_through(xs: Sequence[float], ys: Sequence[float], slope: float) -> list[float]:
    """A power of x through the middle of the points, which is where a least-squares fit of logarithms goes."""
    middle = sum(math.log(y) - slope * math.log(x) for x, y in zip(xs, ys, strict=True)) / len(xs)
    return [math.exp(middle + slope * math.log(x)) for x in xs]


def thousands(value: float) -> str:
    return (
        f"{value / 1024:g}k"
        if value >= 1024 and value % 1024 == 0
        else f"{value / 1000:g}k"
        if value >= 10_000
        else f"{value:g}"
    )
