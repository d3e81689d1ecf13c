"""What does a trained folder say about itself? A card for people, and the same facts for programs.

    README.md             model card: base and its licence, data, method, results, versions
    dpo_engine_run.json   the same facts

The licence is what the base states; where it states none, the card says so and names none.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dpo_engine.errors import ConfigError
from dpo_engine.model.adapters import ALL_LINEAR
from dpo_engine.model.files import sha256_of
from dpo_engine.model.fingerprint import weights_fingerprint
from dpo_engine.model.loading import PACKAGED
from dpo_engine.model.smollm2 import LICENSE, ORIGIN

if TYPE_CHECKING:
    from dpo_engine.train.run import PreparedRun, TrainConfig

RUN_FILE = "dpo_engine_run.json"
CARD_FILE = "README.md"
SCHEMA = 1
_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
_OTHER = "other"  # what a card says of a licence that has no name of its own


def write_run_card(folder: Path, config: TrainConfig, prepared: PreparedRun, result: dict[str, Any]) -> None:
    """Card and facts of a finished run, beside its weights; on the first rank alone. peft's own card is replaced."""
    if prepared.trainer.is_world_process_zero():
        write_card(folder, run_facts(config, prepared, result))


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """`facts` as `README.md` and `dpo_engine_run.json`; each file is whole or absent."""
    for name, text in ((RUN_FILE, json.dumps(facts, indent=2) + "\n"), (CARD_FILE, card_text(facts))):
        partial = folder / f".{name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / name)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What `dpo_engine_run.json` holds; None where there is none.

    Raises:
        ConfigError: a file that cannot be read, or of another schema.
    """
    path = folder / RUN_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}); mend it, or take it away") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is not of schema {SCHEMA}: another version wrote it; use that one, or take it away")
    return found


def run_facts(config: TrainConfig, prepared: PreparedRun, result: dict[str, Any]) -> dict[str, Any]:
    """Everything that the card of a run says, as JSON values."""
    name = str(config.model)
    method = config.entry.settings(config)
    if config.entry.parts:
        method = {part.name: method[part.name] | {"weight": weight} for weight, part in config.entry.parts}
    lora = {
        "r": config.lora_r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target_modules": config.lora_target_modules or ALL_LINEAR,
        **{name: True for name in ("lora_head", "use_dora", "use_rslora") if getattr(config, name)},
    }
    stacked = config.adapter is not None and config.adapter_mode == "stack"
    model: Any = prepared.trainer.model
    return {
        "schema": SCHEMA,
        "base": {
            "name": name,
            "path": prepared.model_path,
            "license": stated_license(name, prepared.model_path),
            "fingerprint": None if stacked else weights_fingerprint(prepared.model_path),
            **shape_of(model.config),
        },
        "from_adapter": {"folder": config.adapter, "mode": config.adapter_mode} if config.adapter else None,
        "data": _data_facts(config.data, prepared.data),
        "eval_data": _data_facts(config.eval_data, prepared.held_out),
        "method": config.method,
        "method_settings": method,
        "lora": lora if config.lora_r else None,
        "load_in_4bit": config.load_in_4bit,
        "dtype": result["dtype"],
        "settings": {
            "steps": result["steps"],
            "pairs_per_step": result["pairs_per_step"],
            "learning_rate": config.learning_rate,
            "lr_scheduler_type": str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)),
            "optim": str(getattr(config.optim, "value", config.optim)),
            "max_length": config.max_length,
            "truncation": config.truncation,
            "chat_template": config.chat_template,
            "seed": config.seed,
        },
        "results": {key: result[key] for key in ("accuracy", "margin", "held_out_loss")},
        "versions": versions(),
    }


def shape_of(config: Any) -> dict[str, int]:
    """What tells bases of different sizes apart."""
    text = config.get_text_config()
    return {name: int(getattr(text, name)) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}


def stated_license(name: str, path: str) -> str | None:
    """The licence that a model states in its README's front matter or its LICENSE file; None where it states none.

    Args:
        name: as the user gave it.
        path: what `resolve_model` made of it: a folder or a hub id, of which only what is cached is looked at.
    """
    if name == PACKAGED:
        return LICENSE
    readme, license_text = (_text_of(path, file) for file in ("README.md", "LICENSE"))
    front = re.match(r"---\s*\n(.*?)\n---", readme or "", re.DOTALL)
    if front:
        try:
            stated = yaml.safe_load(front[1])
        except yaml.YAMLError:
            stated = None
        if isinstance(stated, dict) and isinstance(stated.get("license"), str):
            return str(stated["license"])
    if license_text is None:
        return None
    if "Apache License" in license_text and "Version 2.0" in license_text:
        return "apache-2.0"
    return "mit" if license_text.lstrip().startswith("MIT License") else _OTHER


def versions() -> dict[str, str | None]:
    """Of everything that decides the numbers; None where a package is not installed."""
    from dpo_engine import __version__

    found: dict[str, str | None] = {"dpo-engine": __version__, "commit": _commit()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version()}


def card_text(facts: dict[str, Any]) -> str:
    """The card as Markdown with YAML front matter."""
    return "\n".join([_front_matter(facts), *_body(facts)]) + "\n"


def _front_matter(facts: dict[str, Any]) -> str:
    base, export = facts.get("base") or {}, facts.get("export")
    is_adapter = facts.get("lora") is not None and export is None
    tags = ["dpo-engine", facts.get("method"), facts.get("lora") and "lora", "merged" if export else None]
    front: dict[str, Any] = {"base_model": ORIGIN if base.get("name") == PACKAGED else base.get("name")}
    if base.get("license"):
        front["license"] = base["license"]
    front |= {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in tags if tag],
    }
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---\n"


def _body(facts: dict[str, Any]) -> list[str]:
    base, settings, export = facts.get("base") or {}, facts.get("settings") or {}, facts.get("export")
    what = "a merged model" if export else "a LoRA adapter" if facts.get("lora") else "a fine-tuned model"
    lines = [f"# {base.get('name')}, tuned on preference pairs", ""]
    lines += [f"This is {what}, made with dpo-engine.", "", "## Base", ""]
    lines += [f"- model: `{base.get('name')}`", f"- licence: {_licence_line(base.get('license'))}"]
    if not facts.get("method"):
        lines += ["", "How the adapter was trained is not recorded beside it.", ""]
    else:
        lines += [
            "",
            "## Data",
            "",
            _data_line("trained on", facts["data"]),
            _data_line("judged on", facts["eval_data"]),
        ]
        lines += ["", "## Method", "", f"- method: {facts['method']} ({_pairs(facts['method_settings'])})"]
        lines += [f"- LoRA: {_pairs(facts['lora'])}" if facts["lora"] else "- every parameter was trained"]
        if facts.get("from_adapter"):
            begun = facts["from_adapter"]
            how = "merged into the base first" if begun["mode"] == "stack" else "trained on"
            lines += [f"- began from the adapter {_one_line(begun['folder'])}, {how}"]
        quantised = ", the frozen weights in 4 bits (NF4, double quantisation)" if facts["load_in_4bit"] else ""
        lines += [f"- computed in {facts['dtype']}{quantised}", f"- {_pairs(settings)}"]
        lines += ["", "## Results", "", *_results(facts)]
    if export:
        lines += ["", "## Export", "", *_export_lines(export)]
    lines += ["", "## Versions", "", f"- {_pairs(facts['versions'])}"]
    return lines


def _licence_line(license_name: str | None) -> str:
    if license_name is None:
        return "not stated by the base as it was found; what it is has to be looked up before this is passed on"
    return "that of the base's LICENSE file" if license_name == _OTHER else f"{license_name}, as the base states"


def _data_line(verb: str, data: dict[str, Any] | None) -> str:
    if data is None:
        return f"- {verb}: nothing held out was given"
    digest = f", sha256 `{data['sha256']}`" if data["sha256"] else ""
    return f"- {verb}: `{data['name']}`, {data['rows_used']} of {data['rows_read']} rows used{digest}"


def _results(facts: dict[str, Any]) -> list[str]:
    if facts["eval_data"] is None:
        return ["No held-out pairs were given: nothing is known about unseen data."]
    rows = ["| held out | before | after |", "|---|---|---|"]
    names = {"accuracy": "reward accuracy", "margin": "reward margin (nats × beta)", "held_out_loss": "loss"}
    for key, label in names.items():
        values = facts["results"][key]
        shown = ["not measured" if values[when] is None else f"{values[when]:.4f}" for when in ("before", "after")]
        rows.append(f"| {label} | {shown[0]} | {shown[1]} |")
    return rows


def _export_lines(export: dict[str, Any]) -> list[str]:
    base = "the de-quantised NF4 base, which the adapter was trained on" if export["from_4bit"] else "the base"
    return [
        f"- merged in float32 into {base}, each weight rounded once, to {export['dtype']}",
        f"- against adapter and base in float32, over {export['check']['tokens']} tokens: mean {export['check']['mean']:.2e}, "
        f"largest {export['check']['max']:.2e} nats; the adapter itself moves them by {export['effect']:.2e} on average",
    ]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items() if value is not None)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _data_facts(name: str | None, data: Any) -> dict[str, Any] | None:
    if name is None or data is None:
        return None
    path = Path(name).expanduser()
    is_file = path.is_file()
    return {
        "name": path.name if is_file else name,
        "rows_read": data.report.rows_read,
        "rows_used": len(data),
        "sha256": sha256_of(path) if is_file else None,
    }


def _text_of(path: str, name: str) -> str | None:
    """A text file of a model folder, or of a hub model as far as it lies in the cache."""
    folder = Path(path)
    if folder.is_dir():
        file: str | Path | None = folder / name
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, name)
        file = found if isinstance(found, str) else None
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace") if file else None
    except OSError:
        return None


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None where the engine does not run from a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout that it does not trust
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _one_line(text: Any) -> str:
    """A name as it can stand in a line of Markdown."""
    return " ".join(str(text).split()).replace("`", "'")
