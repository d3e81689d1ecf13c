"""What does a plan look like as a file that `dpo-engine train` takes? YAML, with the reason beside each setting."""

from __future__ import annotations

import yaml

from dpo_engine.memory.plan import Plan, most_tokens
from dpo_engine.memory.step import MIB, step_parts

PAIRS_A_STEP = 16
LENGTHS = (8192, 4096, 2048, 1024, 512)  # few preference data have longer rows
USUAL_FOREST = 8192  # larger ones are not faster
FILLED = 0.9  # of a card: a screen and a plan's error must find room in the rest


def recipe(
    plan: Plan, *, model: str, method: str = "dpo", data: str = "pairs.jsonl", output_dir: str | None = None
) -> str:
    """The lines of a YAML file: the largest of `LENGTHS` that fills no more than `FILLED` of the card, unless one was asked for.

    Args:
        plan: one that fits.
        model: what `dpo-engine train` is to load.
        method: of the loss, with its own beta.
        data: preference pairs.
        output_dir: where the adapters go.
    """
    settings = plan.settings
    easily = most_tokens(plan.shape, settings, int(FILLED * plan.card.memory))
    fitting = (length for length in LENGTHS if 2 * length <= easily and length <= plan.max_length)
    length = plan.max_length if plan.is_asked or plan.largest_pair else next(fitting, plan.max_length)
    needed = plan.largest_pair or 2 * length
    tokens = min(plan.tokens, max(needed, min(easily, USUAL_FOREST)))
    parts = step_parts(plan.shape, settings, tokens)
    in_4bit = settings.lora_r > 0 and settings.weights == "nf4"
    name = f"{plan.shape.name}-{plan.card.name}".lower()
    kind = "QLoRA" if in_4bit else "LoRA" if settings.lora_r else "Full fine-tuning"
    total, has = parts.total / MIB, plan.card.memory / MIB
    lines = [
        f"# {kind} of {plan.shape.name} on a card of {plan.card.name}, as `dpo-engine plan` wrote it:",
        f"# {total:,.0f} MiB of {has:,.0f} at the fullest moment, predicted.",
        _line("model", model),
        _line("data", data),
        _line("output_dir", output_dir or f"runs/{name}"),
        "",
        f"method: {method}",
    ]
    if in_4bit:
        lines.append("load_in_4bit: true                # frozen weights in NF4, double quantisation")
    lines.append(f"dtype: {settings.compute}")
    lines.append(f"lora_r: {settings.lora_r}")
    if settings.lora_targets is not None:
        lines.append(f"lora_target_modules: [{', '.join(settings.lora_targets)}]")
    if settings.lora_head:
        lines.append("lora_head: true")
    lines += [
        f"optim: {settings.optimiser}",
        f"gradient_checkpointing: {str(settings.checkpointing).lower()}",
    ]
    if settings.offload:
        lines.append("activation_offload: true          # checkpoints wait in host memory")
    lines += [
        "",
        f"{f'max_length: {length}':34s}# up to {plan.safe_length} would fit",
        f"{f'max_tokens_per_forest: {tokens}':34s}# computed at once: memory and speed only, never the result",
        f"{f'per_device_train_batch_size: {PAIRS_A_STEP}':34s}# pairs in a step, whatever fits at once",
        "learning_rate: 5.0e-6",
        "lr_scheduler_type: cosine",
        "warmup_steps: 10",
        "num_train_epochs: 1",
        "logging_steps: 1",
        "save_steps: 200",
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: str) -> str:
    """`key: value`, quoted where YAML would read it as something else."""
    return yaml.safe_dump({key: value}, allow_unicode=True, width=10**6).strip()
