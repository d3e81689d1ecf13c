"""What does a real training step take on this CPU? Run as a script, in a process of its own: peaks belong to processes.

    python peak_of_a_step.py '[{"config": {...}, "tokens": 1536, "lora_r": 16, "checkpointing": true, "sharing": true}]'

Prints, for each step that is asked for, the bytes that it had at its fullest, beyond what was resident before it: weights
are, gradients of an earlier forest too. Linux only.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def main(given: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo_engine.batch import build_forest
    from dpo_engine.model.layout import prepare_model
    from dpo_engine.model.scoring import forest_token_logps

    torch.set_num_threads(1)
    model: Any = LlamaForCausalLM(LlamaConfig(**given["config"]))
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=given["lora_r"], target_modules="all-linear"))
    assert prepare_model(model).name == "shared"
    if given["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()

    def step(tokens: int) -> None:
        third = tokens // 3
        tree = ([1] * third, [[1] * (third + 1)] * 2) if given["sharing"] else ([1] * third, [[1] * (2 * third + 1)])
        forest = build_forest([tree], "shared")
        (-forest_token_logps(model, forest).sum()).backward()

    step(48)  # threads, workspaces, gradients
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(given["tokens"])
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    for given in json.loads(sys.argv[1]):
        main(given)
        gc.collect()
