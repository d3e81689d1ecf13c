"""DPO in `transformers.Trainer`: `linear_logps_head`, and a `compute_loss` of ten lines.

    python examples/transformers_trainer.py --model smollm2 --data examples/concise_train.jsonl

All of the Trainer's own works on: checkpoints, schedules, logging, `torchrun`. The reference is the model without its adapter.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

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


class PreferenceTrainer(Trainer):
    def __init__(self, model, *args, beta=0.1, **kwargs):
        linear_logps_head(model)  # before the Trainer wraps it
        super().__init__(model, *args, data_collator=collate, **kwargs)
        self.beta = beta
        # The loss is a mean over pairs: the Trainer is to divide it by gradient_accumulation_steps itself.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        policy = out.token_logps.sum(-1).chunk(2)
        # Without dropout, as here, the reference may be computed in train mode.
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            reference = model(**inputs).token_logps.sum(-1).chunk(2)
        loss = dpo_loss(*policy, *reference, beta=self.beta).mean()
        return (loss, out) if return_outputs else loss


def train(model, trees, output_dir, beta=0.1, **settings):
    """One loss a step."""
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-4, **settings}
    args = TrainingArguments(
        output_dir, remove_unused_columns=False, logging_steps=1, save_strategy="no", report_to="none", **settings
    )
    trainer = PreferenceTrainer(adapted, args, train_dataset=trees, beta=beta)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="examples/concise_train.jsonl")
    parser.add_argument("--output", default="runs/transformers-trainer")
    args = parser.parse_args()
    path = resolve_model(args.model)
    pairs = load_pairs(args.data, AutoTokenizer.from_pretrained(path), max_length=512)
    print(train(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), pairs.trees, args.output))
