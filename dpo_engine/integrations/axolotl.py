"""Axolotl's DPO, IPO, KTO, ORPO and SimPO on this operator, by one line of its YAML file.

    plugins:
      - dpo_engine.integrations.axolotl.DPOEnginePlugin

Axolotl's trainers are TRL's, with what it adds around them, so this is `dpo_engine.integrations.trl.install()` at the right time:
when a configuration is read, which every process that trains does, and before Axolotl replaces parts of TRL itself.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from axolotl.integrations.base import BasePlugin

from dpo_engine.errors import IntegrationError
from dpo_engine.integrations import trl

__all__ = ["DPOEnginePlugin"]

KNOWN = ("0.19.0",)
METHODS = ("dpo", "ipo", "kto", "orpo", "simpo")


class DPOEnginePlugin(BasePlugin):
    """Named in `plugins:`."""

    def register(self, cfg: Any) -> None:
        """Called once a process, with the configuration as it stands in the file.

        Raises:
            IntegrationError: another version of Axolotl, or a method that the operator does not score; nothing was changed.
        """
        version = metadata.version("axolotl")
        if version not in KNOWN:
            raise IntegrationError(
                f"Axolotl {version} is not known; expected {' or '.join(KNOWN)}: install it, or take this plugin out"
            )
        method = getattr(cfg.get("rl"), "value", cfg.get("rl"))
        if method not in METHODS:
            raise IntegrationError(
                f"rl: {method}; expected one of {', '.join(METHODS)}, or take this plugin out of plugins"
            )
        print(trl.install(), flush=True)

    def on_config_validation_error(self, cfg: Any) -> None:
        trl.uninstall()
