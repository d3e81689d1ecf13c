"""Which tokens are kept when a tree is longer than max_length?

The length of a tree is its prompt P plus its longest completion. All its completions C keep one and the same prompt,
so a prompt is cut once, as far as the longest completion needs.

- keep_start: (P + C)[:max_length] for each C; the tree is lost when P alone fills max_length.
- keep_end: P[cut:] with cut = len(P) + longest - max_length, but at least the last token of P stays; a completion
  longer than max_length - 1 is then cut at its end.
- drop: the tree is left out.
- error: `DataError`.

Before that, a prompt may have a bound of its own, beyond which its beginning goes, and a completion one, beyond which its end
goes.

A tree is lost, too, when nothing that is scored is left of one of its completions.
"""

from __future__ import annotations

from dataclasses import replace

from dpo_engine.data.records import TokenizedTree
from dpo_engine.errors import ConfigError, DataError

TRUNCATIONS = ("keep_start", "keep_end", "drop", "error")
_LOST = "completion lost by truncation"
LOST = {"keep_start": _LOST, "keep_end": _LOST, "drop": "longer than max_length"}
"""Why `truncate_tree` gave None."""


def check_truncation(max_length: int | None, truncation: str) -> None:
    """Raises `ConfigError` unless `truncation` is known and `max_length` is None or at least 2."""
    if truncation not in TRUNCATIONS:
        raise ConfigError(f"truncation is {truncation!r}, expected one of {', '.join(TRUNCATIONS)}")
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2 (one prompt and one scored token) or none")


def truncate_tree(tree: TokenizedTree, max_length: int | None, truncation: str) -> TokenizedTree | None:
    """The tree cut to `max_length` tokens.

    Args:
        tree: A tree whose prompt and completions have at least one token each.
        max_length: Tokens of the prompt and one completion together; None for no bound.
        truncation: One of `TRUNCATIONS`.

    Returns:
        The tree itself if it fits, a shorter one, or None when it must be left out for the reason `LOST[truncation]`.
        Of every returned completion something is scored.

    Raises:
        DataError: It does not fit and `truncation` is "error".
    """
    prompt, longest = len(tree.prompt_ids), max(map(len, tree.completions))
    if max_length is None or prompt + longest <= max_length:
        return tree
    if truncation == "error":
        raise DataError(
            f"{tree.origin}: {prompt} prompt tokens and {longest} of the longest completion are more than "
            f"max_length {max_length}: raise max_length, or choose truncation keep_start, keep_end or drop"
        )
    if truncation == "drop" or (truncation == "keep_start" and prompt >= max_length):
        return None
    cut = min(prompt + longest - max_length, prompt - 1) if truncation == "keep_end" else 0
    room = max_length - (prompt - cut)
    scored = tree.scored and tuple(mask[:room] for mask in tree.scored)
    if scored and not all(map(any, scored)):
        return None
    return replace(
        tree,
        prompt_ids=tree.prompt_ids[cut:],
        completions=tuple(completion[:room] for completion in tree.completions),
        scored=scored,
        reference_logps=None,
    )


def bound_tree(
    tree: TokenizedTree, max_prompt_length: int | None, max_completion_length: int | None
) -> TokenizedTree | None:
    """The tree with the last `max_prompt_length` tokens of its prompt and the first `max_completion_length` of each completion.

    Args:
        tree: A tree whose prompt and completions have at least one token each.
        max_prompt_length, max_completion_length: At least 1; None for no bound.

    Returns:
        The tree itself if it is within both, a shorter one, or None where nothing that is scored is left of a completion.
    """
    prompt, completions = tree.prompt_ids, tree.completions
    longest = max(map(len, completions))
    if len(prompt) <= (max_prompt_length or len(prompt)) and longest <= (max_completion_length or longest):
        return tree
    room = max_completion_length or longest
    scored = tree.scored and tuple(mask[:room] for mask in tree.scored)
    if scored and not all(map(any, scored)):
        return None
    return replace(
        tree,
        prompt_ids=prompt[-(max_prompt_length or len(prompt)) :],
        completions=tuple(completion[:room] for completion in completions),
        scored=scored,
        reference_logps=None,
    )
