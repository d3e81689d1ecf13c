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

    It may also have what `Tree` has:

        scored              a sequence of bools per completion: which of its tokens are scored (all, without it), as in a
                            completion of several turns of which the user's are not
        token_weights       a sequence of numbers per completion, one a token: what its log-prob counts in the sum (1)
        completion_weights  a number per completion: what it counts in the loss (1); a pair counts their mean
        reference_logps     a number per completion: the sum of its scored tokens' log-probs under the reference
        desirable           a bool per completion, of data without pairs
        ranks               an int per completion, of a ranked list: ascending from 0, the best; equal where two tie
        mismatched          whether the last completion is another prompt's, put here for a baseline (False)
        origin              where it came from, for messages
    """

    @property
    def prompt_ids(self) -> Sequence[int]: ...

    @property
    def completions(self) -> Sequence[Sequence[int]]: ...


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A `TokenTree` with everything it may have."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]
    scored: Sequence[Sequence[bool]] | None = None
    token_weights: Sequence[Sequence[float]] | None = None
    completion_weights: Sequence[float] | None = None
    reference_token_logps: Sequence[Tensor] | None = None
    """One (scored tokens of the completion,) float32 for each completion, on the CPU: the reference, asked before."""
    reference_logps: Sequence[float] | None = None
    """Or a sum over scored tokens for each completion, in nats, where only that is known."""
    desirable: Sequence[bool] | None = None
    ranks: Sequence[int] | None = None
    mismatched: bool = False
    origin: str | None = None
    """Where the tree came from, for messages."""


OF_COMPLETIONS = (
    "scored", "token_weights", "completion_weights", "reference_token_logps", "reference_logps", "desirable", "ranks",
)  # fmt: skip
"""What a tree may have one of for each completion."""

TreeLike = TokenTree | tuple[Sequence[int], Sequence[Sequence[int]]]
"""A tree, or its prompt's ids and a list of its completions' ids."""


@dataclass(frozen=True, kw_only=True)
class ForestShape:
    """Who may see whom in a row of trees: token q sees k iff k is not later by position, in the same span, and in the
    prompt or in q's own completion."""

    spans: tuple[tuple[int, int], ...]
    """Token ranges `[first, last)` of the trees, in order, without gaps."""
    stretches: tuple[tuple[int, int, int, int], ...]
    """The same tokens cut finer, `(prompt_first, prompt_last, first, last)`: those of `[first, last)` see of one another, and of
    the prompt in `[prompt_first, prompt_last)`, which is empty where they begin with it themselves."""
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
    reference_logps: Tensor | None  # (C,) float32, sums; None where they are not known, or log-probs of tokens are
    token_weights: Tensor | None  # (N,) float32; None where every token counts 1
    tree_ids: Tensor  # (C,) ascending, in [0, T)
    completion_weights: Tensor | None  # (C,) float32; None where every completion counts 1
    trees: int
    """T."""
    lengths: tuple[int, ...]
    """Scored tokens of each of the C completions, known without asking the device."""
    sizes: tuple[int, ...]
    """Completions of each tree."""
    desirable: tuple[bool, ...] | None
    """Of each completion; None where completions have no labels."""
    ranks: tuple[int, ...] | None
    """Of each completion, 0 for a tree's best; None where completions have none."""
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
    token_weights: Sequence[float] | None  # one for each of `ids`
    weight: float | None

    @property
    def inputs(self) -> Sequence[int]:
        """What the model reads: the last token predicts nothing, so it is a label but not an input."""
        return self.ids[:-1]


def build_forest(trees: Sequence[TreeLike], layout: str = "shared") -> PreferenceForest:
    """Lay trees out, in their order.

    Args:
        trees: of any numbers of completions: 1 (unpaired), 2 (a pair, chosen first), more (a ranked list, a group).
        layout: one of `LAYOUTS`; `prepare_model` finds the one that a model is right on.

    Raises:
        ValueError: no tree, an unknown layout, an empty prompt (nothing would predict the first token), an empty completion,
            or one of which nothing is scored.
    """
    if not trees:
        raise ValueError("build_forest: no trees were given; expected at least one")
    if layout not in LAYOUTS:
        raise ValueError(f"build_forest: layout={layout!r}; expected one of {', '.join(LAYOUTS)}")
    given = [as_tree(tree) for tree in trees]
    completions = [completion for index, tree in enumerate(given) for completion in _completions(index, tree)]
    if layout in ("shared", "packed"):
        sheets, shape, sources = _in_one_row(completions, layout == "shared")
    else:
        sheets, shape, sources = _padded(completions, layout == "alone")
    lengths = tuple(len(completion.scored) for completion in completions)
    known = [logps for tree in given for logps in getattr(tree, "reference_token_logps", None) or ()]
    sums = [logps for tree in given for logps in getattr(tree, "reference_logps", None) or ()]
    return PreferenceForest(
        layout=layout,
        input_ids=sheets,
        shape=shape,
        score_from=torch.tensor([row for rows in sources for row in rows]),
        labels=torch.tensor([c.ids[i] for c in completions for i in c.scored]),
        completion_ids=torch.repeat_interleave(torch.arange(len(completions)), torch.tensor(lengths)),
        reference_token_logps=torch.cat(known) if len(known) == len(completions) else None,
        reference_logps=torch.tensor(sums, dtype=torch.float32) if len(sums) == len(completions) else None,
        token_weights=_weights(
            [[c.token_weights[i] for i in c.scored] if c.token_weights else None for c in completions], lengths
        ),
        tree_ids=torch.tensor([completion.tree for completion in completions]),
        completion_weights=_weights(
            [None if c.weight is None else [c.weight] for c in completions], [1] * len(lengths)
        ),
        trees=len(given),
        lengths=lengths,
        sizes=tuple(len(tree.completions) for tree in given),
        desirable=_of_completions(given, "desirable"),
        ranks=_of_completions(given, "ranks"),
        tokens=sum(tree_cost(tree, layout) for tree in given),
    )


def _of_completions(trees: Sequence[TokenTree], name: str) -> tuple[Any, ...] | None:
    """What the trees say of each completion; None where one does not, or has a mismatched one, of which nothing is said."""
    if any(getattr(tree, "mismatched", False) for tree in trees):
        return None
    found = [_one_each(index, tree, name) for index, tree in enumerate(trees)]
    if any(values is None for values in found):
        return None
    return tuple(value for values in found if values is not None for value in values)


def as_tree(tree: TreeLike) -> TokenTree:
    """The tree itself, or that of `(prompt_ids, completions)`."""
    return Tree(prompt_ids=tree[0], completions=tree[1]) if isinstance(tree, tuple) else tree


def with_completions(tree: TokenTree, which: slice) -> Tree:
    """The tree with some of its completions, and what belongs to them."""

    def some(name: str) -> Any:
        values = getattr(tree, name, None)
        return None if values is None else values[which]

    return Tree(
        prompt_ids=tree.prompt_ids,
        completions=tree.completions[which],
        origin=getattr(tree, "origin", None),
        **{name: some(name) for name in OF_COMPLETIONS},
    )


def tree_cost(tree: TreeLike, layout: str = "shared") -> int:
    """Tokens that a tree takes: its prompt once (`shared`) or once per completion, and each completion but its last token
    (`alone`: with it)."""
    tree = as_tree(tree)
    prompts, unread = 1 if layout == "shared" else len(tree.completions), 0 if layout == "alone" else 1
    return prompts * len(tree.prompt_ids) + sum(len(completion) - unread for completion in tree.completions)


def _weights(given: Sequence[Sequence[float] | None], lengths: Sequence[int]) -> Tensor | None:
    """All weights end to end, 1 where a completion has none; None where none has any."""
    if all(weights is None for weights in given):
        return None
    filled = [[1.0] * length if weights is None else weights for weights, length in zip(given, lengths, strict=True)]
    return torch.tensor([weight for weights in filled for weight in weights])


def _completions(index: int, tree: TokenTree) -> list[_Completion]:
    if not tree.prompt_ids or not tree.completions or not all(tree.completions):
        given = f"{len(tree.prompt_ids)} prompt tokens, completions of {[len(c) for c in tree.completions]} tokens"
        raise ValueError(f"build_forest: tree {index} has {given}; expected at least one token in each")
    count = len(tree.completions)
    masks = _one_each(index, tree, "scored") or [[True] * len(ids) for ids in tree.completions]
    weights = _one_each(index, tree, "completion_weights") or [None] * count
    token_weights = _one_each(index, tree, "token_weights") or [None] * count
    found = []
    for ids, mask, weight, by_token in zip(tree.completions, masks, weights, token_weights, strict=True):
        scored = [i for i, counts in enumerate(mask) if counts]
        if len(mask) != len(ids) or not scored:
            raise ValueError(
                f"build_forest: tree {index} has a completion of {len(ids)} tokens with a mask of {len(mask)} that scores "
                f"{len(scored)}; expected one entry a token, and at least one that is scored"
            )
        if by_token is not None and len(by_token) != len(ids):
            raise ValueError(
                f"build_forest: tree {index} has a completion of {len(ids)} tokens with {len(by_token)} token_weights; "
                "expected one a token"
            )
        found.append(
            _Completion(
                tree=index, prompt=tree.prompt_ids, ids=ids, scored=scored, token_weights=by_token, weight=weight
            )
        )
    return found


def _one_each(index: int, tree: TokenTree, name: str) -> Sequence[Any] | None:
    """An optional attribute that has an entry for every completion."""
    given = getattr(tree, name, None)
    if given is not None and len(given) != len(tree.completions):
        raise ValueError(
            f"build_forest: tree {index} has {len(tree.completions)} completions and {len(given)} {name}; expected as many"
        )
    return given


def _in_one_row(
    completions: Sequence[_Completion], shared: bool
) -> tuple[tuple[Tensor, ...], ForestShape | None, list[list[int]]]:
    """One row of tokens, what each may see, and the hidden row that predicts each scored token."""
    ids: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    firsts: list[int] = []  # where each span begins
    stretches: list[tuple[int, int, int, int]] = []
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
        stretch = (firsts[-1], firsts[-1] + length, begin) if branch else (firsts[-1], firsts[-1], firsts[-1])
        ids += completion.inputs
        if len(ids) > stretch[-1]:
            stretches.append((*stretch, len(ids)))
        positions += range(length, length + len(completion.inputs))
        branches += [branch] * len(completion.inputs)
    shape = ForestShape(
        spans=tuple(zip(firsts, [*firsts[1:], len(ids)], strict=True)),
        stretches=tuple(stretches),
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


def sum_by_completion(token_logps: Tensor, lengths: Sequence[int], token_weights: Tensor | None = None) -> Tensor:
    """`sums[c] = sum((token_weights * token_logps)[completion_ids == c])`: (N,), C lengths, (N,) -> (C,).

    By slices, since `completion_ids` is ascending: exact in order on every device, where a scatter-add on CUDA is not.
    """
    counted = token_logps if token_weights is None else token_weights * token_logps
    return torch.stack([part.sum() for part in counted.split(list(lengths))])
