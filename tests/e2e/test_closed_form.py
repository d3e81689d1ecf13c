"""Do the losses have the optimum that their papers derive? Where all responses can be listed, and every pair of them is judged.

Soft labels: each pair comes in both orders, weighted by the probability that a Bradley-Terry judge prefers its first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from dpo_engine import DPOConfig, DPOTrainer, Tree
from dpo_engine.losses import LOSSES, PairStats
from support.enumerable import (
    ALL_PAIRS,
    LETTERS,
    PROMPTS,
    RESPONSES,
    f_optimum,
    ipo_optimum,
    kl_optimum,
    preferences,
    response_logps,
    total_variation,
)
from support.tiny_pairs import tiny_llama

BETA = 1.0
TAU = 0.25
F_BETA = 3.0  # of the other divergences, whose optimum is further from the reference
STEPS = 200
FIRST, SECOND = torch.tensor(ALL_PAIRS).unbind(-1)
Optimum = Callable[[Tensor, Tensor], Tensor]


def _by_f(ratio_at: Callable[[Tensor], Tensor]) -> Optimum:
    return lambda reference_logps, rewards: f_optimum(reference_logps, rewards, F_BETA, ratio_at)


INFINITE = torch.tensor(float("inf"), dtype=torch.float64)
# What each method is told, and where it should end.
CASES: dict[str, tuple[dict[str, Any], Optimum]] = {
    "dpo": ({"method": "dpo", "beta": BETA}, lambda ref, r: kl_optimum(ref, r, BETA)),
    "ipo": ({"method": "ipo", "beta": TAU, "ipo_reduction": "sum"}, lambda ref, r: ipo_optimum(ref, r, TAU)),
    "f_dpo_reverse_kl": (
        {"method": "f_dpo", "beta": BETA, "f_divergence_type": "reverse_kl"},
        lambda ref, r: kl_optimum(ref, r, BETA),
    ),
    # f'(u) = log(2 u / (1 + u))
    "f_dpo_js_divergence": (
        {"method": "f_dpo", "beta": F_BETA, "f_divergence_type": "js_divergence"},
        _by_f(lambda s: torch.where(s < torch.tensor(2.0).log(), s.exp() / (2 - s.exp()), INFINITE)),
    ),
    # f'(u) = -1 / u
    "f_dpo_forward_kl": (
        {"method": "f_dpo", "beta": F_BETA, "f_divergence_type": "forward_kl"},
        _by_f(lambda s: torch.where(s < 0, -1 / s, INFINITE)),
    ),
    # f'(u) = (u**-0.5 - 1) / -0.5
    "f_dpo_alpha_divergence": (
        {"method": "f_dpo", "beta": F_BETA, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        _by_f(lambda s: torch.where(s < 2, (1 - s / 2) ** -2, INFINITE)),
    ),
}
HERE = [name for name, (settings, _) in CASES.items() if settings["method"] in LOSSES]


def rewards() -> Tensor:
    """(P, R) with standard deviation 1."""
    return torch.randn(len(PROMPTS), len(RESPONSES), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def pair_weights(reference_logps: Tensor, method: str) -> Tensor:
    """(P, ALL_PAIRS) `mu(y) mu(y') p(y > y')`, mean 1: mu is the reference for IPO, whose optimum depends on it; else uniform."""
    weights = preferences(rewards())[:, FIRST, SECOND]
    if method == "ipo":
        weights = weights * (reference_logps[:, FIRST] + reference_logps[:, SECOND]).exp()
    return weights / weights.mean()


@pytest.mark.parametrize("name", HERE)
def test_a_free_logit_for_each_response_ends_at_the_closed_form_optimum(name: str) -> None:
    settings, optimum = CASES[name]
    reference = torch.randn(
        len(PROMPTS), len(RESPONSES), generator=torch.Generator().manual_seed(6), dtype=torch.float64
    ).log_softmax(-1)
    weights = pair_weights(reference, settings["method"])
    logits = reference.clone().requires_grad_()
    config = SimpleNamespace(label_smoothing=0.0, **settings)
    lengths = torch.ones(weights.numel())

    def loss() -> Tensor:
        logps = logits.log_softmax(-1)
        stats = PairStats(
            chosen_logps=logps[:, FIRST].flatten(),
            rejected_logps=logps[:, SECOND].flatten(),
            reference_chosen_logps=reference[:, FIRST].flatten(),
            reference_rejected_logps=reference[:, SECOND].flatten(),
            chosen_lengths=lengths,
            rejected_lengths=lengths,
        )
        return (weights.flatten() * LOSSES[settings["method"]](stats, config)).mean()

    _minimise(loss, logits)
    wanted = optimum(reference, rewards())
    assert wanted.sum(-1) == pytest.approx(torch.ones(len(PROMPTS)), abs=1e-12)
    assert total_variation(reference.exp(), wanted) > 0.1
    assert total_variation(logits.detach().softmax(-1), wanted) <= 1e-6


def _minimise(loss: Callable[[], Tensor], logits: Tensor) -> None:
    """L-BFGS to the end of float64."""
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]


# The other divergences take a transformer thousands of steps; the test above has them.
@pytest.mark.parametrize("name", [name for name in HERE if name in ("dpo", "ipo", "f_dpo_js_divergence")])
def test_a_transformer_trained_by_the_trainer_ends_at_the_closed_form_optimum(name: str, tmp_path: Path) -> None:
    settings, optimum = CASES[name]
    model = tiny_llama(
        vocab_size=LETTERS + 1, hidden_size=48, intermediate_size=96, max_position_embeddings=8, initializer_range=0.1
    )
    reference = response_logps(model)
    assert reference.exp().sum(-1) == pytest.approx(torch.ones(len(PROMPTS)), abs=1e-5)
    weights = pair_weights(reference, settings["method"])
    trees = [
        Tree(
            prompt_ids=prompt,
            completions=(RESPONSES[first], RESPONSES[second]),
            completion_weights=(weight, weight),
        )
        for prompt, by_pair in zip(PROMPTS, weights.tolist(), strict=True)
        for (first, second), weight in zip(ALL_PAIRS, by_pair, strict=True)
    ]
    args = DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=len(trees),
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        logging_steps=STEPS,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        precompute_ref_log_probs=True,
        adam_beta2=0.99,
        share_prompt="off",
        **settings,
    )
    DPOTrainer(model=model, args=args, train_dataset=trees).train()
    wanted = optimum(reference, rewards())
    assert total_variation(reference.exp(), wanted) > 0.1
    assert total_variation(response_logps(model).exp(), wanted) <= 1e-2
