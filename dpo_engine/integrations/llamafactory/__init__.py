"""LLaMA-Factory's DPO and KTO stages on this operator.

    python -m dpo_engine.integrations.llamafactory train config.yaml    # in the place of `llamafactory-cli train config.yaml`

or, where a script of yours calls LLaMA-Factory:

    import dpo_engine.integrations.llamafactory as x
    x.install()        # x.uninstall() gives it back as it was
    with x.installed(): ...

Its trainers are TRL's by name only: `CustomDPOTrainer.concatenated_forward` and `CustomKTOTrainer.forward` ask the model for
logits, upcast them and hand them to a function of LLaMA-Factory's own, so `dpo_engine.integrations.trl` does not reach them. Both
methods stay what they are; while they run, the model answers with log-probs in the place of logits. Every `pref_loss` goes through
them. SFT, reward models and PPO do not, and are left alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpo_engine.errors import IntegrationError
from dpo_engine.integrations.patches import Patches, Place
from dpo_engine.integrations.scoring import Scope, Scored, scoring

__all__ = ["install", "installed", "uninstall"]

KNOWN = (
    "0.9.4",
    "0.9.5",
)  # in which both methods were read; before 0.9.4 the model is handed labels and makes a loss of its own
METHODS = (
    Place("llamafactory.train.dpo.trainer", "CustomDPOTrainer.concatenated_forward"),
    Place("llamafactory.train.kto.trainer", "CustomKTOTrainer.forward"),
)
_patches = Patches()
_version: str | None = None


def install() -> str:
    """Put the operator into the LLaMA-Factory that is installed. A second time does nothing more.

    Returns:
        LLaMA-Factory's version.

    Raises:
        IntegrationError: it is missing, of a version that is not known, or changed by another package; then nothing was changed.
    """
    global _version
    if _version is None:
        version = _installed_version()
        _patches.apply({place: _scoring(place.found()) for place in METHODS})
        _version = version
    return _version


def uninstall() -> None:
    """Give LLaMA-Factory its own methods back. Without an `install()` it does nothing."""
    global _version
    _patches.undo()
    _version = None


@contextmanager
def installed() -> Iterator[str]:
    """`install()` on entry, `uninstall()` on exit; inside an `install()` it changes nothing."""
    before = _version
    done = install()
    try:
        yield done
    finally:
        if before is None:
            uninstall()


def _installed_version() -> str:
    try:
        from llamafactory.extras.env import VERSION
    except ImportError as error:
        raise IntegrationError(
            f"LLaMA-Factory cannot be imported ({error}); expected an installed one: pip install llamafactory=={KNOWN[-1]}"
        ) from error
    if VERSION not in KNOWN:
        raise IntegrationError(
            f"LLaMA-Factory {VERSION} is not known; expected {' or '.join(KNOWN)}: install one of them, or leave install() out "
            "(nothing was changed)"
        )
    return str(VERSION)


def _scoring(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original(self, model, batch, ...)` with the models it asks bound to the operator while it runs."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        batch, prefix = given.arguments["batch"], given.arguments.get("prefix", "")  # KTO's second pass is "kl_"
        if self.is_encoder_decoder:
            return original(self, *args, **kwargs)
        scored = Scored(
            input_ids=batch[f"{prefix}input_ids"],
            mask=batch[f"{prefix}labels"] != self.label_pad_token_id,
        )
        scope = Scope(
            mean_logits="all",  # `logits/chosen` is a mean over padding too
            of_every_pass=not self.model.training,  # in training those without gradients are of the reference
            autocast=self.accelerator.autocast,
            batches=[scored],
        )
        with scoring((given.arguments["model"], self.model, self.ref_model), scope):
            return original(self, *args, **kwargs)

    return wrapper
