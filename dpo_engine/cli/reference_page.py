"""What is every key of `dpo-engine train`? A page, written from the configuration itself, so that it cannot be out of date.

python -m dpo_engine.cli.reference_page > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from transformers import TrainingArguments, __version__

from dpo_engine.train.config import DPOConfig
from dpo_engine.train.method_arguments import MethodArguments
from dpo_engine.train.run import TrainConfig
from dpo_engine.train.trl_names import SAME, TRL_NAMES

_HEAD = """# Every key of a run

<!-- Written by `python -m dpo_engine.cli.reference_page`; a test holds this page to the configuration. -->

Keys of the YAML file that `dpo-engine train` takes, and its flags (`--key value`), are the fields of one configuration;
flags win over the file. `DPOConfig` has all tables but the first as arguments. A key that is not here is refused, with
the nearest that is; TRL's names are taken too, and have [a page of their own](trl-differences.md). Where the default reads
"none", the text says what that means."""
_TITLES = {
    TrainConfig: "Of the command: model, data, adapters, output",
    MethodArguments: "Of the method",
    DPOConfig: "Of the trainer",
    TrainingArguments: f"From `transformers.TrainingArguments`, as version {__version__} has them",
}


def page() -> str:
    """The page, as Markdown."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig) if field.init}
    annotated = {name for owner in (TrainConfig, MethodArguments, DPOConfig) for name in inspect.get_annotations(owner)}
    of_trl = {row.name for row in TRL_NAMES if row.kind != SAME} - annotated
    left, parts = set(fields) - of_trl, [_HEAD]
    for owner, title in _TITLES.items():
        own = [name for name in (*inspect.get_annotations(owner), *fields) if name in left]
        if owner is not TrainingArguments:
            own = [name for name in own if name in inspect.get_annotations(owner)]
        left -= set(own)
        parts += ["", f"## {title}", "", "| key | type | default | what it is |", "|---|---|---|---|"]
        parts += [_row(fields[name]) for name in dict.fromkeys(own)]
    return "\n".join(parts) + "\n"


def _row(field: dataclasses.Field[Any]) -> str:
    factory: Any = field.default_factory
    default: Any = field.default
    if default is dataclasses.MISSING:
        default = "(must be given)" if factory is dataclasses.MISSING else factory()
    default = getattr(default, "value", default)
    shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    text = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%").replace("|", "\\|")
    shown = f"`{shown}`" if shown else '`""`'
    return f"| `{field.name}` | {_kind(field.type)} | {shown} | {text} |"


def _kind(annotation: Any) -> str:
    """A type as people write it in YAML."""
    if not isinstance(annotation, str):
        arguments = typing.get_args(annotation)
        kinds = [_kind(argument) for argument in arguments if argument is not type(None)]
        if typing.get_origin(annotation) in (list, dict) or not arguments:
            return getattr(annotation, "__name__", str(annotation))
        return " or ".join(dict.fromkeys(kinds))
    words = [word.strip() for word in annotation.replace("Optional[", "").replace("Union[", "").split("|")]
    return " or ".join(word.rstrip("]") if "[" not in word else word for word in words if word != "None")


if __name__ == "__main__":
    print(page(), end="")
