"""Tiny bases with tokenizers, adapters on them that really change something, and `dpo-engine` run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from support.imports import ROOT
from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_pairs import tiny_llama


def save_base(
    folder: Path, *, dtype: torch.dtype = torch.float32, template: str | None = CHATML, **changes: Any
) -> Path:
    """A two-layer Llama that the small tokenizer fits, saved in `dtype`."""
    tokenizer = small_tokenizer(chat_template=template)
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = {"vocab_size": len(tokenizer), "eos_token_id": end, "bos_token_id": 0, "initializer_range": 0.1}
    tiny_llama(**(settings | changes)).to(dtype).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, **config: Any) -> Path:
    """An adapter on `base` whose weights are all random, so that leaving any of it out shows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    policy = get_peft_model(model, LoraConfig(**(settings | config)))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                scale = 0.2 if "magnitude" in name else 0.05
                parameter.add_(torch.randn_like(parameter) * scale)
    policy.save_pretrained(folder)
    return folder


def adapted(base: Path, adapter: Path) -> Any:
    """The adapter on its base in float32, by peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def plain(folder: Path) -> Any:
    """A folder as anybody loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, length: int = 40) -> torch.Tensor:
    """Of random tokens, always the same."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(0, model.config.vocab_size, (2, length), generator=draw)).logits


def greedy(model: Any, length: int = 20) -> list[int]:
    """What it says after a few tokens."""
    ids = torch.tensor([[5, 17, 40, 33]])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
        )
    return output[0].tolist()


def start(*arguments: Any, **more: Any) -> subprocess.Popen[str]:
    """`dpo-engine ...`, running."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dpo_engine.cli.main", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **(pipes | more))
