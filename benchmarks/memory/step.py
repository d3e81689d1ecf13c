"""Where does the memory of a whole optimiser step go? Weights, adapters, forward, backward, optimiser, each implementation in
processes of its own, and beside the engine's what its planner says.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, OverLimit, last_json, run_watched
from benchmarks.memory.vocabulary import HONEST
from benchmarks.smoke import tiny_model, tiny_pairs
from benchmarks.steps.rows import missing_packages, read_pairs

Record = dict[str, Any]
DATA = ROOT / "examples" / "concise_train.jsonl"


@dataclass(frozen=True, kw_only=True)
class Row:
    note: str
    side: str  # "engine" or "trl"
    options: Mapping[str, Any]


def _engine(note: str, layout: str, backend: str = "tiled", *, precompute: bool = True) -> Row:
    return Row(note=note, side="engine", options={"layout": layout, "backend": backend, "precompute": precompute})


def _trl(note: str, *, precompute: bool, checkpointing: bool | None, compaction: bool = False) -> Row:
    options = {"precompute": precompute, "checkpointing": checkpointing, "compaction": compaction}
    return Row(note=note, side="trl", options=options)


ROWS = {
    "engine_naive": _engine("padded, logits built, reference in each step", "padded", "reference", precompute=False),
    "engine_operator": _engine("padded, no logits, reference in each step", "padded", precompute=False),
    "engine_packed": _engine("packed, reference precomputed", "packed"),
    "engine_shared": _engine("packed, prompts shared, reference precomputed", "shared"),
    "trl_default": _trl("as it comes: checkpointing, reference in each step", precompute=False, checkpointing=None),
    "trl_best": _trl("reference precomputed, no checkpointing", precompute=True, checkpointing=False),
    "trl_compacted": _trl(
        "the same, made to score completions only", precompute=True, checkpointing=False, compaction=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every row is told alike."""

    model: str
    model_path: str
    data: str
    pairs: list[dict[str, Any]]
    batch: int
    max_length: int
    lora_r: int
    threads: int


def real_job(model: str, data: Path, *, pairs: int, batch: int, max_length: int, threads: int) -> Job:
    """A model by its name, and the first usable pairs of a file."""
    from dpo_engine.model.loading import resolve_model

    path = str(resolve_model(model, progress=lambda line: print(line, file=sys.stderr)))
    return Job(
        model=Path(model).name,
        model_path=path,
        data=data.name,
        pairs=read_pairs(data, path, max_length, pairs),
        batch=batch,
        max_length=max_length,
        lora_r=16,
        threads=threads,
    )


def smoke_job(folder: Path, threads: int) -> Job:
    """A random model, which is put into `folder`, and random pairs."""
    named = {"model": "random", "model_path": str(tiny_model(folder)), "data": "random"}
    return Job(**named, pairs=tiny_pairs(4), batch=2, max_length=64, lora_r=4, threads=threads)


def measure(job: Job, only: Sequence[str], rounds: int, limit_s: float) -> list[Record]:
    """A record for every row and round; rows take turns, and one that gave nothing is not tried again."""
    records: list[Record] = []
    given_up: set[str] = set()
    for number in range(rounds):
        for name in only if number % 2 == 0 else reversed(only):
            if name in given_up:
                continue
            print(f"step, round {number + 1}: {name}", file=sys.stderr, flush=True)
            record = run_row(name, job, limit_s)
            if record["status"] != "measured":
                given_up.add(name)
            records.append({**_common(name, job, rounds), "round": number, **record})
    return records


def _common(name: str, job: Job, rounds: int) -> Record:
    return {
        "case": "step",
        "implementation": name,
        "dtype": "float32",
        "threads": job.threads,
        "rounds": rounds,
        "unquotable": None,
        "note": ROWS[name].note,
        "model": job.model,
        "data": job.data,
        "pairs": len(job.pairs),
        "batch": job.batch,
        "max_length": job.max_length,
        "lora_r": job.lora_r,
    }


def run_row(name: str, job: Job, limit_s: float) -> Record:
    """One row in a process of its own: its figures, or in `status` why there are none."""
    row = ROWS[name]
    why = missing_packages("trl", "datasets") if row.side == "trl" else None
    if why:
        return {"status": why}
    with tempfile.TemporaryDirectory(prefix="dpo-memory-") as folder:
        spec = {**vars(job), "lora_alpha": 2.0 * job.lora_r, "side": row.side, **row.options}
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps({**spec, "output_dir": str(Path(folder) / "out")}), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.memory.phases", str(path)]
        try:
            done = run_watched(command, env=_environment(job, Path(folder)), limit_s=limit_s)
        except OverLimit as error:
            return {"status": f"not measured: {error}"}
        except RuntimeError as error:
            return {"status": f"failed: {str(error).splitlines()[-1][:160]}"}
    found = last_json(done.stdout)
    # The child sets its own peak back, so the parent may miss one that came within its last reading.
    peak = max(done.peak_rss_mb, found.pop("peak_mb"))
    return {"status": "measured", **found, "peak_rss_mb": round(peak, 1), "planned": planned(name, job, found)}


def _environment(job: Job, folder: Path) -> dict[str, str]:
    return {
        **HONEST,
        "OMP_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "PYTHONPATH": str(ROOT),
    }


def planned(name: str, job: Job, found: Mapping[str, Any]) -> dict[str, float] | str:
    """What `dpo_engine.memory` predicts by part, in MiB, for forests as large as the largest that was trained on.

    `step` is all that comes and goes between the first and the last of a step, and the gradients: what forward or backward is
    at its fullest. `optimizer` is its state and the gradients, which are still there when it ends. The planner takes every
    token to be scored, and knows neither padding nor logits.
    """
    if name not in ("engine_packed", "engine_shared"):
        return "n/a: the planner is of the engine's own layouts, without logits"
    from dpo_engine.errors import ModelError
    from dpo_engine.memory.shapes import read_shape
    from dpo_engine.memory.step import STATE_BYTES, StepSettings, step_parts

    config = json.loads((Path(job.model_path) / "config.json").read_text(encoding="utf-8"))
    if found["optimiser"] not in STATE_BYTES:
        return f"n/a: the planner does not know the optimiser {found['optimiser']}"
    try:
        shape = read_shape(config, job.model)
    except ModelError as error:
        return f"n/a: {error}"
    settings = StepSettings(
        weights="float32",
        compute="float32",
        lora_r=job.lora_r,
        optimiser=found["optimiser"],
        checkpointing=False,
        device="cpu",
    )
    parts = step_parts(shape, settings, found["largest_forward_tokens"]).in_mb()
    step = sum(parts[part] for part in ("gradients", "activations", "attention", "head", "opened", "reference"))
    return {
        "weights": parts["weights"],
        "adapters": parts["adapters"],
        "step": round(step, 1),
        "optimizer": round(parts["optimiser"] + parts["gradients"], 1),
    }
