"""How does `dpo-engine` start and end? Exit 0, or one line on stderr and the error's exit code."""

from __future__ import annotations

import importlib.util
import sys

from dpo_engine.errors import EngineError

_NEEDED = ("typer", "yaml", "transformers", "peft", "datasets", "accelerate")


def main() -> None:
    """Entry point of the console script."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: the command line needs {', '.join(missing)}, not installed here; run: pip install 'dpo-engine[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from dpo_engine.cli.app import app

    try:
        app()
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
