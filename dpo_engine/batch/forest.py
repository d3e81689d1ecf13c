"""What is a batch? A forest: trees, each a prompt with its K completions, and explicit indices of what is scored.

`score_from (N,)` says which hidden row predicts, `labels (N,)` what, and `completion_ids (N,)` for whom. No label is
shifted and nothing is masked by token id, so a layout is free to put tokens where it likes:

    shared   each prompt once, then its completions without their last tokens; trees end to end in one row
    packed   each completion behind a copy of its prompt; end to end in one row
    padded   each completion behind a copy of its prompt in a row of its own, rows of nearly one length on a sheet
    alone    every row on a sheet of its own, its last token too, for models in which a row's length changes what it computes

In the first two a token must not see other trees or other completions: `shape` says what it may see, and
`model.forest_attention` makes it so. In the others the model's own causal attention is enough. Hidden rows are counted
through all sheets, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

LAYOUTS = ("shared", "packed", "padded", "alone")


class TokenTree(Protocol):
    """One prompt and its completions as token ids; `dpo_engine.data.TokenizedTree` is one.

    It may also have `scored`, a sequence of bools per completion: which of its tokens are scored (all, without it), as
    in a completion of several turns of which the user's are not.
    """

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
    """One (scored tokens of the completion,) float32 for each completion, on the CPU."""
    scored: Sequence[Sequence[bool]] | None = None


@dataclass(frozen=True, kw_only=True)
class ForestShape:
    """Who may see whom in a row of trees: token q sees k iff k is not later by position, in the same span, and in the
    prompt or in q's own completion."""

    spans: tuple[tuple[int, int], ...]
    """Token ranges `[first, last)` of the trees, in order, without gaps."""
    position_ids: Tensor  # (1, L) int64, from 0 in every tree; every completion goes on from its prompt
    branches: Tensor  # (L,) int64, -1 in a prompt, else the completion's number within its tree


@dataclass(frozen=True, kw_only=True)
class PreferenceForest:
    """T trees with C completions and N scored tokens, ready for the model. Indices are int64."""

    layout: str
    """One of `LAYOUTS`."""
    input_ids: tuple[Tensor, ...]  # sheets, each (rows, width); one of (1, L) where `shape` is given
    shape: ForestShape | None
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
        shape = None if self.shape is None else _changed(self.shape, change)
        return replace(_changed(self, change), input_ids=tuple(map(change, self.input_ids)), shape=shape)


def _changed(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass with `change` applied to its tensors."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(record, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class _Completion:
    """One completion as it is laid out: where its scored tokens are predicted from is up to the layout."""

    tree: int
    prompt: Sequence[int]
    ids: Sequence[int]
    scored: Sequence[int]  # which of `ids`

    @property
    def inputs(self) -> Sequence[int]:
        """What the model reads: the last token predicts nothing, so it is a label but not an input."""
        return self.ids[:-1]


def build_forest(trees: Sequence[TokenTree], layout: str = "shared") -> PreferenceForest:
    """Lay trees out.

    Raises:
        ValueError: no tree, an unknown layout, an empty prompt (nothing would predict the first token), an empty completion,
            or one of which nothing is scored.
    """
    if not trees:
        raise ValueError("build_forest: no trees were given; expected at least one")
    if layout not in LAYOUTS:
        raise ValueError(f"build_forest: layout={layout!r}; expected one of {', '.join(LAYOUTS)}")
    completions = [completion for index, tree in enumerate(trees) for completion in _completions(index, tree)]
    if layout in ("shared", "packed"):
        sheets, shape, sources = _in_one_row(completions, layout == "shared")
    else:
        sheets, shape, sources = _padded(completions, layout == "alone")
    lengths = tuple(len(completion.scored) for completion in completions)
    known = [logps for tree in trees for logps in getattr(tree, "reference_token_logps", ())]
    return PreferenceForest(
        layout=layout,
        input_ids=sheets,
        shape=shape,
        score_from=torch.tensor([row for rows in sources for row in rows]),
        labels=torch.tensor([c.ids[i] for c in completions for i in c.scored]),
        completion_ids=torch.repeat_interleave(torch.arange(len(completions)), torch.tensor(lengths)),
        reference_token_logps=torch.cat(known) if len(known) == len(completions) else None,
        tree_ids=torch.tensor([completion.tree for completion in completions]),
        trees=len(trees),
        lengths=lengths,
        tokens=sum(tree_cost(tree, layout) for tree in trees),
    )


def tree_cost(tree: TokenTree, layout: str = "shared") -> int:
    """Tokens that a tree takes: its prompt once (`shared`) or once per completion, and each completion but its last token
    (`alone`: with it)."""
    prompts, unread = 1 if layout == "shared" else len(tree.completions), 0 if layout == "alone" else 1
    return prompts * len(tree.prompt_ids) + sum(len(completion) - unread for completion in tree.completions)


def _completions(index: int, tree: TokenTree) -> list[_Completion]:
    if not tree.prompt_ids or not tree.completions or not all(tree.completions):
        given = f"{len(tree.prompt_ids)} prompt tokens, completions of {[len(c) for c in tree.completions]} tokens"
        raise ValueError(f"build_forest: tree {index} has {given}; expected at least one token in each")
    masks = getattr(tree, "scored", None) or [[True] * len(ids) for ids in tree.completions]
    found = []
    for ids, mask in zip(tree.completions, masks, strict=True):
        scored = [i for i, counts in enumerate(mask) if counts]
        if len(mask) != len(ids) or not scored:
            raise ValueError(
                f"build_forest: tree {index} has a completion of {len(ids)} tokens with a mask of {len(mask)} that scores "
                f"{len(scored)}; expected one entry a token, and at least one that is scored"
            )
        found.append(_Completion(tree=index, prompt=tree.prompt_ids, ids=ids, scored=scored))
    return found


def _in_one_row(
    completions: Sequence[_Completion], shared: bool
) -> tuple[tuple[Tensor, ...], ForestShape | None, list[list[int]]]:
    """One row of tokens, what each may see, and the hidden row that predicts each scored token."""
    ids: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    firsts: list[int] = []  # where each span begins
    sources = []
    tree = branch = -1
    for completion in completions:
        length = len(completion.prompt)
        if not shared or completion.tree != tree:
            tree, branch = completion.tree, -1
            firsts.append(len(ids))
            ids += completion.prompt
            positions += range(length)
            branches += [-1] * length
        branch += 1
        # Token i is predicted by the one before it, and the first by the prompt's last.
        begin = len(ids)
        last_of_prompt = firsts[-1] + length - 1
        sources.append([last_of_prompt if i == 0 else begin + i - 1 for i in completion.scored])
        ids += completion.inputs
        positions += range(length, length + len(completion.inputs))
        branches += [branch] * len(completion.inputs)
    shape = ForestShape(
        spans=tuple(zip(firsts, [*firsts[1:], len(ids)], strict=True)),
        position_ids=torch.tensor([positions]),
        branches=torch.tensor(branches),
    )
    return (torch.tensor([ids]),), shape, sources


def _padded(
    completions: Sequence[_Completion], alone: bool
) -> tuple[tuple[Tensor, ...], ForestShape | None, list[list[int]]]:
    """Sheets of rows within an eighth of one length, padded on the right with token 0.

    Under causal attention no scored token sees that padding.
    """
    # A row's length counts its last token, so one whose length matters keeps it.
    rows = [[*completion.prompt, *(completion.ids if alone else completion.inputs)] for completion in completions]
    sheets: list[list[int]] = []  # indices of rows, longest first
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        if not sheets or alone or 8 * len(rows[index]) < 7 * len(rows[sheets[-1][0]]):
            sheets.append([])
        sheets[-1].append(index)
    tensors, starts, offset = [], [0] * len(rows), 0
    for members in sheets:
        width = len(rows[members[0]])
        tensors.append(torch.tensor([rows[index] + [0] * (width - len(rows[index])) for index in members]))
        for index in members:
            starts[index] = offset
            offset += width
    sources = [
        [start + len(completion.prompt) + i - 1 for i in completion.scored]
        for start, completion in zip(starts, completions, strict=True)
    ]
    return tuple(tensors), None, sources


def sum_by_completion(token_logps: Tensor, lengths: Sequence[int]) -> Tensor:
    """`sums[c] = sum(token_logps[completion_ids == c])`: (N,), C lengths -> (C,).

    By slices, since `completion_ids` is ascending: exact in order on every device, where a scatter-add on CUDA is not.
    """
    return torch.stack([part.sum() for part in token_logps.split(list(lengths))])
