"""How do a YAML file and flags become one configuration? Both name the dataclass's fields; flags win."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from dpo_engine.errors import ConfigError
from dpo_engine.train.trl_names import ALIAS, SAME, TRL_NAMES, trl_name
from dpo_engine.train.trl_settle import both_given, check_value, our_value

Config = TypeVar("Config")


class _Parser(HfArgumentParser):
    """transformers' parser, with errors that are raised instead of printed."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see dpo-engine train --help")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which would let the last of two equal keys win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """`[CONFIG.yaml] [--key value ...]` -> a checked `config_class`.

    Raises:
        ConfigError: a file that is missing or not a mapping, an unknown key (with the nearest known one), a value of
        the wrong
            type or out of range.
    """
    files, flags = _split(arguments)
    given: dict[str, Any] = {}
    for file in files:
        given |= _read_yaml(Path(file))
    known = [field.name for field in dataclasses.fields(config_class) if field.init]  # type: ignore[arg-type]
    given |= {name.replace("-", "_"): value for name, value in flags.items()}
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{name} is not an option{nearest(name, known)}; see dpo-engine train --help for all of them"
            )
        row = trl_name(name)
        if row is not None and isinstance(given[name], list):  # which may be nested, and then is no flag
            check_value(row, given[name])
    unset = {name for name, value in given.items() if value is None}
    tokens = [token for name, value in given.items() if name not in unset for token in _as_tokens(name, value)]
    parser = _Parser(config_class, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    values = vars(parser.parse_args(tokens)) | dict.fromkeys(unset)
    _check_aliases(given, values)
    try:
        return config_class(**{name: values[name] for name in known if name in values})
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def help_text(config_class: type, own: Iterable[type]) -> str:
    """Every option with its default, those of `own` classes first."""
    lines = [
        "usage: dpo-engine train [CONFIG.yaml] [--key value ...] [--json]",
        "",
        "Keys of the YAML file and flags are the same; flags win. With --json the last line of stdout is one JSON object.",
    ]
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    ours = [name for cls in own for name in inspect.get_annotations(cls) if name in fields]
    of_trl = [row.name for row in TRL_NAMES if row.kind != SAME and row.name in fields and row.name not in ours]
    for title, names in (
        ("Options", ours),
        ("From transformers.TrainingArguments", [n for n in fields if n not in ours and n not in of_trl]),
        ("TRL's names, for what runs there (docs/trl-differences.md)", of_trl),
    ):
        lines += ["", f"{title}:"]
        for name in names:
            field = fields[name]
            default = "" if field.default in (dataclasses.MISSING, None) else f" [{field.default}]"
            text = " ".join(str(field.metadata.get("help", "")).split()).replace(
                "%%", "%"
            )  # argparse's way to write it
            lines.append(f"  --{name}{default}" + (f"\n        {text}" if text else ""))
    return "\n".join(lines)


def _check_aliases(given: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse an alias and its key that are both given and differ, also where the key was given its default."""
    for row in TRL_NAMES:
        if row.kind != ALIAS or row.name not in given or row.to not in given or values[row.name] is None:
            continue
        if our_value(row, values[row.name]) != values[row.to]:
            raise both_given(row, values[row.name], values[row.to])


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean X"` where something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Files before the first flag, then `--key value...`, `--key=value` or a bare `--key` (true)."""
    files: list[str] = []
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for token in arguments:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            if name in flags:
                raise ConfigError(f"--{name} is given twice; expected it once")
            current = flags[name] = [value] if equals else []
        elif current is None:
            files.append(token)
        else:
            current.append(token)
    if len(files) > 1:
        raise ConfigError(
            f"{len(files)} files are given ({', '.join(files)}); expected one YAML file, then --key value flags"
        )
    return files, {name: _flag_value(values) for name, values in flags.items()}


def _flag_value(values: list[str]) -> Any:
    if not values:
        return True
    if len(values) == 1:
        return None if values[0].lower() in ("none", "null") else values[0]
    return values


def _as_tokens(name: str, value: Any) -> list[str]:
    """One option as command-line tokens, so that YAML values go through the same typed parser as flags."""
    if isinstance(value, bool):
        return [f"--{name}", str(value).lower()]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list):
        if any(isinstance(item, (list, dict)) for item in value):
            raise ConfigError(f"{name}={value!r} is nested; expected a flat list")
        return [f"--{name}", *map(str, value)]
    # "=" keeps a value that starts with a dash from being read as a flag.
    return [f"--{name}={value}"]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML file of options") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start}); expected a YAML file of options") from error
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: {getattr(error, 'problem', None) or 'is not YAML'}; expected lines of `key: value`"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: holds {type(values).__name__}; expected lines of `key: value`")
    return values
