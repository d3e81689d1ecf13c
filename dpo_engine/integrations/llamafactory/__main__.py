"""LLaMA-Factory's command with the operator installed: `python -m dpo_engine.integrations.llamafactory train config.yaml`.

`llamafactory-cli train` trains in its own process on one device, and on several starts `torchrun` on its file `launcher.py`, whose
processes know nothing of what was installed in the first. So the launcher is told that its file is this one: `torchrun` then
starts this file, which installs and trains.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dpo_engine.errors import EngineError, IntegrationError
from dpo_engine.integrations.llamafactory import install

# Ways of starting that end in trainers of other classes, or in processes that neither this file nor its imports reach.
ELSEWHERE = {"USE_V1": "its rewritten trainers", "USE_MCA": "Megatron's trainers", "USE_RAY": "Ray's workers"}


def main() -> None:
    for name, what in ELSEWHERE.items():
        if os.environ.get(name, "0").lower() in ("true", "y", "1"):
            raise IntegrationError(
                f"{name}={os.environ[name]} trains by {what}; expected it unset, or use llamafactory-cli"
            )
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of torchrun's processes: what `launcher.py` does there
        print(f"dpo_engine: LLaMA-Factory {install()} scores without logits in its DPO and KTO stages", flush=True)
        from llamafactory.train.tuner import run_exp

        run_exp()
        return
    if sys.argv[1:2] != ["train"]:
        raise IntegrationError(
            f"command={' '.join(sys.argv[1:2]) or None}; expected train; use llamafactory-cli for the others"
        )
    print(f"dpo_engine: LLaMA-Factory {install()} scores without logits in its DPO and KTO stages", flush=True)
    from llamafactory import launcher

    launcher.__file__ = str(Path(__file__).resolve())
    launcher.launch()


if __name__ == "__main__":
    try:
        main()
    except EngineError as error:
        sys.exit(f"error: {error}")
