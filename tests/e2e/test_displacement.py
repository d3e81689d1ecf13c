"""Does DPO make the chosen completions of near-identical pairs unlikely, and do DPOP and DPO+NLL keep it from that?

Likelihood displacement (Pal et al. 2024, arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847): only the difference of a pair
enters DPO's loss, and where two completions are alike up to their last token, both may fall.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from dpo_engine import DPOConfig, DPOTrainer, Tree
from dpo_engine.losses import LOSSES
from support.naive_dpo import completion_logps
from support.tiny_pairs import tiny_llama

WORDS, PAIRS, STEM, STEPS = 24, 32, 8, 30
SETTINGS = {
    "dpo": {"beta": 0.1},
    "dpop": {"beta": 0.1, "dpop_lambda": 50.0},
    "dpo_nll": {"beta": 0.1, "rpo_alpha": 1.0},
}


def pairs() -> list[Tree]:
    """Completions of `STEM` tokens and one more, by which alone they differ."""
    draw = random.Random(0)
    trees = []
    for _ in range(PAIRS):
        prompt, stem = [draw.randrange(WORDS) for _ in range(3)], [draw.randrange(WORDS) for _ in range(STEM)]
        better, worse = draw.sample(range(WORDS), 2)
        trees.append(Tree(prompt_ids=prompt, completions=([*stem, better], [*stem, worse])))
    return trees


def change_of_the_chosen(method: str, folder: Path) -> tuple[Tensor, float]:
    """(PAIRS,) nats that the chosen log-probs gained, by the model's own logits; and the share of pairs told apart."""
    model, trees = tiny_llama(vocab_size=WORDS), pairs()
    with torch.no_grad():
        before = completion_logps(model, trees)
    args = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        method=method,
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=STEPS,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        precompute_ref_log_probs=True,
        **SETTINGS[method],
    )
    DPOTrainer(model=model, args=args, train_dataset=trees).train()
    model.eval()
    with torch.no_grad():
        gained = completion_logps(model, trees) - before
    return gained[0::2], float((gained[0::2] > gained[1::2]).float().mean())


def test_dpo_drives_down_the_chosen_completions_that_it_prefers(tmp_path: Path) -> None:
    change, accuracy = change_of_the_chosen("dpo", tmp_path)
    assert accuracy == 1.0
    assert change.mean() < -15
    assert (change < 0).float().mean() > 0.9


@pytest.mark.parametrize("method", [name for name in ("dpop", "dpo_nll") if name in LOSSES])
def test_dpop_and_dpo_with_nll_do_not(method: str, tmp_path: Path) -> None:
    change, accuracy = change_of_the_chosen(method, tmp_path)
    assert accuracy > 0.75
    assert change.mean() > 0
    assert (change < 0).float().mean() < 0.2
