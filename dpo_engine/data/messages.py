"""How are chat messages read out of a column?

Accepted are {"role", "content"} and ShareGPT's {"from", "value"}, as a list or alone; they come out as
{"role", "content"} and nothing else. A completion begins and ends with an assistant message; what others say between
two of the assistant's turns is not scored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpo_engine.data.records import BadRow, Message

_OWN_ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLES = {role: role for role in _OWN_ROLES} | {"human": "user", "gpt": "assistant"}
_UNREAD = ("tool_calls", "reasoning_content", "thinking")
"""Parts of a message that a template would render but that are not read here, so that they cannot be dropped unseen."""
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def read_messages(value: Any, column: str) -> list[Message]:
    """One message or a list of them, with the field's role names.

    Raises:
        BadRow: Not messages, an unknown role, content that is not text, or tool calls.
    """
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list | tuple):
        raise BadRow(f"column {column!r} must be a list of messages, found {type(value).__name__}")
    return [_message(item, f"column {column!r}, message {number}") for number, item in enumerate(items, start=1)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(f"{where}: expected an object with role and content, found {type(item).__name__}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(f"{where}: role {role!r} is not understood, expected one of {', '.join(_ROLES)}")
    unread = next((name for name in _UNREAD if item.get(name)), None)
    if unread:
        raise BadRow(f"{where}: {unread!r} is not supported yet")
    if not isinstance(content, str):
        raise BadRow(f"{where}: content must be text, found {type(content).__name__}")
    return {"role": _ROLES[role], "content": content}


def completion_messages(value: Any, column: str, prompt: list[Message]) -> list[Message]:
    """The turns in a column that holds an answer's text, its messages, or the prompt followed by them.

    Raises:
        BadRow: They do not begin and end with an assistant message.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = read_messages(value, column)
    if len(messages) > len(prompt) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not messages or not messages[0]["role"] == messages[-1]["role"] == "assistant":
        roles = ", ".join(message["role"] for message in messages) or "no message"
        raise BadRow(
            f"column {column!r} must begin (after the prompt's messages, at most) and end with an assistant message, "
            f"found {roles}"
        )
    return messages


def with_system(row: Mapping[str, Any], prompt: str | list[Message]) -> str | list[Message]:
    """The prompt behind the row's `system` column, if it has one; a plain prompt becomes messages then.

    Raises:
        BadRow: `system` is not text, or the messages hold another system text.
    """
    system = row.get("system")
    if not system:
        return prompt
    if not isinstance(system, str):
        raise BadRow(f"column 'system' must be text, found {type(system).__name__}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise BadRow("column 'system' and the first message hold different system texts")
        return messages
    return [{"role": "system", "content": system}, *messages]


def transcript_messages(prompt: str) -> list[Message]:
    """The turns of an HH-RLHF transcript that ends with an open "Assistant:".

    Raises:
        BadRow: It does not begin with a turn, or has none.
    """
    before, *turns = _TURN.split(prompt)
    if before.strip() or len(turns) < 4 or turns[-2] != "Assistant":
        raise BadRow("the transcript does not begin with '\\n\\nHuman:' and go on to '\\n\\nAssistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    closed = zip(turns[:-2:2], turns[1:-2:2], strict=True)
    return [{"role": roles[speaker], "content": text.strip()} for speaker, text in closed]
