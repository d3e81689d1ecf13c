"""DPO in plain PyTorch: no trainer, no logits, no padding, every prompt computed once.

python examples/plain_loop.py --model smollm2 --data examples/concise_train.jsonl
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_engine import build_forest, dpo_loss, forest_token_logps, prepare_model
from dpo_engine.data import load_pairs
from dpo_engine.model.loading import resolve_model


def sums(model, forest):
    """One number a completion: its summed log-prob."""
    return torch.stack([part.sum() for part in forest_token_logps(model, forest).split(forest.lengths)])


def train(model, trees, steps=4, pairs_per_step=4, lr=1e-5, beta=0.1):
    layout = prepare_model(model).name  # whether prompts can be shared is asked of the model
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        forest = build_forest(trees[step * pairs_per_step :][:pairs_per_step], layout).to(model.device)
        with torch.no_grad():
            before = sums(reference, forest)
        policy = sums(model, forest)  # chosen, rejected, chosen, rejected, ...
        loss = dpo_loss(policy[0::2], policy[1::2], before[0::2], before[1::2], beta=beta).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2", type=resolve_model)
    parser.add_argument("--data", default="examples/concise_train.jsonl")
    args = parser.parse_args()
    pairs = load_pairs(args.data, AutoTokenizer.from_pretrained(args.model), max_length=512)
    print(list(train(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), pairs.trees)))
