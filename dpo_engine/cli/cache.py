"""`dpo-engine cache`: what reference log-probs lie on disk, are they right, and what is missing of a data set?

Model, data and options are those of `dpo-engine train`, and are read in the same way, so that what `build` computes is what
`train` looks for.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from tqdm.auto import tqdm

from dpo_engine.cli.options import parse
from dpo_engine.errors import ConfigError
from dpo_engine.reference.cache import ReferenceCache, SpaceOnDisk
from dpo_engine.reference.filling import Filled, look_up
from dpo_engine.reference.guard import GUARDED_ROWS, some_rows
from dpo_engine.reference.values import ReferenceValues
from dpo_engine.train.reference import RunReference, cache_for
from dpo_engine.train.run import PreparedRun, Say, TrainConfig, prepare_run

SCHEMA = 1
_SHOWN = 20


@dataclass
class CacheConfig(TrainConfig):
    """The keys of `dpo-engine train`; a model and data may be given, both or none."""

    def require_inputs(self) -> None:
        self.output_dir = self.output_dir or "."  # nothing is written there
        if bool(self.model) != bool(self.data):
            given, other = ("model", "data") if self.model else ("data", "model")
            raise ConfigError(f"{given} is given without {other}; expected both, or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_cache == "off":
            raise ConfigError("reference_cache: off; expected a folder, on or auto for `dpo-engine cache`")
        if self.reference_cache == "auto":
            self.reference_cache = "on"


def cache_command(verb: str, arguments: Sequence[str], as_json: bool, **own: Any) -> None:
    """Run one verb. With `as_json` what is meant for people goes to stderr, and the last line of stdout is one JSON object.

    Raises:
        EngineError: options, data, a model or a folder that cannot be used.
        typer.Exit: with 1, where `verify` found something wrong.
    """
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|accelerate")
    out = sys.stderr if as_json else sys.stdout
    begin = time.perf_counter()
    config = parse(CacheConfig, arguments)
    cache = cache_for(config.reference_cache, is_lora=True)
    assert cache is not None
    result = _VERBS[verb](config, cache, lambda line: print(line, file=out, flush=True), **own)
    result = {"schema": SCHEMA, "verb": verb, "folder": str(cache.folder), **result}
    result["seconds"] = round(time.perf_counter() - begin, 3)
    if as_json:
        print(json.dumps(result))
    if result.get("mismatched") or (verb == "verify" and result["bad"]):
        raise typer.Exit(1)


def _build(config: CacheConfig, cache: ReferenceCache, say: Say) -> dict[str, Any]:
    prepared = _prepared(config, say, "build")
    for data, name in _data_sets(prepared):
        prepared.trainer.references.known(data, name)
    filled = prepared.trainer.references.filled
    rate = filled.computed / filled.seconds if filled.computed and filled.seconds else None
    return _counts(filled) | {"space": _address(prepared.trainer.references), "rows_per_s": rate}


def _info(config: CacheConfig, cache: ReferenceCache, say: Say) -> dict[str, Any]:
    if config.model:
        prepared = _prepared(config, say, "info")
        references = prepared.trainer.references
        filled = Filled()
        for data, name in _data_sets(prepared):
            found = _looked_up(references, data)[1]
            filled += found
            say(f"{name}: {found.reused} of {found.rows} rows are in the cache")
        _say_nearest(cache, references, filled, say)
        return _counts(filled) | {"space": _address(references)}
    spaces = cache.look()
    missing = "" if cache.folder.exists() else " (there is no such folder)"
    say(f"{cache.folder}: {len(spaces)} space{'s' if len(spaces) != 1 else ''}{missing}")
    for space in spaces:
        say(_space_line(space))
    return _counts(Filled(entries=sum(s.entries for s in spaces), bad=sum(s.bad for s in spaces))) | _spaces(spaces)


def _verify(config: CacheConfig, cache: ReferenceCache, say: Say, *, every: bool) -> dict[str, Any]:
    spaces = cache.look()
    entries, bad = sum(space.entries for space in spaces), sum(space.bad for space in spaces)
    say(f"{cache.folder}: {entries} entries fit their checksums, {bad} did not and were set aside")
    if not config.model:
        if every:
            raise ConfigError("verify --all computes rows again; give model and data, as to dpo-engine train")
        return _counts(Filled(entries=entries, bad=bad)) | _spaces(spaces) | {"mismatched": 0}
    prepared = _prepared(config, say, "verify")
    references = prepared.trainer.references
    filled, mismatches = Filled(), []
    for data, name in _data_sets(prepared):
        values, found = _looked_up(references, data)
        rows = found.found if every else some_rows(found.found, GUARDED_ROWS)
        with tqdm(total=len(rows), desc=f"verify, {name}", unit="row", disable=config.disable_tqdm) as bar:
            wrong = references.mismatches(values, rows, bar.update) if rows else []
        brought = [tree for tree in data if tree.reference_logps is not None]
        if brought:
            wrong += references.sum_mismatches(brought if every else brought[:GUARDED_ROWS])
        mismatches += wrong
        filled += found
        checked = len(rows) + (len(brought) if every else min(GUARDED_ROWS, len(brought)))
        filled.computed += checked
        sums = f", and {len(brought)} bring sums" if brought else ""
        say(
            f"{name}: {found.reused} of {found.rows} rows are in the cache{sums}; {checked} were computed again, "
            f"{len({mismatch.origin for mismatch in wrong})} of them are something else now"
        )
    for mismatch in mismatches[:_SHOWN]:
        say(f"  {mismatch}")
    filled.bad += bad
    return _counts(filled) | {
        "space": _address(references),
        "mismatched": len({mismatch.origin for mismatch in mismatches}),
        "mismatches": [vars(mismatch) for mismatch in mismatches],
    }


def _merge(config: CacheConfig, cache: ReferenceCache, say: Say, *, others: Sequence[str]) -> dict[str, Any]:
    cache.merge(others=[Path(other).expanduser() for other in others])
    return _info(_without_model(config), cache, say)


def _prune(
    config: CacheConfig, cache: ReferenceCache, say: Say, *, unused_days: float | None, space: str | None
) -> dict[str, Any]:
    removed = cache.prune(unused_days=unused_days, space=space)
    say(f"removed {len(removed)} spaces" + (f": {', '.join(removed)}" if removed else ""))
    return _info(_without_model(config), cache, say) | {"removed": removed}


_VERBS: dict[str, Any] = {"build": _build, "info": _info, "verify": _verify, "merge": _merge, "prune": _prune}


def _without_model(config: CacheConfig) -> CacheConfig:
    """What is left to say of the folder needs no model."""
    config.model = config.data = None
    return config


def _prepared(config: CacheConfig, say: Say, verb: str) -> PreparedRun:
    if not config.model:
        raise ConfigError(f"cache {verb} needs model and data, as dpo-engine train does")
    prepared = prepare_run(config, say, trains=False)
    method = prepared.trainer.method
    if not method.known_beforehand:
        why = "needs no reference" if not method.needs_reference else "has a reference that cannot be known beforehand"
        raise ConfigError(f"the method {config.method} {why}; expected one whose reference stays as it is, such as dpo")
    return prepared


def _data_sets(prepared: PreparedRun) -> list[tuple[Any, str]]:
    """As the method needs them: with the completions that it puts behind prompts of other rows."""
    trainer = prepared.trainer
    both = [(trainer.train_dataset, "train_dataset"), (trainer.eval_dataset, "eval_dataset")]
    return [(trainer.references.as_it_came(data), name) for data, name in both if data is not None]


def _looked_up(references: RunReference, data: Any) -> tuple[ReferenceValues, Filled]:
    """What the cache has of a data set; nothing is computed."""
    store = references.open(to_write=False)
    values = ReferenceValues(data)
    bad = store.bad if store else 0
    missing = set(look_up(values, store, range(len(values))))
    found = [index for index in range(len(values)) if index not in missing]
    entries = sum(len(values.trees[index].completions) for index in found)
    filled = Filled(
        rows=len(values), reused=len(found), entries=entries, bad=store.bad - bad if store else 0, found=found
    )
    return values, filled


def _say_nearest(cache: ReferenceCache, references: RunReference, filled: Filled, say: Say) -> None:
    """Why nothing was found, where another space of such a model is there."""
    if filled.reused or references.space is None:
        return
    nearest = cache.nearest(references.space)
    if nearest is not None:
        address, differences = nearest
        say(
            f"nothing is known of this model as it is loaded; {address[:8]} differs in {'; '.join(differences) or 'nothing'}"
        )


def _address(references: RunReference) -> str | None:
    return references.space.address if references.space else None


def _counts(filled: Filled) -> dict[str, Any]:
    return {
        "rows": filled.rows,
        "reused": filled.reused,
        "computed": filled.computed,
        "entries": filled.entries,
        "bad": filled.bad,
    }


def _spaces(spaces: Sequence[SpaceOnDisk]) -> dict[str, Any]:
    return {
        "spaces": [
            {
                "address": space.address,
                "model": space.about.get("model"),
                "files": space.files,
                "entries": space.entries,
                "bad": space.bad,
                "damaged_files": space.damaged_files,
                "bytes": space.bytes,
                "used_days_ago": round(space.used_days_ago, 2),
            }
            for space in spaces
        ]
    }


def _space_line(space: SpaceOnDisk) -> str:
    about = space.about
    dtypes = "+".join(about.get("compute", {}).get("dtypes", [])) or "?"
    quantised = ", quantised" if about.get("config", {}).get("quantization_config") else ""
    aside = f", {space.damaged_files} damaged files set aside" if space.damaged_files else ""
    files = f"{space.files} file{'s' if space.files != 1 else ''}"
    return (
        f"  {space.address}  {about.get('model', 'unknown model')}, {dtypes}{quantised}: {space.entries} entries, {files}, "
        f"{space.bytes / 2**20:.1f} MiB, used {space.used_days_ago:.1f} days ago{aside}"
    )
