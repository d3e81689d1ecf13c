"""What does each method need, and what can it be told? The generated parts of docs/methods.md.

python -m dpo_engine.cli.methods_page docs/methods.md     # writes the table of needs, and each method's line of parameters
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from dpo_engine.losses import LOSSES, Method
from dpo_engine.train.method_arguments import SWITCHES
from dpo_engine.train.trl_names import LOSS_TYPES

_HEAD = (
    "method", "data", "reference", "token values", "extra outputs", "moving reference", "state", "whole step",
    "own parameters", "TRL's name",
)  # fmt: skip
_TRAINERS = {"kto": "KTOTrainer", "cpo": "CPOTrainer", "simpo": "CPOTrainer", "orpo": "ORPOTrainer"}
"""TRL's trainers of methods that its DPOTrainer does not have."""


def with_generated(page: str) -> str:
    """The page with its table between `<!-- needs: written ... -->` and `<!-- end -->`, and "- Parameters: ..." under each heading
    "### `name`", as `LOSSES` has them."""
    page = re.sub(
        r"(<!-- needs: [^\n]*-->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{needs_table()}\n{found[2]}",
        page,
        flags=re.DOTALL,
    )
    sections = re.split(r"(?m)^(?=##)", page)
    return "".join(_with_parameters(section) for section in sections)


def needs_table() -> str:
    """One row a method, as Markdown."""
    rows = [_HEAD, ("---",) * len(_HEAD), *map(_row, LOSSES.values())]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {cell} " for cell in cells) + "|" for cells in rows)


def _with_parameters(section: str) -> str:
    heading = re.match(r"### `(\w+)`\n", section)
    if heading is None:
        return section
    line = f"- Parameters: {_parameters(LOSSES[heading[1]])}"
    return re.sub(r"(?m)^- Parameters: .*$", lambda _: line, section)


def _row(method: Method) -> tuple[str, ...]:
    token_values = ["first tokens of both"] if method.public_part else []
    token_values += ["KL of the distributions"] if method.token_kl else []
    state = ["running mean of rewards"] if method.baseline else []
    state += ["the reference's weights"] if method.moving_reference else []
    step = "all pairs" if method.whole_step else "`z0` of mismatched completions" if method.mismatched else ""
    return (
        f"[`{method.name}`](#{method.name})",
        method.kind,
        _reference(method),
        ", ".join(token_values),
        ", ".join(f"`{extra}`" for extra in method.extras),
        "yes" if method.moving_reference else "",
        ", ".join(state),
        step,
        _parameters(method),
        ", ".join(_trl_names(method)),
    )


def _reference(method: Method) -> str:
    if not method.needs_reference:
        return "none"
    return "asked once" if method.known_beforehand else "asked at every step"


def _parameters(method: Method) -> str:
    return ", ".join(f"`{p.name}` {_shown(p.default)}" for p in method.parameters) or "none"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else f"{value}"


def _trl_names(method: Method) -> list[str]:
    names = [f"`{name}`" for name, loss in LOSS_TYPES.items() if loss.method == method.name]
    names += [f"`{switch}`" for switch, to in SWITCHES if to == method.name]
    return names + [f"`{trainer}`" for name, trainer in _TRAINERS.items() if name == method.name]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_generated(path.read_text("utf-8")), encoding="utf-8")
