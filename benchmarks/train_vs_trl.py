"""How fast does the engine train beside TRL, on the same pairs, and in how much memory?

    python benchmarks/train_vs_trl.py                           HH pairs, SmolLM2-135M, LoRA r=16, batch 4, max_length 512
    python benchmarks/train_vs_trl.py --dtype bfloat16 --steps 3 --only engine trl_precomputed

Every run is a fresh process. The engine runs as a user runs it, `dpo-engine train ... --json`; TRL runs in `trl_side.py`.
Both get the same pairs in the same order, and TRL's token ids are compared with the engine's before it may start.

pairs/s is over the optimiser steps after the first. TRL's reference pass, where it precomputes, is outside of that and
stands beside it; "with reference" counts it in, over the whole of train(). Memory is each process's peak resident
set, read from outside.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, Finished, describe_machine, last_json, quantile, run_watched, table, write_results

sys.path.insert(0, str(ROOT))

SHARED_DATA = ROOT.parent / "shared" / "data" / "hh_harmless_test.jsonl.gz"
START = math.log(2)  # DPO's loss where policy and reference are one

TRL_ON_CPU = "TRL scores prompt and padding positions on CPU"
RUNS: dict[str, dict[str, bool]] = {
    "engine": {"precompute": False},
    "engine_precomputed": {"precompute": True},
    "trl_precomputed": {"precompute": True, "gradient_checkpointing": False},
    "trl_on_the_fly": {"precompute": False, "gradient_checkpointing": False},
    "trl_default": {"precompute": False, "gradient_checkpointing": True},
}
TITLES = {
    "engine": "dpo-engine",
    "engine_precomputed": "dpo-engine, reference precomputed",
    "trl_precomputed": "TRL, reference precomputed",
    "trl_on_the_fly": "TRL, reference on the fly",
    "trl_default": "TRL as it comes (checkpointing)",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every run is told alike."""

    model_path: str
    data: str
    pairs: list[dict[str, Any]]
    dtype: str
    batch: int
    max_length: int
    max_steps: int
    learning_rate: float
    beta: float
    lora_r: int
    lora_alpha: float
    seed: int
    threads: int


def read_pairs(data: str, model_path: str, max_length: int, count: int) -> list[dict[str, Any]]:
    """The first `count` usable pairs: ids as the engine trains on them, and the text that they are the ids of.

    The text is decoded from the ids, chat template and all, so that TRL (which adds nothing to plain text but an end
    token that is there already) has the same to tokenise.
    """
    from dpo_engine.data import load_pairs
    from dpo_engine.model.loading import load_tokenizer

    tokenizer = load_tokenizer(model_path)
    trees = load_pairs(data, tokenizer, max_length=max_length, limit=count).trees
    if len(trees) < count:
        raise SystemExit(f"error: {data} has {len(trees)} usable pairs; expected --pairs {count} of them")
    pairs: list[dict[str, Any]] = []
    for tree in trees:
        ids = {"prompt": tree.prompt_ids, "chosen": tree.completions[0], "rejected": tree.completions[1]}
        pairs.append({name: tokenizer.decode(part) for name, part in ids.items()})
        pairs[-1] |= {f"{name}_ids": part for name, part in ids.items()}
    return pairs


# ---- one run ----


def run_engine(job: Job, folder: Path, *, precompute: bool) -> dict[str, Any]:
    """`dpo-engine train` in a process of its own."""
    output = folder / "engine"
    options = {
        "model": job.model_path,
        "data": job.data,
        "max_pairs": len(job.pairs),
        "precompute_ref_log_probs": str(precompute).lower(),
        "dtype": job.dtype,
        "per_device_train_batch_size": job.batch,
        "max_length": job.max_length,
        "max_steps": job.max_steps,
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "beta": job.beta,
        "lora_r": job.lora_r,
        "lora_alpha": job.lora_alpha,
        "seed": job.seed,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "picture": "false",
        "output_dir": output,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "dpo_engine.cli.main", "train", *flags, "--json"]
    done = run_watched(command, env=_environment(job, folder))
    result = last_json(done.stdout)
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return (
        _common(done, [entry for entry in history if "loss" in entry])
        | {
            "pairs_per_s": result["pairs_per_s"],
            "steps": result["steps"],
            "reference_s": result["reference_s"],  # 0 where it is computed in every step, and so part of pairs_per_s
            "train_s": next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry),
            "head_positions": sum(
                len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in job.pairs[: result["steps"] * job.batch]
            ),
            "trainable_parameters": _stored_parameters(output / "adapter_model.safetensors"),
            "peak_cuda_mb": result["peak_cuda_mb"],
            "own_peak_rss_mb": result["peak_rss_mb"],
        }
    )


def run_trl(job: Job, folder: Path, *, precompute: bool, gradient_checkpointing: bool) -> dict[str, Any]:
    """`trl_side.py` in a process of its own."""
    spec = vars(job) | {
        "precompute": precompute,
        "gradient_checkpointing": gradient_checkpointing,
        "output_dir": str(folder / "trl"),
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("trl_side.py")), str(path)]
    done = run_watched(command, env=_environment(job, folder))
    result = last_json(done.stdout)
    later = result["step_seconds"][1:]
    return _common(done, result["log"]) | {
        "pairs_per_s": len(later) * job.batch / sum(later) if later else None,
        "steps": len(result["step_seconds"]),
        "reference_s": result["reference_seconds"],
        "train_s": result["train_seconds"],
        "head_positions": result["head_positions"],
        "trainable_parameters": result["trainable_parameters"],
        "peak_cuda_mb": result["peak_cuda_mb"],
        "trl": result["trl"],
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


def _common(done: Finished, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What both sides log under the same names."""
    return {
        "peak_rss_mb": done.peak_rss_mb,
        "process_s": done.seconds,
        "process_cpu_s": done.cpu_seconds,
        "losses": [entry["loss"] for entry in log],
        "logps_chosen": [entry["logps/chosen"] for entry in log],
        "grad_norms": [entry["grad_norm"] for entry in log],
    }


def _stored_parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


# ---- what comes of it ----


def compare(records: Sequence[dict[str, Any]], job: Job) -> list[str]:
    """The table and the lines below it."""
    by_run = {name: [record for record in records if record["run"] == name] for name in RUNS}
    by_run = {name: found for name, found in by_run.items() if found}

    def middle(name: str, key: str) -> float:
        values = [record[key] for record in by_run[name] if record[key] is not None]
        return quantile(values, 0.5) if values else math.nan

    def ratio(name: str, key: str, form: str) -> str:
        # Like with like: where the reference is precomputed, so is ours, if that was run.
        alike = name.endswith("_precomputed") and "engine_precomputed" in by_run
        base = "engine_precomputed" if alike else "engine"
        return form.format(middle(base, key) / middle(name, key)) if base in by_run else "-"

    header = ["run", "pairs/s", "engine is", "with reference", "engine is", "peak RSS MB", "engine takes"]
    header += ["reference s", "train() s", "first loss", "head rows"]
    rows = [
        (
            TITLES[name],
            f"{middle(name, 'pairs_per_s'):.3f}",
            ratio(name, "pairs_per_s", "{:.2f}x"),
            f"{middle(name, 'pairs_per_s_with_reference'):.3f}",
            ratio(name, "pairs_per_s_with_reference", "{:.2f}x"),
            f"{middle(name, 'peak_rss_mb'):.0f}",
            ratio(name, "peak_rss_mb", "{:.2f}"),
            f"{middle(name, 'reference_s'):.1f}",
            f"{middle(name, 'train_s'):.1f}",
            f"{found[0]['losses'][0]:.4f}",
            str(found[0]["head_positions"]),
        )
        for name, found in by_run.items()
    ]
    steps = next(iter(records))["steps"]
    lines = [
        f"{len(job.pairs)} pairs, {steps} steps of {job.batch}, max_length {job.max_length}, LoRA r={job.lora_r} on all linear "
        f"layers, {job.dtype}, {job.threads} threads",
        table(header, rows),
    ]
    on_cpu = all(record["peak_cuda_mb"] is None for record in records)
    if on_cpu and any(name.startswith("trl") for name in by_run):
        lines.append(
            f'{TRL_ON_CPU}: "head rows" are the rows of hidden states that the policy\'s forwards put through the head.'
        )
    wrong = [name for name, found in by_run.items() if abs(found[0]["losses"][0] - START) > 5e-4]
    for name in wrong:
        lines.append(
            f"CAUTION: {TITLES[name]} starts at loss {by_run[name][0]['losses'][0]:.5f}, expected ln 2 = {START:.5f}"
        )
    trained = {record["trainable_parameters"] for record in records}
    if len(trained) > 1:
        lines.append(f"CAUTION: the runs train different numbers of parameters: {sorted(trained)}")
    starts = {TITLES[name]: round(found[0]["logps_chosen"][0], 3) for name, found in by_run.items()}
    lines.append(f"mean chosen log-prob of the first step: {starts}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(SHARED_DATA) if SHARED_DATA.exists() else None, help="preference pairs")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=64, help="first so many usable pairs")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps; -1 for all pairs once")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--lora_alpha", type=float, default=32.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=describe_machine()["cores"])
    parser.add_argument("--repeats", type=int, default=1, help="rounds over all runs; the table shows medians")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(RUNS),
        default=["engine", "engine_precomputed", "trl_precomputed", "trl_on_the_fly"],
    )
    parser.add_argument("--no_save", action="store_true", help="print only")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data is needed: a file of preference pairs, such as HH-RLHF's harmless-base test.jsonl.gz")
    if args.pairs % args.batch:
        parser.error(
            f"--pairs {args.pairs} is no multiple of --batch {args.batch}; a smaller last step would blur pairs/s"
        )

    import torch

    from dpo_engine.model.loading import resolve_dtype, resolve_model

    model_path = str(resolve_model(args.model, progress=lambda line: print(line, file=sys.stderr)))
    job = Job(
        model_path=model_path,
        data=args.data,
        pairs=read_pairs(args.data, model_path, args.max_length, args.pairs),
        dtype=str(resolve_dtype(args.dtype)).removeprefix("torch."),
        batch=args.batch,
        max_length=args.max_length,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        beta=args.beta,
        lora_r=args.lora_r,
        lora_alpha=args.lora_alpha,
        seed=args.seed,
        threads=args.threads,
    )
    machine = describe_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    settings = {name: value for name, value in vars(job).items() if name not in ("pairs", "model_path", "data")}
    settings |= {"model": args.model, "data": Path(args.data).name, "pairs": len(job.pairs)}
    records: list[dict[str, Any]] = []
    for number in range(args.repeats):
        order = args.only if number % 2 == 0 else list(reversed(args.only))
        for name in order:
            print(f"running: {TITLES[name]}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
                if name.startswith("engine"):
                    record = run_engine(job, Path(folder), **RUNS[name])
                else:
                    record = run_trl(job, Path(folder), **RUNS[name])
            seen = record["steps"] * job.batch
            record["pairs_per_s_with_reference"] = seen / (
                record["train_s"] + record["reference_s"] * seen / args.pairs
            )
            records.append({"run": name, "repeat": number, **RUNS[name], **settings, **record})
    print("\n".join(compare(records, job)))
    if not args.no_save:
        note = TRL_ON_CPU if not torch.cuda.is_available() else None
        saved = [{**record, "note": note if record["run"].startswith("trl") else None} for record in records]
        print(f"written to {write_results('train_vs_trl', saved, machine=machine)}")


if __name__ == "__main__":
    main()
