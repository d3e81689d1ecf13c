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

from dpo_engine.data.formats import as_messages, completion_text
from dpo_engine.data.records import BadRow, Message, PreferenceRow
from dpo_engine.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE_CHOICES = ("auto", "on", "off")
_SENTINEL = "dpoenginesentinel"


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedTree:
    """A prompt and its completions as the text that is tokenised."""

    prompt: str
    completions: tuple[str, ...]
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
        if not (isinstance(row.prompt, str) and isinstance(row.chosen, str) and isinstance(row.rejected, str)):
            raise DataError(
                f"{row.origin}: the data holds chat messages (or a system text), but no chat template is in use: "
                "take a tokenizer that has one (chat_template: auto), or give prompt, chosen and rejected as text"
            )
        return RenderedTree(prompt=row.prompt + self._separator, completions=(row.chosen, row.rejected))


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
            BadRow: The template refuses these messages.
            DataError: The template's generation prompt is not how its answers begin.
        """
        messages, completions = as_messages(row, self._transcript)
        prompt = self._apply(messages, add_generation_prompt=True)
        trimmed, texts = False, []
        for completion in completions:
            whole = self._apply(messages + completion)
            start = len(prompt)
            if not whole.startswith(prompt):
                start = self._start_of_answer(messages, prompt, whole, row.origin)
                trimmed = True
            text = whole[start:]
            if not text.endswith(self._tail):
                raise BadRow(f"the chat template does not close this answer with {self._tail!r} as it closes others")
            texts.append(text.removesuffix(self._tail) + self._end)
        return RenderedTree(prompt=prompt, completions=tuple(texts), trimmed=trimmed)

    def _apply(self, messages: list[Message], **options: Any) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except (TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise BadRow(f"the chat template refuses a conversation of {roles}: {error}") from error

    def _start_of_answer(self, messages: list[Message], prompt: str, whole: str, origin: str) -> int:
        """Where the answer begins in `whole`, when the generation prompt ends with white space that answers lack.

        The common beginning must reach past the prompt's messages, so that the cut lies at a message boundary, and what
        the generation prompt has beyond it must be white space. Anything more (an opened <think>, say) would be a
        prompt that the answer does not continue.
        """
        history = self._apply(messages)
        differ = (index for index, (asked, told) in enumerate(zip(prompt, whole, strict=False)) if asked != told)
        start = next(differ, len(whole))
        beyond = prompt[start:]
        if start < len(history) or not prompt.startswith(history) or beyond.strip():
            raise DataError(
                f"{origin}: the chat template asks for an answer with {_end_of(prompt)!r}, but writes the answer after "
                f"{_end_of(whole[:start])!r}, so no completion continues its prompt: use a template whose generation "
                "prompt is how answers begin, or chat_template: off with plain text"
            )
        return start

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
    prompt = row.prompt if isinstance(row.prompt, str) else "\n".join(message["content"] for message in row.prompt)
    return "\n".join([prompt, completion_text(row.chosen), completion_text(row.rejected)])


def _end_of(text: str) -> str:
    return text[-40:]
