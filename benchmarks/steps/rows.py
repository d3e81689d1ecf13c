"""Who trains, on which pairs, and by which process? The rows, their data sets, and how one row is run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Neighbours, OverLimit, last_json, run_watched
from benchmarks.smoke import WHY

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train on the pairs."""

    title: str
    module: str
    options: dict[str, Any]  # beside what every row is told
    note: str


ENGINE, TRL, NAIVE = "benchmarks.steps.engine", "benchmarks.steps.trl", "benchmarks.steps.naive"
# From the definition to the engine as it comes, one feature at a time; then TRL. The last row of the engine and TRL's last three
# know the reference before the first step.
ROWS = {
    "naive": Row(
        title="plain torch: padded, all logits",
        module=NAIVE,
        options={},
        note="the definition in transformers.Trainer; the reference in every step, with the adapter off",
    ),
    "engine_operator": Row(
        title="+ log-probs without logits",
        module=ENGINE,
        options={"layout": "padded", "precompute": False},
        note="padded sheets; layout replaced after construction, for the engine keeps it for models that are right on nothing else",
    ),
    "engine_packed": Row(
        title="+ packing",
        module=ENGINE,
        options={"layout": "packed", "precompute": False},
        note="share_prompt=off",
    ),
    "engine_shared": Row(
        title="+ every prompt once",
        module=ENGINE,
        options={"layout": "shared", "precompute": False},
        note="share_prompt=auto; the reference in every step",
    ),
    "engine_cached": Row(
        title="+ reference known: dpo-engine as it comes",
        module=ENGINE,
        options={"layout": "shared", "precompute": True},
        note="precomputed before the first step, as the cache would have it on a second run",
    ),
    "trl_default": Row(
        title="TRL as it comes",
        module=TRL,
        options={"precompute": False, "checkpointing": True, "micro": None, "compaction": False},
        note="gradient checkpointing, the reference in every step; on a CPU its head scores every position",
    ),
    "trl_best": Row(
        title="TRL, reference known, no checkpointing",
        module=TRL,
        options={"precompute": True, "checkpointing": False, "micro": None, "compaction": False},
        note="on a CPU its head scores every position",
    ),
    "trl_accumulated": Row(
        title="TRL, the same, one pair at a time",
        module=TRL,
        options={"precompute": True, "checkpointing": False, "micro": 1, "compaction": False},
        note="per_device_train_batch_size=1 and accumulation: no pair is padded to another's length",
    ),
    "trl_compacted": Row(
        title="TRL, the same, made to score completions only",
        module=TRL,
        options={"precompute": True, "checkpointing": False, "micro": 1, "compaction": True},
        note="patched (trl.trainer.utils._use_triton) so that a CPU too scores completions only, as on CUDA",
    ),
}
BASE = ("trl_best", "trl_accumulated")  # the faster of these is "TRL's best"; compaction is a patch, and stands beside


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """How pairs of a known file are trained on: about 4096 tokens in TRL's largest batch."""

    max_length: int = 512
    batch: int = 4  # pairs a step
    pairs: int = 24  # the first so many usable ones
    source: str | None = None
    sha256: str | None = None
    """Of the file that the published figures are from."""


DATA_SETS = {
    "hh_harmless_test": DataSet(
        pairs=16,
        source="anthropics/hh-rlhf, harmless-base/test.jsonl.gz (MIT)",
        sha256="ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    ),
    "dpo_en_demo": DataSet(
        max_length=1024,
        batch=2,
        pairs=6,
        source="hiyouga/LLaMA-Factory, data/dpo_en_demo.json (Apache-2.0), without one row",
        sha256="9ac01d2cd81b7cec3afbb17a7d7cb84b9bfb5fd1b85e55a36d03cfa5f3eb3c77",
    ),
    "polite_vs_rude": DataSet(
        pairs=32,
        source="rasbt/LLMs-from-scratch, ch07/04_preference-tuning-with-dpo (Apache-2.0)",
        sha256="305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
    ),
    "concise_train": DataSet(pairs=32, source="examples/concise_train.jsonl of this project"),
}
OTHER = DataSet()
_SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json", ".csv.gz", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every row of a data set is told alike."""

    case: str  # name of the data set
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
    sha256: str | None = None  # of the file

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
    common = {"implementation": name, "title": row.title, "note": row.note, **row.options}
    why = missing_packages("trl", "datasets") if row.module == TRL else None
    if why:
        return common | {"status": why}
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(specification(name, job, Path(folder))), encoding="utf-8")
        neighbours.start()
        try:
            done = run_watched(
                [sys.executable, "-m", row.module, str(path)], env=_environment(job, Path(folder)), limit_s=limit_s
            )
        except OverLimit as error:
            return common | {"status": f"not measured: {error}"}
        except RuntimeError as error:
            said = str(error)
            return common | {"status": f"failed: {said.splitlines()[-1][:160]}", "tail": said}
        neighbours.keep()
    return {
        **common,
        **figures(last_json(done.stdout)),
        "peak_rss_mb": done.peak_rss_mb,
        "process_s": done.seconds,
        "process_cpu_s": done.cpu_seconds,
        "others_share": neighbours.shares,
        "unquotable": neighbours.why,
    }


def run_here(name: str, job: Job) -> Record:
    """The same in this process, for `--smoke`: no memory, and no fresh start."""
    row = ROWS[name]
    common = {"implementation": name, "title": row.title, "note": row.note, **row.options}
    why = missing_packages("trl", "datasets") if row.module == TRL else None
    if why:
        return common | {"status": why}
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder, contextlib.redirect_stdout(io.StringIO()):
        found = importlib.import_module(row.module).run(specification(name, job, Path(folder)))
    return {**common, **figures(found), "peak_rss_mb": None, "unquotable": WHY}


def specification(name: str, job: Job, folder: Path) -> dict[str, Any]:
    """What a row's process is told."""
    return asdict(job) | ROWS[name].options | {"output_dir": str(folder / "out")}


def figures(result: dict[str, Any]) -> Record:
    """What a row's process found, and of its log what is compared."""
    log = result.pop("log")
    return {
        "status": "measured",
        **result,
        "losses": [entry["loss"] for entry in log],
        "first_loss": log[0]["loss"],
        "first_chosen": log[0]["logps/chosen"],
        "first_rejected": log[0]["logps/rejected"],
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
