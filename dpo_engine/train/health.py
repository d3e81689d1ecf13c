"""Is a run healthy, beyond its loss? What a rising accuracy can hide is looked for, and said once.

likelihood displacement   margins grow, and the chosen completions become less likely all the same
memorisation              pairs trained on are told apart, held-out pairs no better than before
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from dpo_engine.losses import Method, PairStats, UnpairedStats

logger = logging.getLogger(__name__)

_LEAST_FALL = 2.0  # nats of a completion
_FALL_PER_TOKEN = 0.1  # nats; against the reference, on the same completions
_FALL_PER_TOKEN_OF_OTHERS = 0.5  # against the run's first completions, which are others
_LEARNT = 0.95
_FLAT = 0.02
_COIN = 0.5  # what completions are told apart with where policy and reference agree


class Health:
    """Watches the means that are logged.

    Args:
        method: whether there is a reference to compare with.
        say: gets each warning, once.
    """

    def __init__(self, method: Method, say: Callable[[str], None] = logger.warning) -> None:
        self.method, self.say = method, say
        self._said: set[str] = set()
        self._first_per_token: float | None = None
        self._train_accuracy: float | None = None
        self._first_held_out: dict[str, float] = {}

    def state(self) -> dict[str, float]:
        """What later numbers are compared with, for a checkpoint."""
        first = {} if self._first_per_token is None else {"chosen_per_token": self._first_per_token}
        return first | {f"held_out/{name}": accuracy for name, accuracy in self._first_held_out.items()}

    def restore(self, state: dict[str, float]) -> None:
        """Go on comparing with what a checkpoint kept."""
        self._first_per_token = state.get("chosen_per_token")
        kept = {name.removeprefix("held_out/"): value for name, value in state.items() if name.startswith("held_out/")}
        self._first_held_out = dict(kept)

    def trained(self, means: dict[str, float]) -> None:
        """Look at the means of the steps since the last log."""
        self._train_accuracy = means.get("rewards/accuracies")
        length, logps = means.get("lengths/chosen"), means.get("logps/chosen")
        if not length or logps is None or means.get("rewards/margins", 0.0) <= 0:
            return
        if (shift := means.get("logps/chosen_shift")) is not None:
            has_fallen = shift < -max(_LEAST_FALL, _FALL_PER_TOKEN * length)
            against = f"{shift:.1f} nats from the reference's"
        else:
            first = self._first_per_token
            self._first_per_token = per_token = logps / length if first is None else first
            fall = per_token - logps / length
            has_fallen = fall > _FALL_PER_TOKEN_OF_OTHERS and fall * length > _LEAST_FALL
            against = f"{-fall * length:.1f} nats from where it was"
        if has_fallen:
            self._warn(
                "displacement",
                f"likelihood displacement: margins grow (rewards/margins {means['rewards/margins']:.3f}), but the chosen "
                f"completions' mean log-prob is {against}: both become less likely, the rejected ones faster. Where that is not "
                f"wanted: {self._remedy()}",
            )

    def judged(self, means: dict[str, float], name: str = "") -> None:
        """Look at the means over held-out rows."""
        accuracy = means.get("rewards/accuracies")
        if accuracy is None:
            return
        before = self._first_held_out.get(name)
        self._first_held_out.setdefault(name, accuracy)
        train, began = self._train_accuracy, _COIN if before is None else before
        if train is not None and train >= _LEARNT and accuracy - began < _FLAT and accuracy < _LEARNT:
            against = "a coin has 50%" if before is None else f"it began at {before:.0%}"
            smoothing = ", label_smoothing (cdpo)" if self.method.needs is PairStats else ""
            self._warn(
                "memorisation",
                f"memorisation: accuracy is {train:.0%} on the rows trained on and {accuracy:.0%} on held-out rows, where "
                f"{against}: fewer epochs, a lower learning_rate, a higher beta{smoothing}, or more data",
            )

    def _remedy(self) -> str:
        """What holds the chosen completions up, and can be said of this method and its data."""
        if self.method.needs is UnpairedStats:
            return "a higher desirable_weight, or a lower learning_rate"
        names = [self.method.name, *(part.name for _, part in self.method.parts)]
        if "sft" in names:
            held = "a larger weight of sft in loss_weights"
        elif not self.method.needs_reference:
            held = f"a mixture with sft (method: {self.method.name}+sft), which holds it up"
        elif others := [name for name in ("dpo_nll", "dpop") if name not in names]:
            held = f"method: {' or '.join(others)}, which holds it up"
        else:
            held = "a larger rpo_alpha or dpop_lambda"
        return f"{held}, a lower learning_rate, or pairs whose completions differ in more than a few tokens"

    def _warn(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self.say(line)
