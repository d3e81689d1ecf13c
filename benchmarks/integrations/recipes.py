"""Do LLaMA-Factory and Axolotl train the same by their own commands with the engine as without? Tiny models, three steps.

    make integrations TRL=llamafactory      or axolotl

Each is started as its users start it, in its environment (`releases.py`), once as it comes and once with the one
change that docs/llama-factory-axolotl.md names. What it logs must agree to 1e-4, relative where it exceeds 1 (Axolotl rounds
what it logs to 4 digits: 2e-3).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Finished, run_watched

STEPS, BATCH = 3, 4
# `python -m` would put the working folder before all else, and with it the checkout and its folder `kernels/`.
SAFE = {"PYTHONSAFEPATH": "1"}
LLAMAFACTORY = {
    "dpo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "sigmoid", "finetuning_type": "lora"},
    "dpo-full": {
        "stage": "dpo",
        "dataset": "pairs",
        "pref_loss": "sigmoid",
        "pref_ftx": 0.1,
        "finetuning_type": "full",
    },
    "orpo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo", "finetuning_type": "lora"},
    "simpo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo", "finetuning_type": "lora"},
    "kto": {"stage": "kto", "dataset": "unpaired", "finetuning_type": "lora"},
    "dpo-two-ranks": {"stage": "dpo", "dataset": "pairs", "pref_loss": "sigmoid", "finetuning_type": "lora"},
}
# Full fine-tuning: with LoRA two runs without the change differed as well, it seems by the random numbers of its start.
AXOLOTL: dict[str, dict[str, Any]] = {
    "dpo": {"rl": "dpo"},
    "simpo": {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 0.5},
    "orpo": {"rl": "orpo", "orpo_alpha": 0.1},
}
CASES: dict[str, Mapping[str, Mapping[str, Any]]] = {"llamafactory": LLAMAFACTORY, "axolotl": AXOLOTL}
INPUTS = """
import json, sys
import benchmarks.integrations.case as c
folder = sys.argv[1]
c._tiny_model("llama", folder)
c._tiny_tokenizer().save_pretrained(folder + "/model")
rows = [{key: text.strip() for key, text in row.items()} for row in c._random_rows(64)]
halves = [(row, ("chosen", "rejected")[i % 2]) for i, row in enumerate(rows)]
json.dump(rows, open(folder + "/pairs.json", "w"))
json.dump(
    [
        {
            "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}],
            "label": key == "chosen",
        }
        for row, key in halves
    ],
    open(folder + "/unpaired.json", "w"),
)
with open(folder + "/pairs.jsonl", "w") as file:
    file.writelines(json.dumps({**row, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]}) + "\\n" for row in rows)
"""


def make_inputs(python: Path, folder: Path, engine: Path, env: Mapping[str, str]) -> None:
    """A tiny model, its tokenizer, pairs and unpaired rows, made by the environment's own transformers."""
    run_watched([str(python), "-c", INPUTS, str(folder)], env=env, cwd=engine)
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    unpaired = {"messages": "messages", "kto_tag": "label"}
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
        "unpaired": {"file_name": "unpaired.json", "formatting": "sharegpt", "columns": unpaired, "tags": tags},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def train(
    tool: str, case: str, *, engine: bool, python: Path, folder: Path, env: Mapping[str, str]
) -> list[dict[str, Any]]:
    """What the tool logged, step by step.

    Raises:
        RuntimeError: it did not end well.
    """
    run = _llamafactory if tool == "llamafactory" else _axolotl
    return run(case, engine, python, folder, env)


def differences(tool: str, without: Sequence[Mapping[str, Any]], with_engine: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each logged figure that is not the same."""
    if not len(without) == len(with_engine) == STEPS:
        return [f"steps: {len(with_engine)} with the engine, {len(without)} without; expected {STEPS}"]
    lines = []
    for step, (its, mine) in enumerate(zip(without, with_engine, strict=True), 1):
        for key in sorted({*its, *mine}):
            a, b = float(its.get(key, "nan")), float(mine.get(key, "nan"))
            allowed = 1e-4 * max(1.0, abs(a)) if tool == "llamafactory" else 2e-3 * max(1e-2, abs(a))
            if not abs(a - b) <= allowed:
                lines.append(f"{key} of step {step}: {b} with the engine, {a} without")
    return lines


def _llamafactory(case: str, engine: bool, python: Path, folder: Path, env: Mapping[str, str]) -> list[dict[str, Any]]:
    out = folder / f"{case}-{engine}"
    config = {
        **LLAMAFACTORY[case],
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder),
        "output_dir": str(out),
        "template": "empty",
        "cutoff_len": 64,
        "do_train": True,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "lora_rank": 4,
        "lora_target": "all",
        "seed": 3,
    }
    path = folder / f"{case}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    bin_ = python.parent
    command = (
        [str(python), "-m", "dpo_engine.integrations.llamafactory"] if engine else [str(bin_ / "llamafactory-cli")]
    )
    ranks = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"} if case == "dpo-two-ranks" else {}
    settings = {**env, **ranks, **SAFE, "PATH": f"{bin_}:/usr/bin:/bin"}
    _check_the_line(run_watched([*command, "train", str(path)], env=settings, limit_s=900), engine)
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


def _axolotl(case: str, engine: bool, python: Path, folder: Path, env: Mapping[str, str]) -> list[dict[str, Any]]:
    fields = {f"field_{key}": key for key in ("prompt", "chosen", "rejected")}
    fields |= {f"{key}_format": f"{{{key}}}" for key in ("prompt", "chosen", "rejected")}
    config = {
        **AXOLOTL[case],
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "pairs.jsonl"), "ds_type": "json", "split": "train", "type": fields}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_processes": 1,
        "output_dir": str(folder / f"{case}-{engine}"),
        "sequence_len": 64,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        "use_cpu": True,
        "special_tokens": {"pad_token": "<pad>"},
        **({"plugins": ["dpo_engine.integrations.axolotl.DPOEnginePlugin"]} if engine else {}),
    }
    path = folder / f"{case}-{engine}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    done = run_watched([str(python), "-m", "axolotl.cli.train", str(path)], env={**env, **quiet, **SAFE}, limit_s=900)
    _check_the_line(done, engine)
    return [ast.literal_eval(entry) for entry in re.findall(r"\{'loss'.*?\}", done.stdout + done.stderr)]


def _check_the_line(done: Finished, engine: bool) -> None:
    """Whether the engine said that it is there, just where it should be: a change that does nothing changes no figure."""
    if ("scores without logits" in done.stdout + done.stderr) != engine:
        raise RuntimeError(
            f"'scores without logits' was {'not ' if engine else ''}printed; expected it with the engine alone"
        )
