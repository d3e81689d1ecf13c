"""`dpo-engine train`: read the options, run, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def train_command(arguments: Sequence[str]) -> None:
    """`[CONFIG.yaml] [--key value ...] [--json] [--help]`.

    With `--json` what is meant for people goes to stderr, and the last line of stdout is one JSON object.
    """
    import warnings

    import transformers

    from dpo_engine.cli.options import help_text, parse
    from dpo_engine.train.config import DPOConfig
    from dpo_engine.train.run import TrainConfig, run_training

    if "--help" in arguments or "-h" in arguments:
        print(help_text(TrainConfig, own=(TrainConfig, DPOConfig)))
        return
    as_json = "--json" in arguments
    config = parse(TrainConfig, [argument for argument in arguments if argument != "--json"])
    transformers.logging.set_verbosity_error()
    # Deprecations inside these libraries are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|accelerate")
    result = run_training(config, say=lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True))
    if as_json:
        print(json.dumps(result))
