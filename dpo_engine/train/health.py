"""Is a run healthy, beyond its loss? What a rising accuracy can hide is looked for, and said once.

likelihood displacement   margins grow, and the chosen completions become less likely all the same
memorisation              pairs trained on are told apart, held-out pairs no better than before
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from dpo_engine.losses import Method

logger = logging.getLogger(__name__)

_LEAST_FALL = 2.0  # nats of a completion
_FALL_PER_TOKEN = 0.1  # nats; against the reference, on the same completions
_FALL_PER_TOKEN_OF_OTHERS = 0.5  # against the run's first completions, which are others
_LEARNT = 0.95
_FLAT = 0.02


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
                f"wanted: {self._remedy()}, a lower learning_rate, or pairs whose completions differ in more than a few tokens",
            )

    def judged(self, means: dict[str, float], name: str = "") -> None:
        """Look at the means over held-out rows."""
        accuracy = means.get("rewards/accuracies")
        if accuracy is None:
            return
        first = self._first_held_out.setdefault(name, accuracy)
        train = self._train_accuracy
        if train is not None and train >= _LEARNT and accuracy - first < _FLAT and accuracy < _LEARNT:
            self._warn(
                "memorisation",
                f"memorisation: accuracy is {train:.0%} on the rows trained on and {accuracy:.0%} on held-out rows, where it began "
                f"at {first:.0%}: fewer epochs, a lower learning_rate, a higher beta, label_smoothing (cdpo), or more data",
            )

    def _remedy(self) -> str:
        if not self.method.needs_reference:
            return "a mixture with sft (method: simpo+sft), which holds it up"
        others = [name for name in ("dpo_nll", "dpop") if name != self.method.name]
        return f"method: {' or '.join(others)}, which holds it up"

    def _warn(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self.say(line)
