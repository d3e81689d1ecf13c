"""`dpo-engine export`: read the options, run, print."""

from __future__ import annotations

import json
import sys
import warnings

import typer

from dpo_engine.export.run import ExportOptions, run_export


def export_command(options: ExportOptions, *, as_json: bool) -> None:
    """With `as_json` what is meant for people goes to stderr, and the last line of stdout is one JSON object.

    Raises:
        EngineError: input that cannot be used, or an export that had to stop.
        typer.Exit: with 130 after Ctrl-C.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|accelerate")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"transformers|peft")
    out = sys.stderr if as_json else sys.stdout
    try:
        result = run_export(options, say=lambda line: print(line, file=out, flush=True))
    except KeyboardInterrupt:
        print("stopped; nothing half-written is left", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result))
