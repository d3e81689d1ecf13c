"""DPO as a Lightning module: `linear_logps_head`, and a `training_step` of a few lines.

pip install lightning
python examples/lightning_module.py --model smollm2 --data examples/concise_train.jsonl
"""

import argparse

import lightning
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_engine import dpo_loss, linear_logps_head
from dpo_engine.data import load_pairs
from dpo_engine.model.loading import resolve_model


def collate(trees):
    """Chosen rows, then rejected rows; only completions have labels."""
    rows = [(tree.prompt_ids, tree.completions[side]) for side in (0, 1) for tree in trees]
    ids = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    labels = [torch.tensor([-100] * len(prompt) + [*completion]) for prompt, completion in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


class PreferenceModule(lightning.LightningModule):
    def __init__(self, model, beta=0.1, lr=1e-4):
        super().__init__()
        self.model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        linear_logps_head(self.model)
        self.beta, self.lr, self.losses = beta, lr, []

    def training_step(self, batch, index):
        policy = self.model(**batch).token_logps.sum(-1).chunk(2)
        with torch.no_grad(), self.model.disable_adapter():  # without dropout, as here, train mode changes nothing
            reference = self.model(**batch).token_logps.sum(-1).chunk(2)
        loss = dpo_loss(*policy, *reference, beta=self.beta).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)


def train(model, trees, steps=4, pairs_per_step=4, **settings):
    """One loss a step."""
    module = PreferenceModule(model, **settings)
    trainer = lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, devices=1)
    trainer.fit(module, DataLoader(trees, batch_size=pairs_per_step, collate_fn=collate))
    return module.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="examples/concise_train.jsonl")
    args = parser.parse_args()
    path = resolve_model(args.model)
    pairs = load_pairs(args.data, AutoTokenizer.from_pretrained(path), max_length=512)
    print(train(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), pairs.trees))
