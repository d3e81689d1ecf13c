"""TRL's own trainers on this operator, by one line.

    import dpo_engine.integrations.trl as x
    x.install()         # before or after a trainer is made; x.uninstall() gives TRL back as it was
    with x.installed(): ...

TRL's code, data, losses and metrics stay what they are; only where it would build logits of size tokens x vocabulary, or score by
its own chunked function, `linear_logps` computes what it asks of them (docs/trl.md). Releases 0.19 to 1.16 are known; any other is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dpo_engine.integrations.trl.installing import Installed, install, uninstall

__all__ = ["Installed", "install", "installed", "uninstall"]


@contextmanager
def installed() -> Iterator[Installed]:
    """`install()` on entry, `uninstall()` on exit; inside an `install()` it changes nothing."""
    from dpo_engine.integrations.trl.installing import is_installed

    before = is_installed()
    done = install()
    try:
        yield done
    finally:
        if not before:
            uninstall()
