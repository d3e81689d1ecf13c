"""Does every part of the engine import only what it may?"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.imports import ROOT, Import, imports_of, source_files

# Which other parts a part may import. Nothing imports `cli`; everything but `kernels` may import `dpo_engine.errors`.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "ops": {"kernels"},
    "losses": set(),
    "batch": set(),
    "data": set(),
    "model": {"ops", "batch"},
    "reference": {"ops", "batch", "model"},
    "memory": {"model"},
    "train": {"ops", "losses", "batch", "data", "model", "reference", "memory"},
    "export": {"ops", "batch", "data", "model", "reference", "train"},
    "pairs": {"model", "data"},
    "integrations": {"kernels", "ops", "losses", "batch", "data", "model", "reference", "memory", "train", "pairs"},
    "cli": {
        "ops",
        "losses",
        "batch",
        "data",
        "model",
        "reference",
        "memory",
        "train",
        "export",
        "pairs",
        "integrations",
    },
}

# Parts that get along with these packages: the operator and the losses need torch alone.
ONLY_PACKAGES: dict[str, set[str]] = {
    "kernels": {"torch", "triton"},
    "ops": {"torch", "triton", "bitsandbytes"},  # what bitsandbytes packed, it unpacks
    "losses": {"torch"},
    "batch": {"torch"},
    "errors": set(),
}

# Imported where they are used: slow to import, or missing on some platforms.
NEVER_EAGER = {"triton", "datasets", "peft", "bitsandbytes", "matplotlib", "trl", "gguf"}


MODULES = source_files()


def part_of(module: str) -> str:
    """The part a module belongs to: "ops" for dpo_engine.ops.tiled, "" for dpo_engine itself."""
    return (module.split(".") + [""])[1]


def fault_inside(part: str, target: str) -> str | None:
    """What is wrong with `part` importing dpo_engine's `target`, if anything."""
    allowed = {part} | MAY_IMPORT.get(part, set()) | ({"errors"} if part != "kernels" else set())
    if part == "" or target in allowed or target.startswith("__"):
        return None
    if target not in MAY_IMPORT and target != "errors":
        return "the engine itself imports a name from the file that defines it"
    return f"{part} may import {', '.join(sorted(allowed))}"


def fault_outside(part: str, entry: Import) -> str | None:
    """What is wrong with `part` importing another package, if anything."""
    package = entry.module.split(".")[0]
    if package == "kernels":
        return "that is dpo_engine.kernels under a second name"
    if package in sys.stdlib_module_names:
        return None
    if package not in ONLY_PACKAGES.get(part, {package}):
        return f"{part} gets along with {', '.join(sorted(ONLY_PACKAGES[part])) or 'the standard library'}"
    if entry.eager and (part == "" or (package in NEVER_EAGER and part != "kernels")):
        return "import it in the function that uses it"
    if part in ("batch", "data") and package == "transformers" and "Model" in entry.module:
        return f"{part} knows no model code"
    return None


def faults(module: str, found: list[Import]) -> list[str]:
    part, lines = part_of(module), []
    for entry in found:
        inside = entry.module.split(".")[0] == "dpo_engine"
        fault = fault_inside(part, part_of(entry.module)) if inside else fault_outside(part, entry)
        if fault:
            lines.append(f"{module}, line {entry.line} imports {entry.module}: {fault}")
    return lines


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_part_may(module: str) -> None:
    path = MODULES[module]
    found = imports_of(path.read_text("utf-8"), module, is_package=path.name == "__init__.py")
    assert not faults(module, found), "\n".join(faults(module, found))


def test_every_part_has_a_row_in_the_table() -> None:
    parts = {part_of(module) for module in MODULES} - {"", "errors"}
    assert parts <= set(MAY_IMPORT), f"say in MAY_IMPORT what {sorted(parts - set(MAY_IMPORT))} may import"


def test_the_table_has_no_circle() -> None:
    def reached_from(part: str, seen: frozenset[str]) -> set[str]:
        assert part not in seen, f"{part} reaches itself"
        return {part}.union(*(reached_from(other, seen | {part}) for other in MAY_IMPORT[part]))

    for part in MAY_IMPORT:
        assert ("cli" in reached_from(part, frozenset())) == (part == "cli")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpo_engine.losses.pairwise", "from dpo_engine.ops import linear_logps"),
        ("dpo_engine.losses.pairwise", "from ..ops import linear_logps"),
        ("dpo_engine.losses.pairwise", "from .. import ops"),
        ("dpo_engine.losses.pairwise", "import transformers"),
        ("dpo_engine.ops.tiled", "def late():\n    from dpo_engine.model.head import head_of"),
        ("dpo_engine.ops.tiled", "import importlib\nimportlib.import_module('dpo_engine.train.trainer')"),
        ("dpo_engine.ops.tiled", "import triton"),
        ("dpo_engine.model.loading", "from dpo_engine.data import PairData"),
        ("dpo_engine.model.loading", "if TYPE_CHECKING:\n    from dpo_engine.train.config import DPOConfig"),
        ("dpo_engine.model.loading", "class Early:\n    import peft"),
        ("dpo_engine.model.loading", "try:\n    import bitsandbytes\nexcept ImportError:\n    pass"),
        ("dpo_engine.model.loading", "from dpo_engine import linear_logps"),
        ("dpo_engine.data.pairs", "def late():\n    from transformers import AutoModelForCausalLM"),
        ("dpo_engine.train.trainer", "from dpo_engine.cli.main import app"),
        ("dpo_engine.train.trainer", "def late():\n    import kernels.lse_forward"),
        ("dpo_engine.kernels.lse_forward", "import numpy"),
        ("dpo_engine.kernels.lse_forward", "from dpo_engine.errors import BackendError"),
        ("dpo_engine.errors", "import torch"),
        ("dpo_engine", "import torch"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str) -> None:
    assert faults(module, imports_of(source, module, is_package=module == "dpo_engine"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpo_engine.losses.pairwise", "import math\nfrom torch import Tensor\nfrom .stats import PairStats"),
        ("dpo_engine.ops.linear_logps", "def late():\n    from dpo_engine.kernels.tile_pass import tile_pass"),
        ("dpo_engine.model.adapters", "def late():\n    from peft import LoraConfig"),
        ("dpo_engine.model.adapters", "if TYPE_CHECKING:\n    from peft import PeftModel"),
        ("dpo_engine.train.trainer", "from dpo_engine.errors import TrainingError"),
        ("dpo_engine.kernels.lse_forward", "import torch, triton\nfrom dpo_engine.kernels.softcap import softcap"),
        ("dpo_engine.cli.main", "from dpo_engine import __version__"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert faults(module, imports_of(source, module)) == []


def test_the_layout_in_contributing_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tree = re.search(r"^## Layout\n+```\n(.+?)^```", text, re.MULTILINE | re.DOTALL)
    assert tree
    named, folders = set(), [""]
    for line in tree[1].splitlines():
        entry = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 4
        folders[depth + 1 :] = [folders[depth] + entry]
        if entry.endswith(".py"):
            named.add(folders[depth] + entry)
    modules = {str(path.relative_to(ROOT)) for path in MODULES.values()}
    parts = {name for name in modules if name.count("/") > 1 and name.endswith("/__init__.py")}
    assert named - modules == set(), "CONTRIBUTING.md names files that are not there"
    assert modules - parts - named == set(), "CONTRIBUTING.md does not name these; give each a line with its remark"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_no_other_package() -> None:
    code = "import sys; before = set(sys.modules); import dpo_engine; print(*set(sys.modules) - before)"
    packages = {name.split(".")[0] for name in run_python(code).split()}
    assert packages - {"dpo_engine"} <= set(sys.stdlib_module_names)


def test_the_operator_needs_torch_alone() -> None:
    others = "triton", "transformers", "datasets", "peft", "accelerate", "matplotlib", "bitsandbytes", "typer"
    code = f"""
import sys
sys.modules |= dict.fromkeys({others})  # each import of these fails as if it were not installed
import torch
from dpo_engine import dpo_loss, linear_kl, linear_logps, linear_preference_loss
hidden, weight = torch.ones(4, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
labels = torch.tensor([0, 1, 4, 2])
linear_logps(hidden, weight, labels, lora=(torch.ones(4, 2), torch.ones(5, 2)), extras=("entropy",))[0].sum().backward()
linear_preference_loss(hidden, weight, labels, [2, 2], lambda c, r, rc, rr: (r - c)).backward()
linear_kl(hidden, weight, labels, hidden, weight).kl.sum().backward()
print("worked")
"""
    assert run_python(code).strip() == "worked"


def test_help_is_printed_within_a_second() -> None:
    command = Path(sys.executable).with_name("dpo-engine")
    start = [str(command)] if command.exists() else [sys.executable, "-m", "dpo_engine.cli.main"]
    seconds = []
    for _ in range(3):  # the best of three: the first one warms the disk, and other work may share the cores
        began = time.perf_counter()
        done = subprocess.run([*start, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout
    assert min(seconds) < 1.0, f"--help took {[round(s, 2) for s in seconds]} s; what is imported eagerly?"
