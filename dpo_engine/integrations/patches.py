"""How are another package's names replaced, all or none, and given back exactly?"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

from dpo_engine.errors import IntegrationError


@dataclass(frozen=True)
class Place:
    """A name in a module, or in a class of it: `Place("trl.trainer.dpo_trainer", "DPOTrainer.compute_loss")`."""

    module: str
    path: str

    def __str__(self) -> str:
        return f"{self.module}.{self.path}"

    def owner(self) -> Any:
        """The module or class whose own attribute it is."""
        owner: Any = importlib.import_module(self.module)
        for name in self.path.split(".")[:-1]:
            owner = getattr(owner, name)
        return owner

    def now(self) -> Any:
        """What stands there, whoever put it; None for nothing."""
        return vars(self.owner()).get(self.path.rpartition(".")[2])

    def found(self) -> Any:
        """What stands there: the attribute itself, a staticmethod as such.

        Raises:
            IntegrationError: nothing does, or something that another package put there.
        """
        try:
            owner = self.owner()
            value = vars(owner)[self.path.rpartition(".")[2]]
        except (ImportError, AttributeError, KeyError) as error:
            raise IntegrationError(
                f"{self} is not there ({type(error).__name__}: {error}), though this version of the package should have it; "
                "nothing was changed: reinstall it, or leave install() out"
            ) from error
        home = getattr(getattr(value, "__func__", value), "__module__", None)
        if home is not None and home.split(".")[0] != self.module.split(".")[0]:
            raise IntegrationError(
                f"{self} was replaced by {home} before; expected the package's own: install() first, or one of the two only"
            )
        return value


class Patches:
    """Replacements that are in effect, and what stood there."""

    def __init__(self) -> None:
        self._before: list[tuple[Place, Any, Any]] = []  # what stood there, what stands there now

    def apply(self, replacements: dict[Place, Any]) -> None:
        """Put every value in its place; all places are looked up before the first is changed."""
        before = {place: place.found() for place in replacements}
        for place, value in replacements.items():
            self._before.append((place, before[place], value))
            setattr(place.owner(), place.path.rpartition(".")[2], value)

    def undo(self) -> None:
        """Put back what stood there, the same objects; what someone else has put on top since goes with it, and that is said."""
        while self._before:
            place, value, ours = self._before.pop()
            if place.now() is not ours:
                warnings.warn(
                    f"dpo_engine: {place} was changed by another since; the package's own is back", stacklevel=3
                )
            setattr(place.owner(), place.path.rpartition(".")[2], value)
