"""Is a forest's every log-prob and gradient that of its sequences one by one, on every kind of attention?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpo_engine.batch import PreferenceForest, build_forest
from dpo_engine.data import TokenizedTree
from dpo_engine.model.forest_attention import restore_attention, use_forest_attention
from dpo_engine.model.scoring import bind_scoring
from support.architectures import SHARING, VOCABULARY, tiny_model


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def trees() -> list[TokenizedTree]:
    """Pairs, a single, a group; prompts and completions of one token and of more than a window."""
    sizes = [(9, (6, 11)), (14, (1, 5)), (1, (8, 2, 5)), (12, (10,))]
    return [
        TokenizedTree(
            prompt_ids=random_ids(prompt, 100 * i),
            completions=tuple(random_ids(n, 100 * i + k + 1) for k, n in enumerate(completions)),
            origin=f"row {i}",
        )
        for i, (prompt, completions) in enumerate(sizes)
    ]


def one_by_one(model: torch.nn.Module, data: list[TokenizedTree]) -> Tensor:
    """Log-probs of all completions' tokens by the model's own logits, a sequence a call."""
    found = []
    for tree in data:
        for completion in tree.completions:
            sequence = torch.tensor([[*tree.prompt_ids, *completion]])
            logps = model(input_ids=sequence, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            found.append(logps.gather(1, sequence[0, 1:, None]).squeeze(1)[len(tree.prompt_ids) - 1 :])
    return torch.cat(found)


def of_forest(model: torch.nn.Module, forest: PreferenceForest) -> Tensor:
    return model(
        input_ids=forest.input_ids, score_from=forest.score_from, labels=forest.labels, forest_shape=forest.shape
    ).token_logps


def gradients(model: torch.nn.Module, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    upstream = torch.randn(len(logps), generator=torch.Generator().manual_seed(5))
    (logps * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, want in wanted.items():
        assert (found[name] - want).norm() <= 1e-4 * max(want.norm(), 1e-2 * whole * 1e-4), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("name", SHARING)
def test_a_forest_gives_what_its_sequences_give(name: str, layout: str, checkpointing: bool) -> None:
    model = tiny_model(name).train()
    data = trees()
    want = one_by_one(model, data)
    wanted = gradients(model, want)
    bind_scoring(model)
    assert use_forest_attention(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got = of_forest(model, build_forest(data, layout))
    assert bool(((got - want).abs() <= 1e-5 * want.abs().clamp(min=1)).all()), (got - want).abs().max()
    assert_gradients_agree(gradients(model, got), wanted)


@pytest.mark.parametrize("name", SHARING)
def test_order_and_packing_do_not_matter(name: str) -> None:
    model = tiny_model(name).eval()
    bind_scoring(model)
    use_forest_attention(model)
    data = trees()
    with torch.no_grad():
        together = of_forest(model, build_forest(data))
        alone = torch.cat([of_forest(model, build_forest([tree])) for tree in data])
        reverse = of_forest(model, build_forest(data[::-1]))
    assert (together - alone).abs().max() <= 1e-5
    lengths = [sum(map(len, tree.completions)) for tree in data[::-1]]
    assert (torch.cat(reverse.split(lengths)[::-1]) - together).abs().max() <= 1e-5


def test_without_a_forest_the_model_attends_as_it_did() -> None:
    model = tiny_model("gemma3").eval()
    ids = torch.tensor([random_ids(20, 0), random_ids(20, 1)])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        generated = model.generate(ids[:1, :8], max_new_tokens=6, do_sample=False)
        bind_scoring(model)
        use_forest_attention(model)
        assert torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(model.generate(ids[:1, :8], max_new_tokens=6, do_sample=False), generated)
        restore_attention(model)
        assert torch.equal(model(input_ids=ids).logits, before)
