"""Which commands serve a result?

vLLM serves plain LoRA beside its base, with a rank of at most --max-lora-rank, 16 unless given. `transformers serve` and
llama.cpp's converter take merged models only.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from dpo_engine.export.adapter import Adapter

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def adapter_lines(adapter: Adapter, base: str, *, on_head: bool) -> list[str]:
    """How base and adapter are served as they are, or why they are not."""
    faults = vllm_faults(adapter, on_head=on_head)
    if faults:
        lines = ["vLLM does not serve this adapter as it is:", *(f"  {fault}" for fault in faults)]
        return [*lines, "merge it: dpo-engine export " + shlex.quote(str(adapter.folder)) + " --merge"]
    rank = next(allowed for allowed in VLLM_RANKS if allowed >= (adapter.rank or 1))
    path = adapter.folder.resolve()
    parts = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"{_name(path)}={path}"]
    command = shlex.join([*parts, "--max-lora-rank", str(rank)])
    lines = [f"with vLLM, beside its base (ask for the model {_name(path)}):", f"  {command}"]
    if adapter.from_4bit:
        lines.append(
            "  note: it was trained on 4-bit weights; on the full base it corrects errors that are not there: a merge is closer"
        )
    return [*lines, "transformers serve takes no adapters: merge it first (--merge)"]


def merged_lines(folder: Path) -> list[str]:
    """How a merged model is served."""
    path = shlex.quote(str(folder.resolve()))
    return [
        "with vLLM:",
        f"  vllm serve {path}",
        "with transformers (pip install 'transformers[serving]'):",
        f"  transformers serve {path}",
    ]


def vllm_faults(adapter: Adapter, *, on_head: bool) -> list[str]:
    """Why vLLM would refuse this adapter, or compute it wrongly."""
    config, faults = adapter.config, []
    if config.get("peft_type") != "LORA":
        faults.append(f"it is of type {config.get('peft_type')}; vLLM serves LoRA")
    if config.get("use_dora"):
        faults.append("it is DoRA")
    if config.get("modules_to_save"):
        faults.append(f"it holds whole modules (modules_to_save: {', '.join(config['modules_to_save'])})")
    if on_head:
        faults.append("it is on the head, which vLLM adapts for some architectures only")
    if config.get("bias", "none") != "none":
        faults.append(f"it changes biases (bias: {config['bias']})")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        faults.append("its scale differs between layers (rank_pattern, alpha_pattern), and vLLM knows one for all")
    if (adapter.rank or 0) > VLLM_RANKS[-1]:
        faults.append(f"its rank is {adapter.rank}; vLLM serves up to {VLLM_RANKS[-1]}")
    return faults


def _name(folder: Path) -> str:
    return folder.name.replace("=", "-") or "adapter"
