"""How do numbers of completions become what a loss is given: pairs, labelled completions or ranked lists?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dpo_engine.batch import PreferenceForest
from dpo_engine.errors import DataError
from dpo_engine.losses import ListStats, Method, PairStats, UnpairedStats
from dpo_engine.losses.method import Stats

RANKED_PAIRS = ("all", "adjacent", "best_worst")
"""Which completions of a ranked list are compared by a method of pairs."""


@dataclass(frozen=True, kw_only=True)
class CompletionValues:
    """What policy and reference say of a forest's C completions: sums over scored tokens, weighted as the data says, (C,)."""

    logps: Tensor
    """With the policy's gradient."""
    reference_logps: Tensor | None
    token_logps: Tensor
    """(N,) what `logps` are the sums of."""
    reference_token_logps: Tensor | None
    """(N,); None where only sums are known, or nothing is needed."""
    confidence: Tensor | None
    """Means, without gradient."""
    kl: Tensor | None
    """With gradient."""
    k3: Tensor | None
    """Without."""


def forest_stats(method: Method, values: CompletionValues, forest: PreferenceForest, ranked_pairs: str) -> Any:
    """The `method.needs` of a forest.

    Args:
        ranked_pairs: one of `RANKED_PAIRS`, of trees with ranks.

    Raises:
        DataError: the forest's trees are not what the method trains on.
    """
    if method.needs is UnpairedStats:
        return _unpaired(values, forest)
    if method.needs is ListStats:
        return _lists(values, forest)
    return _pairs(method, values, forest, ranked_pairs)


def pair_places(
    sizes: Sequence[int], ranks: Sequence[int] | None, ranked_pairs: str
) -> tuple[list[tuple[int, int]], list[float]]:
    """`(chosen, rejected)` places among all completions, and what part of its tree each pair is.

    Args:
        sizes: completions of each tree.
        ranks: of each completion; None: the trees are pairs, chosen first.
        ranked_pairs: "all" whose ranks differ; "adjacent": those of a rank with those of the next; "best_worst": the first with
            the last.
    """
    places: list[tuple[int, int]] = []
    shares: list[float] = []
    for first, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        if ranks is None:
            if size != 2:
                raise DataError(
                    f"a tree has {size} completions and no ranks; expected a chosen and a rejected one, or ranks of all"
                )
            found = [(first, first + 1)]
        else:
            mine = ranks[first : first + size]
            below = {rank: min((r for r in mine if r > rank), default=rank) for rank in mine}
            found = [
                (first + i, first + j)
                for i in range(size)
                for j in range(i + 1, size)
                if mine[i] < mine[j]
                and (ranked_pairs != "adjacent" or mine[j] == below[mine[i]])
                and (ranked_pairs != "best_worst" or (i, j) == (0, size - 1))
            ]
        places += found
        shares += [1 / len(found)] * len(found)
    return places, shares


def _pairs(method: Method, values: CompletionValues, forest: PreferenceForest, ranked_pairs: str) -> PairStats:
    """The fields that are there depend on the method alone, not on the forest: ranks put them together side by side."""
    sizes = forest.sizes[: forest.trees]  # none of an idle forest
    places, shares = pair_places(sizes, forest.ranks, ranked_pairs)
    is_plain = forest.ranks is None
    device = values.logps.device

    def there(numbers: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)

    index = [there([pair[side] for pair in places], torch.int64) for side in (0, 1)]

    def both(of_completions: Tensor | None) -> Any:
        """(P,) of chosen and of rejected completions."""
        if of_completions is None:
            return None, None
        if is_plain:
            return of_completions.view(-1, 2)[: forest.trees].unbind(-1)
        if not of_completions.requires_grad:
            return tuple(of_completions.index_select(0, of_side) for of_side in index)
        each = of_completions.unbind()  # the gradient of index_select is not summed in order on CUDA
        empty = of_completions[:0]
        return tuple(torch.stack([each[pair[side]] for pair in places]) if places else empty for side in (0, 1))

    chosen, rejected = both(values.logps)
    reference_chosen, reference_rejected = both(values.reference_logps)
    public: dict[str, Tensor] = {}
    if method.public_part:
        names = ("chosen_public_logps", "rejected_public_logps")
        public |= zip(names, _public(values.token_logps, forest, places, chosen), strict=True)
        if values.reference_token_logps is not None:
            found = _public(values.reference_token_logps, forest, places, chosen)
            public |= zip((f"reference_{name}" for name in names), found, strict=True)
    share = there(shares)
    chosen_lengths, rejected_lengths = both(there(forest.lengths))
    chosen_kl, rejected_kl = both(values.kl)
    chosen_confidence, rejected_confidence = both(values.confidence)
    k3 = None
    if method.needs_reference:
        k3 = torch.full_like(share, torch.nan) if values.k3 is None else torch.stack(both(values.k3)).mean(0)
    return PairStats(
        chosen_logps=chosen,
        rejected_logps=rejected,
        reference_chosen_logps=reference_chosen,
        reference_rejected_logps=reference_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        chosen_confidence=chosen_confidence,
        rejected_confidence=rejected_confidence,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
        weights=share * torch.stack(both(_completion_weights(forest, values.logps))).mean(0),
        shares=share,
        k3=k3,
        **public,
    )


def _public(
    token_logps: Tensor, forest: PreferenceForest, places: Sequence[tuple[int, int]], like: Tensor
) -> tuple[Tensor, Tensor]:
    """(P,) each: sums over the first tokens of each pair's completions, as many as the shorter has."""
    if not places:
        return like[:0], like[:0]
    shared = [min(forest.lengths[place] for place in pair) for pair in places]
    if forest.ranks is None:  # each completion is in one pair: its first tokens and its rest, one after the other
        cuts = [
            (count, forest.lengths[place] - count) for pair, count in zip(places, shared, strict=True) for place in pair
        ]
        firsts = token_logps.split([length for cut in cuts for length in cut])[::2]
        sums = torch.stack([part.sum() for part in firsts]).view(-1, 2)
        return sums[:, 0], sums[:, 1]
    starts = list(accumulate(forest.lengths, initial=0))
    chosen, rejected = (
        torch.stack(
            [
                token_logps[starts[pair[side]] : starts[pair[side]] + count].sum()
                for pair, count in zip(places, shared, strict=True)
            ]
        )
        for side in (0, 1)
    )
    return chosen, rejected


def _unpaired(values: CompletionValues, forest: PreferenceForest) -> UnpairedStats:
    if forest.desirable is None and forest.trees:
        raise DataError(
            "trees came without labels to a method of unpaired data; expected `desirable`, one a completion"
        )
    count = sum(forest.sizes[: forest.trees])
    device = values.logps.device
    share = torch.tensor([1 / size for size in forest.sizes[: forest.trees] for _ in range(size)]).to(
        device, non_blocking=True
    )
    return UnpairedStats(
        logps=values.logps[:count],
        reference_logps=_first(values.reference_logps, count),
        k3=_first(values.k3, count),
        lengths=torch.tensor(forest.lengths[:count], dtype=torch.float32).to(device, non_blocking=True),
        desirable=torch.tensor((forest.desirable or ())[:count], dtype=torch.bool).to(device, non_blocking=True),
        weights=_completion_weights(forest, values.logps)[:count] * share,
        shares=share,
    )


def _lists(values: CompletionValues, forest: PreferenceForest) -> ListStats:
    sizes = forest.sizes[: forest.trees]
    ranks = forest.ranks
    if ranks is None:
        if any(size != 2 for size in sizes):
            raise DataError("trees came without ranks to a method of ranked lists; expected `ranks`, one a completion")
        ranks = (0, 1) * len(sizes)
    count, device = sum(sizes), values.logps.device
    list_ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)).to(
        device, non_blocking=True
    )
    weights = _completion_weights(forest, values.logps)[:count]
    sums = weights.new_zeros(len(sizes)).index_add(0, list_ids, weights)
    return ListStats(
        logps=values.logps[:count],
        reference_logps=_first(values.reference_logps, count),
        k3=_first(values.k3, count),
        lengths=torch.tensor(forest.lengths[:count], dtype=torch.float32).to(device, non_blocking=True),
        list_ids=list_ids,
        ranks=torch.tensor(ranks[:count], dtype=torch.int64).to(device, non_blocking=True),
        lists=len(sizes),
        weights=sums / torch.tensor(sizes, dtype=torch.float32).to(device, non_blocking=True),
    )


def _first(values: Tensor | None, count: int) -> Tensor | None:
    return None if values is None else values[:count]


def _completion_weights(forest: PreferenceForest, like: Tensor) -> Tensor:
    """(C,) what the data says that each completion counts."""
    return torch.ones_like(like).detach() if forest.completion_weights is None else forest.completion_weights


def weighted_sum(losses: Tensor, stats: Stats) -> Tensor:
    """() the sum of `weights * losses`."""
    return (losses if stats.weights is None else stats.weights * losses).sum()
