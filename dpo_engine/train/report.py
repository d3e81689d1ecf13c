"""What does a person see after a run? A picture of the training log, and a short summary."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_engine.train.samples import Answer

NOUNS = {"pairs": "pairs", "unpaired": "rows", "ranked": "lists"}
"""What a row of each kind of data is called."""


def draw_training(log_history: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path | None:
    """Loss, reward margin and chosen/rejected log-probs over steps, as one PNG; None where matplotlib is not installed.

    Args:
        log_history: `trainer.state.log_history`.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [entry for entry in log_history if "loss" in entry]
    held_out = [entry for entry in log_history if "eval_loss" in entry]
    panels = (
        ("loss", (("loss", "train"),), (("eval_loss", "held out"),)),
        ("reward margin", (("rewards/margins", "train"),), (("eval_rewards/margins", "held out"),)),
        (
            "log-prob of a completion (nats)",
            (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
            (("eval_logps/chosen", "chosen, held out"), ("eval_logps/rejected", "rejected, held out")),
        ),
    )
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, train_keys, held_out_keys) in zip(figure.subplots(1, 3), panels, strict=True):
        for entries, keys, style in ((train, train_keys, "-"), (held_out, held_out_keys, "o")):
            for colour, (key, label) in enumerate(keys):
                points = [(entry["step"], entry[key]) for entry in entries if key in entry]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def summary_text(result: dict[str, Any], answers: Sequence[Answer], picture: Path | None) -> str:
    """The last thing a run prints: `result` is the object that `--json` prints."""
    lines, noun = ["", "Summary", "-------"], NOUNS[result["data_kind"]]
    if result["held_out_rows"]:
        for name, form in (("accuracy", "{:.1%}"), ("margin", "{:+.3f}")):
            if None in result[name].values():  # of labels of one class there is no margin
                continue
            before, after = (form.format(result[name][when]) for when in ("before", "after"))
            lines.append(f"held-out reward {name:9s} {before:>8s} -> {after:>8s}   ({result['held_out_rows']} {noun})")
    else:
        lines.append(f"no held-out {noun} were given (eval_data): nothing is said about unseen data")
    memory = f"{result['peak_rss_mb']:.0f} MB"
    if result["peak_cuda_mb"] is not None:
        memory += f", on the GPU {result['peak_cuda_mb']:.0f} MB"
    speed = (
        "speed not measured (one step)" if result["pairs_per_s"] is None else f"{result['pairs_per_s']:.2f} {noun}/s"
    )
    steps = f"{result['steps']} steps of {result['pairs_per_step']} {noun}, out of {result['rows_used']}"
    lines.append(f"{steps}: {speed}, peak memory {memory}")
    for answer in answers:
        lines += [
            "",
            f"prompt:  {_wrapped(answer.prompt)}",
            f"before:  {_wrapped(answer.before)}",
            f"after:   {_wrapped(answer.after)}",
        ]
    lines += ["", f"model saved in {result['output_dir']}"]
    if picture:
        lines.append(f"picture in {picture}")
    else:
        lines.append("no picture: matplotlib is not installed (pip install 'dpo-engine[report]') or picture is off")
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), width=110, subsequent_indent=" " * 9)
