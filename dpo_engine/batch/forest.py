"""What is a batch? A forest: trees, each a prompt with its K completions, and explicit indices of what is scored.

`score_from (N,)` says which hidden row predicts, `labels (N,)` what, and `completion_ids (N,)` for whom. No label is shifted
and nothing is masked by token id, so a layout is free to put tokens where it likes. Today every completion is a row of its own,
its prompt repeated, and rows of nearly one length share a sheet, padded on the right: under causal attention no scored token
sees that padding. Hidden rows are counted through all sheets, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class TokenTree(Protocol):
    """One prompt and its completions as token ids; `dpo_engine.data.TokenizedTree` is one."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...

    @property
    def completions(self) -> Sequence[Sequence[int]]: ...


@dataclass(frozen=True, kw_only=True)
class ScoredTree:
    """A tree with the log-probs of its completions under the reference, computed before."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]
    reference_token_logps: Sequence[Tensor]
    """One (tokens of the completion,) float32 for each completion, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class PreferenceForest:
    """T trees with C completions and N scored tokens, ready for the model. Indices are int64."""

    input_ids: tuple[Tensor, ...]  # sheets, each (rows, width)
    score_from: Tensor  # (N,) into the hidden rows of all sheets, flattened and laid end to end
    labels: Tensor  # (N,) vocabulary ids
    completion_ids: Tensor  # (N,) ascending, in [0, C)
    reference_token_logps: Tensor | None  # (N,) float32; None where the reference is yet to be asked
    tree_ids: Tensor  # (C,) ascending, in [0, T)
    trees: int
    """T."""
    lengths: tuple[int, ...]
    """Scored tokens of each of the C completions, known without asking the device."""
    tokens: int
    """Real tokens in `input_ids`, padding not counted."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceForest:
        """The same forest on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PreferenceForest:
        """The same forest in page-locked host memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> PreferenceForest:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, input_ids=tuple(map(change, self.input_ids)), **changed)


def build_forest(trees: Sequence[TokenTree]) -> PreferenceForest:
    """Lay trees out as separate rows, `prompt + completion`, on sheets padded on the right with token 0.

    The last token of a completion predicts nothing, so it is a label but not an input. At most an eighth of a row is padding.

    Raises:
        ValueError: no tree, an empty prompt (nothing would predict the first token), or an empty completion.
    """
    if not trees:
        raise ValueError("build_forest: no trees were given; expected at least one")
    rows: list[list[int]] = []
    scored: list[tuple[int, Sequence[int]]] = []  # (prompt length, completion) of each row
    tree_ids: list[int] = []
    for index, tree in enumerate(trees):
        if not tree.prompt_ids or not all(tree.completions):
            given = f"{len(tree.prompt_ids)} prompt tokens, completions of {[len(c) for c in tree.completions]} tokens"
            raise ValueError(f"build_forest: tree {index} has {given}; expected at least one token in each")
        for completion in tree.completions:
            rows.append([*tree.prompt_ids, *completion[:-1]])
            scored.append((len(tree.prompt_ids), completion))
            tree_ids.append(index)
    sheets, starts = _lay_out(rows)
    lengths = tuple(len(completion) for _, completion in scored)
    known = [logps for tree in trees if isinstance(tree, ScoredTree) for logps in tree.reference_token_logps]
    return PreferenceForest(
        input_ids=sheets,
        score_from=torch.cat(
            [
                torch.arange(len(completion)) + (start + prompt_length - 1)
                for start, (prompt_length, completion) in zip(starts, scored, strict=True)
            ]
        ),
        labels=torch.tensor([token for _, completion in scored for token in completion]),
        completion_ids=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)),
        reference_token_logps=torch.cat(known) if len(known) == len(rows) else None,
        tree_ids=torch.tensor(tree_ids),
        trees=len(trees),
        lengths=lengths,
        tokens=sum(map(len, rows)),
    )


def _lay_out(rows: Sequence[list[int]]) -> tuple[tuple[Tensor, ...], list[int]]:
    """Sheets of rows within an eighth of one length, and where each row begins among the hidden rows of all sheets."""
    sheets: list[list[int]] = []  # indices of rows, longest first
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        if not sheets or 8 * len(rows[index]) < 7 * len(rows[sheets[-1][0]]):
            sheets.append([])
        sheets[-1].append(index)
    tensors, starts, offset = [], [0] * len(rows), 0
    for members in sheets:
        width = len(rows[members[0]])
        tensors.append(torch.tensor([rows[index] + [0] * (width - len(rows[index])) for index in members]))
        for index in members:
            starts[index] = offset
            offset += width
    return tuple(tensors), starts


def sum_by_completion(token_logps: Tensor, lengths: Sequence[int]) -> Tensor:
    """`sums[c] = sum(token_logps[completion_ids == c])`: (N,), C lengths -> (C,).

    By slices, since `completion_ids` is ascending: exact in order on every device, where a scatter-add on CUDA is not.
    """
    return torch.stack([part.sum() for part in token_logps.split(list(lengths))])
