"""Which errors does the engine raise?

Each message says what was given, what was expected and what to do. The command line prints it on one line and exits
with
`exit_code`: 2 for input that a user can mend before anything runs, 1 for a run that had to stop.
"""


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""

    exit_code = 2


class ConfigError(EngineError, ValueError):
    """An option that is unknown, of the wrong type or out of range."""


class DataError(EngineError, ValueError):
    """Data that is missing, broken, or of a shape the method cannot use."""


class ModelError(EngineError, ValueError):
    """A model that is missing, not causal, or whose head the engine cannot reproduce."""


class BackendError(EngineError, RuntimeError):
    """A backend was forced that cannot run here."""


class TrainingError(EngineError, RuntimeError):
    """A run that must not go on, such as one whose first loss is not the method's start value."""

    exit_code = 1


class CacheError(EngineError, RuntimeError):
    """The reference cache cannot be read or written, or what it holds is not what the reference says."""

    exit_code = 1


class ExportError(EngineError, RuntimeError):
    """An export that had to stop: a merged model that is not the adapted one, a converter that failed, a full disk."""

    exit_code = 1


class IntegrationError(EngineError, RuntimeError):
    """Another package is missing, of a version that is not known, or already changed by someone else."""
