"""How does a configuration that uses TRL's names become one of ours? By the table; what cannot be done is refused by name."""

from __future__ import annotations

import dataclasses
import logging
from functools import cache
from typing import Any

from dpo_engine.errors import ConfigError
from dpo_engine.losses import LOSSES
from dpo_engine.losses.table import parameter_names
from dpo_engine.train.trl_names import ALIAS, LOSS_TYPES, NO_EFFECT, ONLY, SAME, TRL_NAMES, TrlName

logger = logging.getLogger(__name__)


@cache
def say_once(line: str) -> None:
    """Log `line` as a warning, the first time that this process comes to it."""
    logger.warning(line)


def settle_names(config: Any) -> None:
    """Give each of our keys what TRL's name for it was given, and refuse what TRL can do and the engine cannot.

    Aliases read None afterwards, so that an attribute set later is seen when this is called again. What a name stands for
    is said once, and so are the defaults that differ from TRL's where one of its names shows where the script comes from.

    Args:
        config: a `DPOConfig` or what derives from it.

    Raises:
        ConfigError: a value that cannot be done, or an alias and its key that differ.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    is_of_trl = False
    for row in TRL_NAMES:
        if row.kind == SAME or row.name not in fields:
            continue
        given = plain(getattr(config, row.name))
        if given == row.not_given:
            continue
        is_of_trl = True
        check_value(row, given)
        if row.kind == NO_EFFECT:
            say_once(f"{row.name}={given!r} (TRL's) has no effect: {row.note}")
        if row.kind == ALIAS:
            ours, own = our_value(row, given), getattr(config, row.to)
            if own not in (fields[row.to].default, ours):
                raise both_given(row, given, own)
            setattr(config, row.to, ours)
            setattr(config, row.name, None)
            say_once(_alias_line(row, given, ours, with_note=given != "sigmoid" or bool(config.label_smoothing)))
    if is_of_trl:
        config._is_of_trl = True
    was_said = vars(config).get("_defaults_said", False)  # what has no effect stays, and is seen again
    if is_of_trl and not was_said and (line := _defaults_line(config, fields)):
        say_once(line)
        config._defaults_said = True


def check_value(row: TrlName, given: Any) -> None:
    """Raise a `ConfigError` unless the value can be done."""
    if row.kind == ONLY and given not in row.only:
        expected = " or ".join(_shown(value) for value in row.only)
        raise ConfigError(f"{row.name}={given!r} (TRL's) cannot be done here; expected {expected}; {row.note}")


def our_value(row: TrlName, given: Any) -> Any:
    """What an alias's value is for our key.

    Raises:
        ConfigError: there is no such value, or the loss is not one that there is.
    """
    if row.name == "loss_type":
        return _method(given)
    if row.values is None:
        return given
    if given not in row.values:
        raise ConfigError(
            f"{row.name}={given!r} (TRL's name for {row.to}) is not known; expected one of {', '.join(row.values)}"
        )
    return row.values[given]


def both_given(row: TrlName, given: Any, own: Any) -> ConfigError:
    """What is said where an alias and its key are given and differ."""
    return ConfigError(
        f"{row.name}={given!r} (TRL's name for {row.to}) and {row.to}={own!r} are both given and differ; expected one of them"
    )


def plain(value: Any) -> Any:
    """An enum's value (TRL 0.24 has one of f-divergences), and a tuple as a list."""
    value = getattr(value, "value", value)
    return list(value) if isinstance(value, tuple) else value


def _method(loss_type: Any) -> str:
    """The method, or mixture, of TRL's `loss_type`: a name or a list of names."""
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    names = [part.strip() for name in names for part in str(name).split(",")]
    return "+".join(map(_method_of, names))


def _method_of(name: str) -> str:
    """The method of one of TRL's losses."""
    if name not in LOSS_TYPES:
        known = [key for key, entry in LOSS_TYPES.items() if entry.method]
        hint = f"method: {name} is one here; " if name in LOSSES else ""
        raise ConfigError(
            f"loss_type={name!r} is not one of TRL's for pairs; {hint}expected one of {', '.join(known)}, or method"
        )
    found = LOSS_TYPES[name]
    if found.method:
        return found.method
    note = f" ({found.note})" if found.note else ""
    raise ConfigError(
        f"loss_type={name!r} (TRL's) has no method of the same formula{note}; the nearest that is: method {found.nearest!r}; "
        f"expected one of {', '.join(sorted(LOSSES))}"
    )


def _alias_line(row: TrlName, given: Any, ours: Any, *, with_note: bool) -> str:
    note = row.note
    if row.name == "loss_type":
        names = [given] if isinstance(given, str) else given
        said = [str(name) for name in names if name != "sigmoid" or len(names) == 1]
        note = " ".join(LOSS_TYPES[name].note for name in said if name in LOSS_TYPES).strip()
    return f"{row.name}={given!r} is TRL's name for {row.to}={ours!r}" + (f". {note}" if note and with_note else "")


def _defaults_line(config: Any, fields: dict[str, Any]) -> str:
    """Which settings are left at a default that is not TRL's."""
    left = []
    for row in TRL_NAMES:
        if row.kind == SAME and row.name in fields and row.owner == "DPOConfig":
            default = fields[row.name].default
            if differs(row, default) and getattr(config, row.name) == default:
                left.append(f"{row.name} {_shown(default)} (TRL: {_shown(row.default)})")
    return f"defaults that are not TRL's, and were left: {', '.join(left)}" if left else ""


def differs(row: TrlName, default: Any) -> bool:
    """Whether our default means something else than TRL's."""
    if row.name in parameter_names():  # None is TRL's for the methods that both have
        return False
    return bool(default != row.default)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
