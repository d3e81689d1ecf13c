"""What is a mutant? One fault, put into one place of the source, and the tests that ought to see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutant:
    fault: str
    """What is wrong, in a few words; also its name."""
    file: str
    """Where, from the root of the repository."""
    old: str
    """Text that stands there exactly once."""
    new: str
    tests: str
    """Arguments of pytest: files likely to see it, narrowed so that they run in seconds. `*_cases.py` run interpreted."""

    @property
    def interpreted(self) -> bool:
        return "_cases.py" in self.tests

    def applied(self, source: str) -> str:
        """`source` with the fault in it."""
        found = source.count(self.old)
        if found != 1:
            raise LookupError(
                f"{self.fault}: its text stands {found} times in {self.file}; expected once: update the mutant"
            )
        return source.replace(self.old, self.new)
