"""How does the operator get into TRL, and out again?"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_engine.errors import IntegrationError
from dpo_engine.integrations.patches import Patches, Place
from dpo_engine.integrations.scored_logits import ScoredLogits
from dpo_engine.integrations.scoring import Scope, Scored, current_scope, forget, say, scoring
from dpo_engine.integrations.trl.fused_head import FusedHead
from dpo_engine.integrations.trl.versions import LogitsMethod, Release, release

_patches = Patches()
_done: Installed | None = None


@dataclass(frozen=True)
class Installed:
    """What `install()` did."""

    version: str
    """TRL's."""
    trainers: tuple[str, ...]
    """Those that score by the operator now."""

    def __str__(self) -> str:
        return (
            f"dpo_engine: TRL {self.version} scores without logits in {', '.join(f'{t}Trainer' for t in self.trainers)}"
        )


def install() -> Installed:
    """Put the operator into the TRL that is installed. A second time does nothing more.

    Returns:
        What was done; `print` it to see.

    Raises:
        IntegrationError: TRL is missing, of a release that is not known, or changed by another package (Unsloth); then nothing
            was changed.
    """
    global _done
    if _done is None:
        version = _trl_version()
        known = release(version)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*experimental.*")  # CPO and ORPO are imported, perhaps not used
            _patches.apply(_replacements(known))
        _done = Installed(version, known.trainers())
    return _done


def uninstall() -> None:
    """Give TRL its own objects back. Without an `install()` it does nothing."""
    global _done
    _patches.undo()
    forget()
    _done = None


def is_installed() -> bool:
    return _done is not None


def _trl_version() -> str:
    try:
        import trl
    except ImportError as error:
        raise IntegrationError(
            f"TRL cannot be imported ({error}); expected an installed trl: pip install 'dpo-engine[trl]'"
        ) from error
    return trl.__version__


def _replacements(known: Release) -> dict[Place, Any]:
    """What goes into each place, made from what stands there."""
    found: dict[Place, Any] = {}
    for place in known.classes:
        place.found()  # refuses one that another package has put there
    for method in known.methods:
        found[method.place] = _scoring_method(method.place.found(), method)
    for place in known.log_softmaxes:
        found[place] = _ANSWERS[place.path](place.found())
    if known.flush_left is not None:
        found[known.flush_left] = _recording_flush_left(known.flush_left.found())
    for place in known.concatenated_inputs:
        found[place] = _recording_inputs(place.found(), whole_chosen="ORPO" in place.path)
    for place in known.fused:
        found[place] = FusedHead(place.found(), known.fused_fields)
    if known.compaction is not None:
        found[known.compaction] = _compacting(known.compaction.found())
    return found


def _scoring_method(original: Callable[..., Any], method: LogitsMethod) -> Callable[..., Any]:
    """`original` with the models it asks bound to the operator while it runs."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("return_outputs"):
            say("TRL builds logits in evaluation, which compute_metrics or prediction_loss_only=False asks for")
            return original(self, *args, **kwargs)
        if getattr(self, "is_encoder_decoder", False):
            say("TRL builds logits for an encoder-decoder: its labels are not the next tokens")
            return original(self, *args, **kwargs)
        batch: dict[str, Any] = next((given[name] for name in ("inputs", "batch", "padded_batch") if name in given), {})
        scope = Scope(
            extras=method.extras(self),
            mean_logits=method.mean_logits,
            of_every_pass=method.of_every_pass or not self.model.training,
            autocast=self.accelerator.autocast,
            batches=method.batches(batch, getattr(self, "label_pad_token_id", -100)),
        )
        with scoring((given.get("model"), self.model, getattr(self, "ref_model", None)), scope):
            return original(self, *args, **kwargs)

    return wrapper


def _selective_log_softmax(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(logits: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, ScoredLogits):
            return original(logits, index, *args, **kwargs)
        row_mask = _options(original, (logits, index, *args), kwargs)
        logps = logits.logps_of(index)
        return logps if row_mask is None else logps.masked_fill(row_mask == 0, 0.0)

    return wrapper


def _entropy_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return logits.entropies() if isinstance(logits, ScoredLogits) else original(logits, *args, **kwargs)

    return wrapper


def _selective_log_softmax_and_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(logits: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, ScoredLogits):
            return original(logits, index, *args, **kwargs)
        row_mask = _options(original, (logits, index, *args), kwargs)
        logps, entropy = logits.logps_of(index), logits.entropies()
        if row_mask is None:
            return logps, entropy
        return logps.masked_fill(row_mask == 0, 0.0), entropy.masked_fill(row_mask == 0, 0.0)

    return wrapper


def _options(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The `row_mask` of such a call; other options must be what the stand-in was computed with."""
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    if given.get("temperature", 1.0) != 1.0 or given.get("entropy_requires_grad", False):
        raise TypeError(
            f"TRL asked for a temperature or an entropy with gradient ({sorted(given)}) of logits that dpo_engine did not build; "
            "call uninstall() and report this with the TRL version"
        )
    return given.get("row_mask")


_ANSWERS = {
    "selective_log_softmax": _selective_log_softmax,
    "entropy_from_logits": _entropy_from_logits,
    "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
}


def _recording_flush_left(original: Callable[..., Any]) -> Callable[..., Any]:
    """TRL before 0.29 hands it (attention, tokens, loss mask) on the way to the model."""

    @functools.wraps(original)
    def wrapper(*tensors: Any) -> Any:
        flushed = original(*tensors)
        if (scope := current_scope()) is not None and isinstance(flushed, tuple) and len(flushed) >= 3:
            attention, input_ids, loss_mask = flushed[:3]
            scope.batches.append(Scored(input_ids=input_ids, mask=loss_mask, attention=attention, wraps=True))
        return flushed

    return wrapper


def _recording_inputs(original: Any, *, whole_chosen: bool) -> Any:
    """CPO's and ORPO's `concatenated_inputs`; ORPO's chosen sequences are scored whole, prompts included."""
    function = original.__func__ if isinstance(original, staticmethod) else original

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        batch = function(*args, **kwargs)
        if (scope := current_scope()) is not None:
            padding = kwargs.get("label_pad_token_id", -100)
            input_ids, mask = batch["concatenated_input_ids"], batch["concatenated_labels"] != padding
            if whole_chosen:
                chosen = input_ids.shape[0] // 2
                mask[:chosen] |= batch["concatenated_attention_mask"][:chosen] == 1
            scope.batches.append(Scored(input_ids=input_ids, mask=mask))
        return batch

    return staticmethod(wrapper) if isinstance(original, staticmethod) else wrapper


def _compacting(original: Callable[..., Any]) -> Callable[..., Any]:
    """TRL 1.16 sends every position to the head on a CPU, and scored ones only elsewhere; by the operator that is no gain."""

    @functools.wraps(original)
    def wrapper(device: Any) -> bool:
        return True if device.type == "cpu" else original(device)

    return wrapper
