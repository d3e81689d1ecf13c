"""What is measured, on which pairs, and by which process? The rows of `train.py`, their data sets, and how one row is run."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, OverLimit, last_json, run_watched

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train on the pairs. References are precomputed in all of them, before the clock starts."""

    title: str
    module: str
    options: dict[str, Any]  # beside what every row is told


ROWS = {
    "engine_padded": Row(title="engine, padded", module="benchmarks.steps.engine", options={"layout": "padded"}),
    "engine_packed": Row(title="engine, packed", module="benchmarks.steps.engine", options={"layout": "packed"}),
    "engine_shared": Row(
        title="engine, packed and shared", module="benchmarks.steps.engine", options={"layout": "shared"}
    ),
    "trl": Row(title="TRL", module="benchmarks.steps.trl", options={"compaction": False}),
    "trl_compacted": Row(title="TRL, compaction forced", module="benchmarks.steps.trl", options={"compaction": True}),
}
NOTES = {
    "engine_padded": "layout replaced after construction; for models that are right on nothing else",
    "engine_packed": "share_prompt=off",
    "engine_shared": "share_prompt=auto",
    "trl": "reference precomputed, no gradient checkpointing; on a CPU its head scores every position",
    "trl_compacted": "the same, patched (trl.trainer.utils._use_triton) so that a CPU too scores completions only",
}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """How pairs of a known file are trained on: about 4096 tokens in TRL's largest batch."""

    max_length: int
    batch: int  # pairs a step


DATA_SETS = {
    "hh_harmless_test": DataSet(max_length=512, batch=4),
    "dpo_en_demo": DataSet(max_length=1024, batch=2),
    "polite_vs_rude": DataSet(max_length=512, batch=4),
}
OTHER = DataSet(max_length=512, batch=4)
_SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json", ".csv.gz", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every row of a data set is told alike."""

    data: str  # name of the data set
    model_path: str
    pairs: list[dict[str, Any]]
    dtype: str
    batch: int
    max_length: int
    learning_rate: float
    beta: float
    lora_r: int
    lora_alpha: float
    seed: int
    threads: int

    @property
    def steps(self) -> int:
        return len(self.pairs) // self.batch


def find_data(places: Sequence[str]) -> dict[str, Path]:
    """Name of a data set -> its file: the files that were named, and in folders those of `DATA_SETS`.

    Raises:
        ValueError: a place does not exist, or a folder holds none of them.
    """
    found: dict[str, Path] = {}
    for place in map(Path, places):
        if place.is_file():
            found[data_name(place)] = place
            continue
        files = {data_name(path): path for path in sorted(place.glob("*")) if path.name.endswith(_SUFFIXES)}
        known = {name: files[name] for name in DATA_SETS if name in files}
        if not known:
            raise ValueError(f"{place} is no file, and no folder with one of {', '.join(DATA_SETS)}")
        found |= known
    return found


def data_name(path: Path) -> str:
    """The file's name without what says how it is written."""
    suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix)


def read_pairs(path: Path, model_path: str, max_length: int, count: int) -> list[dict[str, Any]]:
    """Token ids of the first `count` usable pairs, as the engine trains on them.

    Raises:
        ValueError: the file has fewer, or one of them scores only part of a completion, which TRL cannot.
    """
    from dpo_engine.data import load_pairs
    from dpo_engine.model.loading import load_tokenizer

    trees = load_pairs(path, load_tokenizer(model_path), max_length=max_length, limit=count).trees
    if len(trees) < count:
        raise ValueError(f"{path} has {len(trees)} usable pairs; expected {count} of them")
    partly = [tree.origin for tree in trees if not all(map(all, getattr(tree, "scored", None) or ()))]
    if partly:
        raise ValueError(f"{partly[0]} has a completion of several turns, of which TRL would score the user's too")
    return [
        {"prompt_ids": tree.prompt_ids, "chosen_ids": tree.completions[0], "rejected_ids": tree.completions[1]}
        for tree in trees
    ]


def missing_packages(*names: str) -> str | None:
    """Why a row cannot be measured here, where a package is not installed."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"n/a: {' and '.join(absent)} not installed" if absent else None


def run_row(name: str, job: Job, limit_s: float) -> Record:
    """One row in a process of its own: its figures, or in `status` why there are none."""
    row = ROWS[name]
    common = {"row": name, "note": NOTES[name], **row.options}
    why = missing_packages("trl", "datasets") if row.module == "benchmarks.steps.trl" else None
    if why:
        return common | {"status": why}
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
        spec = asdict(job) | row.options | {"output_dir": str(Path(folder) / "out")}
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", row.module, str(path)]
        try:
            done = run_watched(command, env=_environment(job, Path(folder)), limit_s=limit_s)
        except OverLimit as error:
            return common | {"status": f"not measured: {error}"}
        except RuntimeError as error:
            said = str(error)
            return common | {"status": f"failed: {said.splitlines()[-1][:160]}", "tail": said}
    result = last_json(done.stdout)
    log = result.pop("log")
    first = log[0]
    return {
        **common,
        "status": "measured",
        **result,
        "peak_rss_mb": done.peak_rss_mb,
        "process_s": done.seconds,
        "process_cpu_s": done.cpu_seconds,
        "losses": [entry["loss"] for entry in log],
        "first_loss": first["loss"],
        "first_chosen": first["logps/chosen"],
        "first_rejected": first["logps/rejected"],
        "grad_norms": [entry["grad_norm"] for entry in log],
    }


def _environment(job: Job, folder: Path) -> dict[str, str]:
    """Offline, a cache of its own (TRL keeps reference log-probs there), and as many threads as the other side."""
    return {
        "OMP_NUM_THREADS": str(job.threads),
        "MKL_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "PYTHONPATH": str(ROOT),
    }
