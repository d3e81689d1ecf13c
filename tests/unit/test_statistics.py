"""Are the numbers that a loss is given the same kinds for every forest of a run, and what the data's weights say?"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from dpo_engine.batch import Tree, build_forest
from dpo_engine.losses import LOSSES, PairStats, get_method
from dpo_engine.train.ranks import idle_forest
from dpo_engine.train.scoring import _completion_values
from dpo_engine.train.statistics import RANKED_PAIRS, forest_stats, pair_places
from dpo_engine.train.whole_step import joined
from support.naive_methods import pairs_of

PAIRS = sorted(name for name, method in LOSSES.items() if method.needs is PairStats)


def stats_of(name: str, forest: Any, *, sums: bool = False) -> Any:
    """As the scorer makes them, of random log-probs."""
    method = get_method(name)
    draw = torch.Generator().manual_seed(3)
    policy, reference = (-torch.rand(len(forest.labels), generator=draw) for _ in range(2))
    known = torch.rand(len(forest.lengths), generator=draw) if sums else None
    values = _completion_values(
        policy,
        reference if method.needs_reference and not sums else None,
        forest,
        sums=known if method.needs_reference else None,
        squares=policy - 1 if method.extras else None,
        token_kl=-policy if method.token_kl else None,
    )
    return forest_stats(method, values, forest, "all")


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("ranked", [False, True])
def test_an_idle_forest_has_the_fields_of_a_real_one_so_that_ranks_can_put_them_side_by_side(
    name: str, ranked: bool
) -> None:
    real = Tree(prompt_ids=[1, 2], completions=[[3, 4], [5]], ranks=(0, 1) if ranked else None)
    for sums in (False, True) if not get_method(name).public_part and not get_method(name).token_kl else (False,):
        stats = stats_of(name, build_forest([real]), sums=sums)
        idle = stats_of(name, idle_forest("shared", 2, True))
        assert [getattr(stats, f.name) is None for f in fields(stats)] == [
            getattr(idle, f.name) is None for f in fields(idle)
        ]
        assert len(idle) == 0 and len(joined([stats, idle])) == len(stats) == 1


@pytest.mark.parametrize("which", RANKED_PAIRS)
@pytest.mark.parametrize("ranks", [(0, 1), (0, 1, 2), (0, 0, 1), (0, 1, 1), (0, 1, 1, 2, 3, 3)])
def test_pairs_of_a_ranked_list_are_those_of_other_ranks_and_share_one_tree(which: str, ranks: tuple[int, ...]) -> None:
    places, shares = pair_places([2, len(ranks)], [0, 1, *ranks], which)
    assert places == [(0, 1), *((2 + i, 2 + j) for i, j in pairs_of(ranks, which))]
    assert shares[0] == 1 and sum(shares[1:]) == pytest.approx(1)


def test_weights_of_tokens_weigh_both_models_and_divergences_and_weights_of_completions_the_loss() -> None:
    tree = Tree(
        prompt_ids=[1],
        completions=[[2, 3, 4], [5, 6]],
        token_weights=[[1.0, 0.0, 2.0], [0.5, 1.0]],
        completion_weights=[3.0, 1.0],
    )
    forest = build_forest([tree])
    found, plain = stats_of("tdpo", forest), stats_of("tdpo", replace(forest, token_weights=None))
    draw = torch.Generator().manual_seed(3)
    policy, reference = (-torch.rand(5, generator=draw) for _ in range(2))
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    for name, tokens in (("chosen_logps", policy), ("reference_chosen_logps", reference), ("chosen_kl", -policy)):
        torch.testing.assert_close(getattr(found, name), (weights * tokens)[:3].sum()[None])
        torch.testing.assert_close(getattr(plain, name), tokens[:3].sum()[None])
    assert found.weights.tolist() == [2.0] and found.shares.tolist() == [1.0]
    public = stats_of("ld_dpo", forest)
    torch.testing.assert_close(public.chosen_public_logps, (weights * policy)[:2].sum()[None])
    torch.testing.assert_close(public.rejected_public_logps, public.rejected_logps)
