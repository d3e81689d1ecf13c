"""Which text is the prompt, and which text is each completion?

With a chat template the prompt is what `apply_chat_template(..., add_generation_prompt=True)` gives, to the letter what
the model sees when it is asked; a completion is what the template adds when the answer is there, up to and including
the token that ends the turn. Without a template prompt and completion are the texts as they stand, and the EOS token
is added to their ids later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_engine.data.formats import as_messages
from dpo_engine.data.records import BadRow, Message, PreferenceRow
from dpo_engine.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = tuple[str, bool]
"""Some text, and whether its tokens are scored."""

CHAT_TEMPLATE_CHOICES = ("auto", "on", "off")
_SENTINEL = "dpoenginesentinel"


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedTree:
    """A prompt and its completions as the text that is tokenised."""

    prompt: str
    completions: tuple[tuple[Part, ...], ...]
    """Each in parts: one, that is scored, or the assistant's turns and what stands between them."""
    trimmed: bool = False
    """The template puts white space after its generation prompt that it leaves out before an answer."""


def use_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | bool) -> bool:
    """Whether prompts are rendered by the tokenizer's chat template.

    Args:
        choice: "auto" (if the tokenizer has one), "on" or "off"; True and False too, because YAML reads on and off so.

    Raises:
        ConfigError: Another choice, or "on" without a template.
    """
    if isinstance(choice, bool):
        choice = "on" if choice else "off"
    if choice not in CHAT_TEMPLATE_CHOICES:
        raise ConfigError(f"chat_template is {choice!r}, expected one of {', '.join(CHAT_TEMPLATE_CHOICES)}")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if choice == "on" and not has_template:
        raise ConfigError("chat_template is 'on', but the tokenizer has none: use a chat model, or set it to 'auto'")
    return has_template and choice != "off"


class PlainRenderer:
    """Texts as they stand.

    Args:
        separator: Put at the end of each prompt.
    """

    appends_eos = True
    adds_bos = True

    def __init__(self, separator: str = "") -> None:
        self._separator = separator
        self.clause = "plain text without a chat template" + (f", prompts end with {separator!r}" if separator else "")

    def render(self, row: PreferenceRow) -> RenderedTree:
        """Raises `DataError` for chat messages, which have no text without a template."""
        texts = [text for text in row.completions if isinstance(text, str)]
        if not isinstance(row.prompt, str) or len(texts) < len(row.completions):
            raise DataError(
                f"{row.origin}: the data holds chat messages (or a system text), but no chat template is in use: "
                "take a tokenizer that has one (chat_template: auto), or give the prompt and its completions as text"
            )
        return RenderedTree(prompt=row.prompt + self._separator, completions=tuple(((text, True),) for text in texts))


class ChatRenderer:
    """Texts by the tokenizer's own chat template."""

    adds_bos = False  # the template's text holds the BOS token where the model wants one

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, transcript: bool) -> None:
        self._tokenizer = tokenizer
        self._transcript = transcript
        self._tail, self._end = self._end_of_turn()
        self.appends_eos = not self._end

    @property
    def clause(self) -> str:
        """How prompts are rendered, for the report's format line."""
        what = "transcripts parsed into messages, " if self._transcript else ""
        end = f"completions end with {self._end}" if self._end else "EOS added to each completion"
        return f"{what}rendered by the tokenizer's chat template, {end}"

    def render(self, row: PreferenceRow) -> RenderedTree:
        """The row's texts.

        Raises:
            BadRow: The template refuses these messages, or does not write a turn alike in all places.
            DataError: The template's generation prompt is not how its answers begin.
        """
        messages, completions = as_messages(row, self._transcript)
        prompt = self._apply(messages, add_generation_prompt=True)
        trimmed, rendered = False, []
        for completion in completions:
            whole = self._apply(messages + completion)
            start = self._start_of_answer(messages, prompt, whole)
            if start is None and len(completion) > 1:  # a template that does so only within longer answers can be used
                raise BadRow(_asks_otherwise(prompt, whole))
            if start is None:
                raise DataError(f"{row.origin}: {_asks_otherwise(prompt, whole)}")
            if not whole.endswith(self._tail):
                raise BadRow(f"the chat template does not close this answer with {self._tail!r} as it closes others")
            trimmed |= start < len(prompt)
            rendered.append(self._parts(messages, completion, whole, start))
        return RenderedTree(prompt=prompt, completions=tuple(rendered), trimmed=trimmed)

    def _parts(self, messages: list[Message], completion: list[Message], whole: str, start: int) -> tuple[Part, ...]:
        """The text of a completion from `start` on: the assistant's turns with their ends, and what is between them.

        Every turn of the assistant begins where the model would be asked for it.
        """
        parts: list[Part] = []
        end = start
        for index, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            before = messages + completion[:index]
            if index:
                prompt = self._apply(before, add_generation_prompt=True)
                begins = self._start_of_answer(before, prompt, whole)
                if begins is None or begins < end:
                    raise BadRow(f"the chat template writes what comes before message {index + 1} of an answer anew")
                parts.append((whole[end:begins], False))
                start = begins
            end = self._end_of_answer(before, message, whole, start, is_last=index == len(completion) - 1)
            parts.append((whole[start:end], True))
        return tuple(part for part in parts if part[0])

    def _end_of_answer(self, before: list[Message], message: Message, whole: str, start: int, is_last: bool) -> int:
        """Where the turn that begins at `start` is over in `whole`, its end token included.

        A template may write the same turn otherwise when the conversation goes on (without its thoughts, for example);
        what counts is how it stands in `whole`.
        """
        if is_last:
            return len(whole) - len(self._tail) + len(self._end)
        alone = self._apply([*before, message]).removesuffix(self._tail) + self._end
        for closed in (alone, *(whole[:start] + text + self._end for text in _trims(message["content"]))):
            if len(closed) >= start and whole.startswith(closed):
                return len(closed)
        raise BadRow("the chat template writes an answer otherwise than as it was given when the conversation goes on")

    def _apply(self, messages: list[Message], **options: Any) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except (TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise BadRow(f"the chat template refuses a conversation of {roles}: {error}") from error

    def _start_of_answer(self, messages: list[Message], prompt: str, whole: str) -> int | None:
        """Where the answer to `prompt` begins in `whole`; None where `whole` does not continue it.

        The generation prompt may end with white space that answers lack. Then the common beginning must reach past the
        prompt's messages, so that the cut lies at a message boundary, and what the generation prompt has beyond it must
        be white space. Anything more (an opened <think>, say) would be a prompt that the answer does not continue.
        """
        if whole.startswith(prompt):
            return len(prompt)
        history = self._apply(messages)
        start = _alike(prompt, whole)
        is_at_boundary = start >= len(history) and prompt.startswith(history)
        return start if is_at_boundary and not prompt[start:].strip() else None

    def _end_of_turn(self) -> tuple[str, str]:
        """What the template writes after an answer, and the part of it to keep: up to its first special token."""
        try:
            text = self._apply([{"role": "user", "content": "hello"}, {"role": "assistant", "content": _SENTINEL}])
        except BadRow as error:
            raise DataError(f"the chat template cannot render a question and its answer: {error}") from error
        _, found, tail = text.rpartition(_SENTINEL)
        if not found:
            raise DataError("the chat template leaves out the assistant's answer: it cannot be used for training")
        ends = [match.end() for token in marker_tokens(self._tokenizer) if (match := re.search(re.escape(token), tail))]
        return tail, tail[: min(ends)] if ends else ""


def marker_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that are markers rather than text: the special ones and other added ones, white space aside."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = [*tokenizer.all_special_tokens, *(str(token) for token in added.values())]
    return [token for token in dict.fromkeys(tokens) if token.strip()]


def texts_of(row: PreferenceRow) -> str:
    """All text of a row that came from the data, to look for tokens that should only come from a template."""
    texts = []
    for value in (row.prompt, *row.completions):
        texts += [value] if isinstance(value, str) else [message["content"] for message in value]
    return "\n".join(texts)


def _asks_otherwise(prompt: str, whole: str) -> str:
    same = whole[: _alike(prompt, whole)]
    return (
        f"the chat template asks for an answer with {prompt[-40:]!r}, but writes the answer after "
        f"{same[-40:]!r}, so no completion continues its prompt: use a template whose generation prompt is how answers "
        "begin, or chat_template: off with plain text"
    )


def _alike(text: str, other: str) -> int:
    """How many characters two texts share from the start."""
    differ = (index for index, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
    return next(differ, min(len(text), len(other)))


def _trims(content: str) -> tuple[str, ...]:
    """How a template may write a message's text."""
    return content, content.strip(), content.lstrip(), content.rstrip()
