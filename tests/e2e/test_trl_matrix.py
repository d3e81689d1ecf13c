"""Do the newest TRL's trainers do the same with the engine as without? The tiny part of `make integrations`, in one process.

The other releases have environments of their own, on demand: `make integrations`.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from support.benchmark_scripts import load

pytest.importorskip("trl", reason="trl is not installed: pip install 'dpo-engine[trl]'")

CASES = load("integrations.case").CASES
RELEASE = ".".join(metadata.version("trl").split(".")[:2])
STEPS, BATCH = 3, 4


def run(case: str, *, engine: bool) -> dict[str, Any]:
    spec = {"case": case, "engine": engine, "steps": STEPS, "batch": BATCH}
    return dict(load("integrations.case").run(spec))


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if "1.16" in case.releases])
def test_a_trainer_does_the_same_with_the_engine_as_without(case: str) -> None:
    if RELEASE != "1.16":
        pytest.skip(f"TRL {RELEASE} is installed; the cases are those of 1.16, others run by make integrations")
    without, with_engine = run(case, engine=False), run(case, engine=True)
    assert not load("integrations.compare").compare(without, with_engine)["differs"]


def recorded() -> dict[str, Any]:
    return {
        "losses": [0.5, 0.4],
        "metrics": [{"logps/chosen": -100.0, "grad_norm": 3.0}, {"logps/chosen": -90.0, "grad_norm": 2.0}],
        "gradients": {"a": torch.ones(3), "b": torch.full((2,), 1e-9)},
        "engine_calls": 0,
    }


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("loss of step 2", lambda run: run["losses"].__setitem__(1, 0.4003)),
        ("logps/chosen of step 1", lambda run: run["metrics"][0].update({"logps/chosen": -100.002})),
        ("logps/chosen of step 2", lambda run: run["metrics"][1].update({"logps/chosen": -90.02})),
        ("grad_norm of step 1", lambda run: run["metrics"][0].update({"grad_norm": float("nan")})),
        ("grad_norm of step 2", lambda run: run["metrics"][1].pop("grad_norm")),
        ("gradient of a", lambda run: run["gradients"].update(a=torch.tensor([1.0, 1.0, 1.001]))),
        ("gradient of b", lambda run: run["gradients"].pop("b")),
        ("engine_calls", lambda run: run.update(engine_calls=0)),
        ("losses", lambda run: run["losses"].pop()),
    ],
)
def test_the_comparison_names_what_differs(where: str, change: Any) -> None:
    with_engine = recorded() | {"engine_calls": 5}
    compare = load("integrations.compare").compare
    assert compare(recorded(), with_engine)["differs"] == []
    change(with_engine)
    (line,) = compare(recorded(), with_engine)["differs"]
    assert line.startswith(where)


def test_the_page_has_the_table_of_the_newest_results() -> None:
    table = load("integrations.table")
    name, records = table.newest()
    page = Path(table.PAGE)
    if not records or not page.exists():
        pytest.skip("the matrix was not measured yet: make integrations")
    text = page.read_text("utf-8")
    assert text.split(table.BEGIN)[1].split(table.END)[0].strip() == table.text(name, records), (
        "run: python -m benchmarks.integrations --table"
    )
