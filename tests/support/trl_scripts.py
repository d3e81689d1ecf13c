"""The same small script for TRL's trainer and for the engine's: what does each log, and what is it given to train on?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_pairs import tiny_llama

ENDS_WITH_TURN = CHATML.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}")
"""ChatML with nothing behind a turn's end token, so that TRL and the engine score the same tokens."""

STANDARD = [
    {"prompt": "where is the cat?", "chosen": " the cat is on the mat.", "rejected": " the dog ran."},
    {"prompt": "Question: where is the dog? Answer:", "chosen": " the dog ran away.", "rejected": " hello there"},
    {
        "prompt": "what is the cat called?",
        "chosen": " the cat has no name.",
        "rejected": " the mat is a cat, I can help.",
    },
    {"prompt": "hello", "chosen": " hello, how can I help you today?", "rejected": " the cat sat."},
] * 2
"""No tokenizer merges across the end of these prompts."""

CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
        "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
    }
    for row in STANDARD
]

IMPLICIT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CONVERSATIONS]


def saved_model(folder: Path, *, chat_template: str | None = None, adds_bos: bool = False) -> str:
    """A folder with a tiny random model and its tokenizer, as a script names one."""
    tokenizer = small_tokenizer(chat_template=chat_template, adds_bos=adds_bos)
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    return str(folder)


def script_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """What both configurations are told: float32, one batch order, five steps, each logged."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 5,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_checkpointing": False,
        "max_length": 64,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 3,
        **changes,
    }


def script_log(
    trl: Any, folder: Path, model: str, rows: list[dict[str, Any]], **changes: Any
) -> list[dict[str, float]]:
    """What the trainer of `trl` (the package, or `dpo_engine`) logs of a run of the script, evaluation included."""
    from datasets import Dataset

    trainer_options = {name: changes.pop(name) for name in ("peft_config", "quantization_config") if name in changes}
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**script_settings(folder, **changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]),
        **trainer_options,
    )
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history
