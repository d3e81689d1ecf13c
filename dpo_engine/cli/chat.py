"""`dpo-engine chat`: a first look at what a model answers, token by token as they come.

A line is a turn; /base switches an adapter off and on, /clear forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an
answer. Works with a pipe on stdin too.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import TextStreamer

from dpo_engine.errors import ConfigError
from dpo_engine.export.opening import Opened, open_model

_HELP = "/base: adapter off or on   /clear: forget what was said   /exit: end   Ctrl-C: stop an answer"


def chat_command(
    name: str,
    *,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    in_4bit: bool,
    dtype: str,
    seed: int | None,
) -> None:
    """Answer lines of stdin on stdout until there are no more; what is said about it goes to stderr.

    Raises:
        EngineError: options or a model that cannot be used.
    """
    import transformers

    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is out of range; expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} is out of range; expected a number of at least 0 (0 is greedy)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|accelerate")
    opened = open_model(name, dtype=dtype, in_4bit=in_4bit, say=_say)
    if seed is not None:
        torch.manual_seed(seed)
    chat = _Chat(opened, system, max_new_tokens, temperature)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/clear":
            chat.clear()
        elif line == "/base":
            chat.switch()
        elif line.startswith("/"):
            _say(f"{line.split()[0]} is no command. {_HELP}")
        elif line:
            chat.answer(line)


class _Chat:
    """A conversation, and whether the adapter speaks in it."""

    def __init__(self, opened: Opened, system: str | None, max_new_tokens: int, temperature: float) -> None:
        self._opened = opened
        self._system = system
        self._sampling = _sampling(temperature) | {"max_new_tokens": max_new_tokens}
        self._on = opened.adapter is not None
        self._templated = bool(getattr(opened.tokenizer, "chat_template", None))
        if not self._templated:
            _say(
                "this tokenizer has no chat template: each line is continued as it stands, and no turn knows of another"
            )
            if system:
                raise ConfigError("system: this tokenizer has no chat template; expected no --system")
        self.clear()
        _say(_HELP)

    def clear(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def switch(self) -> None:
        """Adapter off or on; the conversation stays."""
        if self._opened.adapter is None:
            _say("there is no adapter to switch: this is a model of its own")
            return
        self._on = not self._on
        _say("the adapter is on" if self._on else "the adapter is off: the base answers")

    def answer(self, line: str) -> None:
        model, tokenizer = self._opened.model, self._opened.tokenizer
        turn = {"role": "user", "content": line}
        ids = self._ids(turn)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and ids.shape[1] >= longest:
            _say(f"that makes {ids.shape[1]} tokens, and the model reads {longest}; /clear forgets what was said")
            return
        room = self._sampling["max_new_tokens"] if longest is None else longest - ids.shape[1]
        limits = {"max_new_tokens": min(self._sampling["max_new_tokens"], room)}
        streamer = _Collecting(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            with torch.no_grad(), self._speaking():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                    eos_token_id=_ends(model, tokenizer),
                    **(self._sampling | limits),
                )
        except KeyboardInterrupt:
            streamer.end()
            _say("(stopped)")
        if self._templated:
            self._messages += [turn, {"role": "assistant", "content": streamer.text.strip()}]

    def _ids(self, turn: dict[str, str]) -> torch.Tensor:
        tokenizer = self._opened.tokenizer
        if self._templated:
            text = tokenizer.apply_chat_template([*self._messages, turn], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = tokenizer(turn["content"]).input_ids
        return torch.tensor([ids], device=self._opened.model.device)

    def _speaking(self) -> AbstractContextManager[Any]:
        if self._opened.adapter is None or self._on:
            return nullcontext()
        return self._opened.model.disable_adapter()


class _Collecting(TextStreamer):
    """Prints the answer as it comes, and keeps it."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def _sampling(temperature: float) -> dict[str, Any]:
    """What `generate` is told; for greedy answers what only sampling uses is taken back, else it would complain."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end an answer: what the model's generation config says, and the tokenizer's own."""
    stated = model.generation_config.eos_token_id
    ends = {*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id} - {None}
    return sorted(ends) or None


def _lines() -> Iterator[str]:
    """Turns: from a person with a prompt in front, from a pipe as they stand."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.strip()
        return
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            _say("\n(Ctrl-D or /exit ends)")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
