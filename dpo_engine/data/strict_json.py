"""Is this text one JSON value, and nothing that only looks like one?

`json.loads` accepts NaN, Infinity, 1e999, repeated keys, NUL and lone surrogates. Here each is a fault with a reason.
The parser is still Python's: it is made to finish and to note what it saw, so that in a list of rows one faulty row
does not hide the next.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
"""Lists and objects inside each other. Preference data needs five; unbounded, the limit would be the caller's stack."""


class StrictDecoder:
    """Text -> (value, fault or None); raises `ValueError` or `RecursionError` when there is no value at all."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._int,
        )

    def decode(self, text: str) -> tuple[Any, str | None]:
        """The value of a text that holds exactly one."""
        self._faults.clear()
        return self._checked(self._decoder.decode(text))

    def decode_at(self, text: str, start: int) -> tuple[Any, str | None, int]:
        """The value that begins at `start`, and the index after it."""
        self._faults.clear()
        value, end = self._decoder.raw_decode(text, start)
        return *self._checked(value), end

    def _checked(self, value: Any) -> tuple[Any, str | None]:
        return value, self._faults[0] if self._faults else value_fault(value)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            self._faults.append(f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
        return result

    def _constant(self, text: str) -> None:
        self._faults.append(f"{text} is not JSON")

    def _float(self, text: str) -> float:
        number = float(text)
        if math.isinf(number):
            self._faults.append(f"number {_short(text)} is out of range")
        return number

    def _int(self, text: str) -> int:
        try:
            return int(text)
        except ValueError:  # Python refuses to convert thousands of digits
            self._faults.append(f"number {_short(text)} is out of range")
            return 0


def value_fault(value: Any) -> str | None:
    """Why a parsed value must not be used: a text in it (see `text_fault`), or nesting too deep; None when it may."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            fault = text_fault(item)
            if fault:
                return fault
        elif isinstance(item, dict | list | tuple):
            if depth > MAX_DEPTH:
                return f"nested more than {MAX_DEPTH} levels deep"
            if isinstance(item, dict):
                stack.extend((key, depth) for key in item)
                stack.extend((child, depth + 1) for child in item.values())
            else:
                stack.extend((child, depth + 1) for child in item)
    return None


def text_fault(text: str) -> str | None:
    """Why a text must not reach a tokenizer; None for ordinary text."""
    if "\0" in text:
        return "text holds a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # readers decode with "surrogateescape", which keeps a byte that is not UTF-8 as U+DC80..U+DCFF
        if 0xDC80 <= code <= 0xDCFF:
            return f"not UTF-8 (byte 0x{code - 0xDC00:02x}), or a lone surrogate U+{code:04X}"
        return f"text holds a lone surrogate (U+{code:04X})"
    return None


def _short(text: str) -> str:
    return text if len(text) <= 20 else text[:17] + "..."
