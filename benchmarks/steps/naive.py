"""How long does DPO take as its equation reads? One run in a process of its own.

    python -m benchmarks.steps.naive SPEC.json        prints one JSON object; `run.py` writes SPEC.json

A padded rectangle of all chosen and all rejected rows, all logits, `log_softmax` and `gather`; the reference in every step, with
the adapter switched off. Around it is `transformers.Trainer`, as around both other sides; nothing of the engine is used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from benchmarks.steps.watch import StepWatch, peak_cuda_mb

Pair = dict[str, Any]


def collate(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """(2B, S): chosen rows, then rejected ones; `scored` is 1 on completions."""
    rows = [(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids") for pair in pairs]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for row, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        ids[row, :length] = torch.tensor([*prompt, *completion])
        mask[row, :length] = 1
        scored[row, len(prompt) : length] = 1
    return {"input_ids": ids, "attention_mask": mask, "scored": scored}


def completion_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(2B,) sums over completions."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (logps * batch["scored"][:, 1:]).sum(-1)


class NaiveTrainer(Trainer):
    """DPO's loss by its definition."""

    def __init__(self, *args: Any, beta: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta
        self.first: dict[str, float] = {}

    def compute_loss(self, model: PeftModel, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = completion_logps(model, inputs)
        policy = completion_logps(model, inputs)
        chosen, rejected = (policy - reference).chunk(2)
        if not self.first:
            means = [part.mean().item() for part in policy.detach().chunk(2)]
            self.first = dict(zip(("logps/chosen", "logps/rejected"), means, strict=True))
        return -logsigmoid(self.beta * (chosen - rejected)).mean()


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as `spec` says.

    Returns:
        Step times and tokens, and what was logged.
    """
    model = AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=getattr(torch, spec["dtype"]))
    watch = StepWatch(model.get_input_embeddings())
    set_seed(spec["seed"])
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=spec["lora_r"], lora_alpha=spec["lora_alpha"], target_modules="all-linear"
    )
    on_cpu = not torch.cuda.is_available()
    trainer = NaiveTrainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=spec["output_dir"],
            learning_rate=spec["learning_rate"],
            per_device_train_batch_size=spec["batch"],
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            seed=spec["seed"],
            bf16=spec["dtype"] == "bfloat16",
            fp16=spec["dtype"] == "float16",
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            remove_unused_columns=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=spec["pairs"],
        data_collator=collate,
        callbacks=[watch],
        beta=spec["beta"],
    )
    trainer.train()
    watch.close()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    log[0] |= trainer.first
    return {
        "step_seconds": watch.seconds,
        "step_tokens": watch.tokens,
        "pairs_per_s": watch.pairs_per_s(spec["batch"]),
        "reference_s": 0.0,
        "log": log,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_cuda_mb": peak_cuda_mb(),
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    print(json.dumps(run(spec)))


if __name__ == "__main__":
    main()
