"""DPO in an accelerate loop that trains all weights, with a reference computed once, before the first step.

    accelerate launch examples/accelerate_loop.py --model smollm2 --data examples/concise_train.jsonl

No second model is held: what the reference says of a pair is two numbers, and they travel with the pair.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_engine import dpo_loss, linear_logps_head
from dpo_engine.data import load_pairs
from dpo_engine.model.loading import resolve_model


def collate(examples):
    """Chosen rows, then rejected rows; only completions have labels."""
    rows = [(tree.prompt_ids, tree.completions[side]) for side in (0, 1) for tree, _ in examples]
    ids = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    labels = [torch.tensor([-100] * len(prompt) + [*completion]) for prompt, completion in rows]
    model_inputs = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    return model_inputs, torch.tensor([reference for _, reference in examples])  # (B, 2)


@torch.no_grad()
def with_reference(model, trees, pairs_at_once=8):
    """Each tree with the log-probs of its two completions under the model as it is now."""
    examples = []
    for start in range(0, len(trees), pairs_at_once):
        chunk = trees[start : start + pairs_at_once]
        inputs, _ = collate([(tree, (0.0, 0.0)) for tree in chunk])
        out = model.eval()(**{name: value.to(model.device) for name, value in inputs.items()})
        examples += zip(chunk, zip(*out.token_logps.sum(-1).view(2, -1).tolist(), strict=True), strict=True)
    return examples


def train(model, trees, accelerator, steps=4, pairs_per_step=4, lr=1e-5, beta=0.1):
    """`pairs_per_step` on each process; one loss a step, of this process's pairs."""
    linear_logps_head(model)  # before accelerator.prepare
    needed = trees[: steps * pairs_per_step * accelerator.num_processes]
    examples = with_reference(model.to(accelerator.device), needed)
    loader = DataLoader(examples, batch_size=pairs_per_step, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    losses = []
    for inputs, reference in loader:
        chosen, rejected = model(**inputs).token_logps.sum(-1).chunk(2)
        loss = dpo_loss(chosen, rejected, *reference.unbind(-1), beta=beta).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="examples/concise_train.jsonl")
    args = parser.parse_args()
    accelerator = Accelerator()
    with accelerator.main_process_first():
        path = resolve_model(args.model)
    pairs = load_pairs(args.data, AutoTokenizer.from_pretrained(path), max_length=512)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    accelerator.print(train(model, pairs.trees, accelerator))
