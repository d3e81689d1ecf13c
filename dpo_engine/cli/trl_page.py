"""Which of TRL's names is what here? The tables of docs/trl-differences.md, written from the table that the code uses.

python -m dpo_engine.cli.trl_page docs/trl-differences.md     # writes them where the page has their marks
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_engine.train.config import DPOConfig
from dpo_engine.train.run import TrainConfig
from dpo_engine.train.trl_names import (
    ALIAS,
    DPO_CONFIG,
    LOSS_TYPES,
    MODEL_CONFIG,
    NO_EFFECT,
    ONLY,
    SAME,
    SCRIPT,
    TRL_NAMES,
    TrlName,
)
from dpo_engine.train.trl_settle import differs


def with_tables(page: str) -> str:
    """The page with every table as the code has it, between `<!-- NAME: written ... -->` and `<!-- end -->`.

    Raises:
        KeyError: a mark has a name that is no table's.
    """
    tables = _tables()
    return re.sub(
        r"(<!-- (\w+): [^\n]*-->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{tables[found[2]]}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def _tables() -> dict[str, str]:
    config = [row for row in TRL_NAMES if row.owner == DPO_CONFIG]
    return {
        "defaults": _table(("setting", "here", "TRL", "why, and what to do"), _defaults()),
        "losses": _table(("`loss_type`", "method here", "what differs"), _losses()),
        "same": _names([row for row in config if row.kind == SAME]),
        "aliases": _names([row for row in config if row.kind == ALIAS]),
        "without_effect": _names([row for row in config if row.kind == NO_EFFECT]),
        "refused": _names([row for row in config if row.kind == ONLY]),
        "model_config": _names([row for row in TRL_NAMES if row.owner == MODEL_CONFIG]),
        "script": _names([row for row in TRL_NAMES if row.owner == SCRIPT]),
    }


def _defaults() -> Iterable[tuple[str, ...]]:
    for owner, config in (("DPOConfig", DPOConfig), ("dpo-engine train", TrainConfig)):
        fields = {field.name: field for field in dataclasses.fields(config)}
        for row in TRL_NAMES:
            own = row.owner == DPO_CONFIG if owner == "DPOConfig" else row.owner != DPO_CONFIG
            if row.kind != SAME or not own or not differs(row, fields[row.name].default):
                continue
            if owner == "DPOConfig" or fields[row.name].default is not None:
                yield f"`{row.name}`", _code(fields[row.name].default), _code(row.default), row.note


def _losses() -> Iterable[tuple[str, ...]]:
    for name, entry in LOSS_TYPES.items():
        if not entry.method:
            what = f"refused; nearest: `{entry.nearest}`"
        else:
            what = f"`{entry.method}`"
        yield f"`{name}`", what, entry.note


def _names(rows: list[TrlName]) -> str:
    return _table(("TRL's name", "in TRL", "its default", "here"), (_name(row) for row in rows))


def _name(row: TrlName) -> tuple[str, ...]:
    here = {
        SAME: "the same name",
        ALIAS: f"`{row.to}`",
        NO_EFFECT: "no effect",
        ONLY: "only " + " or ".join(_code(value) for value in row.only),
    }[row.kind]
    joined = f"{here}: {row.note}" if row.note and row.kind in (NO_EFFECT, ONLY) else f"{here}. {row.note}".strip()
    return f"`{row.name}`", row.versions, _code(row.default), joined


def _code(value: Any) -> str:
    value = getattr(value, "value", value)
    return f"`{'none' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in cells) + "|" for cells in lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text("utf-8")), encoding="utf-8")
