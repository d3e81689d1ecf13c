"""What should the completions of a few trees score by a model alone, and what do they score in forests?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo_engine.batch import ForestCollator, pack_trees
from dpo_engine.data import TokenizedTree
from dpo_engine.model.scoring import forest_token_logps
from support.architectures import VOCABULARY

SIZES = ((9, (6, 11)), (14, (1, 5)), (1, (8, 2, 5)), (12, (10,)))
"""Prompt and completions of pairs, a group, a single; of one token and of more than a window."""


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_trees(sizes: Sequence[tuple[int, Sequence[int]]] = SIZES) -> list[TokenizedTree]:
    """A tree for each (tokens of the prompt, tokens of its completions)."""
    return [
        TokenizedTree(
            prompt_ids=random_ids(prompt, 100 * i),
            completions=tuple(random_ids(n, 100 * i + k + 1) for k, n in enumerate(completions)),
            origin=f"row {i}",
        )
        for i, (prompt, completions) in enumerate(sizes)
    ]


def one_by_one(model: nn.Module, trees: Sequence[TokenizedTree]) -> Tensor:
    """(N,) log-probs of all completions' tokens by the model's own logits, a sequence a call."""
    device = next(model.parameters()).device
    found = []
    for tree in trees:
        for completion in tree.completions:
            sequence = torch.tensor([[*tree.prompt_ids, *completion]], device=device)
            logps = model(input_ids=sequence, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            found.append(logps.gather(1, sequence[0, 1:, None]).squeeze(1)[len(tree.prompt_ids) - 1 :])
    return torch.cat(found)


def in_forests(model: nn.Module, trees: Sequence[TokenizedTree], collate: ForestCollator) -> Tensor:
    """(N,) the same by forests, put back into the order of `one_by_one`."""
    device = next(model.parameters()).device
    packed = pack_trees(trees, collate.max_tokens, collate.layout, collate.longest)
    found: dict[int, Tensor] = {}
    for forest, members in zip(collate(trees).to(device).forests, packed, strict=True):
        lengths = [sum(map(len, tree.completions)) for tree in members]
        parts = forest_token_logps(model, forest).split(lengths)
        found.update((id(tree), part) for tree, part in zip(members, parts, strict=True))
    return torch.cat([found[id(tree)] for tree in trees])


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """By name, under one random upstream gradient."""
    model.zero_grad()
    upstream = torch.randn(len(logps), generator=torch.Generator().manual_seed(5))
    (logps * upstream.to(logps.device)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_logps_agree(found: Tensor, want: Tensor) -> None:
    assert bool(((found - want).abs() <= 1e-5 * want.abs().clamp(min=1)).all()), (found - want).abs().max()


def assert_gradients_agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Within 1e-4 of each parameter's norm, or 1e-8 of the norm of all: some are nothing but rounding (a key's bias)."""
    assert found.keys() == wanted.keys()
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, want in wanted.items():
        error = (found[name] - want).norm()
        assert error <= 1e-4 * max(want.norm(), 1e-4 * whole), f"{name}: {error:.3g} of {want.norm():.3g}"


def assert_gradients_no_worse(found: dict[str, Tensor], than: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Within 1e-4 of float64's, or twice as far from them as separate sequences in the same dtype are.

    Adapters behind a saturated softmax have gradients that are small differences, whose rounding depends on the threads.
    """
    assert found.keys() == than.keys() == truth.keys()
    whole = torch.stack([g.norm() for g in truth.values()]).norm()
    for name, exact in truth.items():
        error, own = (found[name] - exact).norm(), (than[name] - exact).norm()
        assert error <= max(1e-4 * max(exact.norm(), 1e-4 * whole), 2 * own), (
            f"{name}: {error:.3g} of {exact.norm():.3g}"
        )
