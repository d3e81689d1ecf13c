"""How does a model, or an adapter with its base, become something to talk to?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dpo_engine.export.adapter import Adapter, check_fit, is_adapter, put_on, read_adapter
from dpo_engine.model.loading import check_model, load_model, load_tokenizer, resolve_dtype, resolve_model


@dataclass(frozen=True)
class Opened:
    """A model in eval mode and its tokenizer."""

    model: Any
    tokenizer: Any
    path: str
    """Of the model, or of the adapter's base."""
    adapter: Adapter | None


def open_model(name: str, *, dtype: str, in_4bit: bool, say: Callable[[str], None]) -> Opened:
    """The model called `name`, or the adapter in the folder of that name on its base.

    Args:
        name: model folder, hub id, smollm2, or adapter folder.
        dtype: auto, or what `resolve_dtype` knows.

    Raises:
        EngineError: a model, an adapter or a dtype that cannot be used.
    """
    torch_dtype = resolve_dtype(dtype)
    adapter = read_adapter(name) if is_adapter(name) else None
    path = resolve_model(adapter.base if adapter else name, progress=say)
    config = check_model(path)
    if adapter is not None:
        check_fit(adapter, path, config)
    tokenizer_of = str(adapter.folder) if adapter and (adapter.folder / "tokenizer_config.json").is_file() else path
    tokenizer = load_tokenizer(tokenizer_of)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"loading {path} in {'NF4, ' * in_4bit}{str(torch_dtype).removeprefix('torch.')} on {device}")
    model: Any = load_model(path, dtype=torch_dtype, trainable=False, in_4bit=in_4bit, device=device)
    if not in_4bit:
        model = model.to(device)
    if adapter is not None:
        model = put_on(model, adapter)
        say(f"adapter {adapter.folder} is on")
        if adapter.from_4bit and not in_4bit:
            say("note: it was trained on 4-bit weights; --load_in_4bit computes with those")
    return Opened(model=model.eval(), tokenizer=tokenizer, path=path, adapter=adapter)
