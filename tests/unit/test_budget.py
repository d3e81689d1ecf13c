"""Is a forest as large as memory allows, and is a tree that cannot fit named before anything runs?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from dpo_engine.batch import build_forest, tree_cost
from dpo_engine.errors import DataError
from dpo_engine.model.forest_attention import use_forest_attention
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from dpo_engine.train import budget
from dpo_engine.train.budget import MOST, bytes_per_token, forest_budget, free_bytes
from support.tiny_pairs import random_pairs, tiny_llama

MIB = 2**20
CPU = torch.device("cpu")


def of(longest: int = 14, **changes: Any) -> Any:
    known = {"token_bytes": float(MIB), "free": 8 * 2**30, "device": "cpu"}
    return forest_budget(None, [random_pairs(9, longest=longest), None], "shared", **(known | changes))


def test_where_memory_is_plenty_it_is_what_is_fast_enough() -> None:
    assert of().tokens == MOST["cpu"]


def test_half_of_the_free_memory_is_given_to_a_forest_in_multiples_of_256() -> None:
    assert of(free=1100 * MIB).tokens == 512
    assert of(free=1100 * MIB, token_bytes=MIB / 100).tokens == MOST["cpu"]


def test_the_largest_pair_fits_where_memory_has_room_for_it() -> None:
    data = random_pairs(9, longest=800)
    most = max(tree_cost(tree) for tree in data.trees)
    assert most > MOST["cpu"]
    found = of(longest=800)
    assert found.tokens == most and "row" in found.line()


def test_a_pair_that_memory_has_no_room_for_is_named_with_the_flags_that_help() -> None:
    with pytest.raises(DataError, match=r"row \d+: the pair takes \d+ tokens.*GiB are free; set max_length .*truncate"):
        of(longest=800, free=1024 * MIB)


def test_a_budget_that_was_asked_for_is_kept_or_refused() -> None:
    assert forest_budget(300, [random_pairs(9)], "shared").tokens == 300
    with pytest.raises(DataError, match=r"more than max_tokens_per_forest=8; raise it, or set max_length "):
        forest_budget(8, [random_pairs(9)], "shared")


def test_layouts_that_repeat_prompts_are_charged_for_them() -> None:
    data = random_pairs(9)
    most = max(tree_cost(tree, "packed") for tree in data.trees)
    assert forest_budget(most, [data], "packed").tokens == most
    with pytest.raises(DataError):
        forest_budget(most - 1, [data], "packed")


def bound_llama(**changes: Any) -> Any:
    model = tiny_llama(**changes)
    bind_scoring(model)
    use_forest_attention(model)
    return model


def test_what_a_token_keeps_is_what_a_large_forest_keeps_per_token() -> None:
    model = bound_llama()
    predicted = bytes_per_token(model, "shared", checkpointing=False, layers=2, device=CPU)
    forest = build_forest(random_pairs(60, longest=40).trees)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = forest_token_logps(model, forest)
    assert predicted == pytest.approx(sum(kept.values()) / forest.tokens, rel=0.25)
    del logps


def test_more_layers_keep_more_and_checkpointing_keeps_less() -> None:
    two, four = (
        bytes_per_token(bound_llama(num_hidden_layers=n), "shared", checkpointing=False, layers=n, device=CPU)
        for n in (2, 4)
    )
    assert 1.7 < four / two < 2.1
    model = bound_llama(num_hidden_layers=4)
    assert bytes_per_token(model, "shared", checkpointing=True, layers=4, device=CPU) < 0.7 * four


def test_free_memory_leaves_room_for_gradients_and_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    trains = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**9}))
    monkeypatch.setattr(budget, "_left_in_cgroup", lambda: [2**62])
    assert free_bytes(CPU, model) == 10**9 - 12 * trains
    assert free_bytes(CPU, model.requires_grad_(False)) == 10**9
    monkeypatch.setattr(budget, "_left_in_cgroup", lambda: [10**8])
    assert free_bytes(CPU, model) == 10**8


def test_a_containers_limit_is_read_where_it_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1200\n")
    monkeypatch.setattr(budget, "_CGROUP", tmp_path)
    assert budget._left_in_cgroup() == [3800]
    (tmp_path / "memory.max").write_text("max\n")
    assert budget._left_in_cgroup() == [2**62]
