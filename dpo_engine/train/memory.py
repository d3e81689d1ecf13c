"""Will this run fit, and what is said when memory runs out all the same? The planner's numbers, for a configuration.

The check comes before any weight is read. It refuses what cannot fit, with the cheapest change; what the planner does not
know (another kind of model) goes on without it, which is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dpo_engine.batch import TokenTree, packed_cost
from dpo_engine.errors import ConfigError, ModelError, TrainingError
from dpo_engine.memory.cards import Card
from dpo_engine.memory.plan import MULTIPLE, cheapest_change, most_tokens
from dpo_engine.memory.shapes import ModelShape, read_shape
from dpo_engine.memory.step import MIB, STATE_BYTES, StepSettings, step_parts
from dpo_engine.model.loading import resolve_dtype
from dpo_engine.train.budget import MOST, host_bytes

# How allocators, libraries and operating systems say it, where torch has no type for it.
_WORDS = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """What a run was planned at."""

    shape: ModelShape
    settings: StepSettings
    card: Card
    """Its memory is what is free for this run."""
    tokens: int
    """Of the largest forest: as asked for, or as large as is of use and fits; no larger than a step."""
    largest_pair: int

    @property
    def planned(self) -> int:
        """Bytes at the fullest moment of a step."""
        return step_parts(self.shape, self.settings, self.tokens).total

    def line(self) -> str:
        """What is said at the start."""
        return (
            f"memory: planned at {self.planned / MIB:,.0f} MiB of {self.card.memory / MIB:,.0f} ({self.card.name}), with "
            f"forests of {self.tokens} tokens"
        )

    def change(self) -> str:
        """The cheapest change that makes it fit; a smaller forest costs nothing."""
        most = most_tokens(self.shape, self.settings, self.card.memory)
        if self.largest_pair <= most < self.tokens:
            return f"max_tokens_per_forest: {most}"
        return cheapest_change(self.shape, self.settings, self.card, self.largest_pair)

    def check(self) -> None:
        """Raise a `ConfigError` where the plan exceeds what is free."""
        if self.planned > self.card.memory:
            raise ConfigError(
                f"this run does not fit: forests of {self.tokens} tokens (the largest pair has {self.largest_pair}) are "
                f"planned at {self.planned / MIB:,.0f} MiB, and {self.card.memory / MIB:,.0f} are free ({self.card.name}); the "
                f"cheapest change: {self.change()}; check_memory: false tries all the same"
            )

    def answer(self, tokens: int) -> str:
        """What to do about memory that ran out with forests of `tokens` tokens."""
        parts = step_parts(self.shape, self.settings, tokens)
        named = sorted(parts.in_mb().items(), key=lambda part: -part[1])[:4]
        shown = ", ".join(f"{name} {value:,.0f}" for name, value in named)
        smaller = max(self.largest_pair, tokens * 3 // 4 // MULTIPLE * MULTIPLE)
        if smaller < tokens:
            change = f"max_tokens_per_forest: {smaller}"
        else:  # it is the largest pair that does not fit: plan as if there were less memory
            less = Card(name=self.card.name, memory=min(self.card.memory, parts.total * 9 // 10), tflops=None)
            change = cheapest_change(self.shape, self.settings, less, self.largest_pair)
            if "a card of" in change or "smaller model" in change:
                change = "max_length lower, or see what else uses the memory: no setting that the plan knows takes less"
        return (
            f"forests of {tokens} tokens are planned at {parts.total / MIB:,.0f} MiB of {self.card.memory / MIB:,.0f} (in MiB: "
            f"{shown}); something else may hold memory too. Set {change}"
        )


def plan_run(config: Any, model_config: Any, trees: Sequence[TokenTree]) -> RunMemory | str:
    """The plan of a run, or why there is none.

    Args:
        config: a `TrainConfig`.
        model_config: of the model, as transformers read it.
        trees: all pairs of the run.
    """
    if config.use_dora:
        return "DoRA, whose adapters open each weight, is not planned for"
    if config.fsdp or config.deepspeed:
        return "weights that are sharded over cards are not planned for"
    try:
        shape = read_shape(model_config.to_dict(), str(config.model))
    except ModelError as error:
        return str(error)
    layout = "packed" if config.share_prompt == "off" else "shared"
    costs = sorted((packed_cost(tree, layout, None) for tree in trees), reverse=True)
    largest = costs[0] if costs else 0
    together = sum(
        costs[: config.train_batch_size * config.gradient_accumulation_steps]
    )  # no forest is larger than a step
    settings = _settings(config, shape)
    if isinstance(settings, str):
        return settings
    card = _card_here(config.device)
    wanted = config.max_tokens_per_forest
    if wanted is None:  # as large as is of use, or as memory allows
        wanted = min(MOST.get(config.device.type, MOST["cuda"]), most_tokens(shape, settings, card.memory))
    return RunMemory(
        shape=shape,
        settings=settings,
        card=card,
        tokens=max(min(wanted, together), largest),
        largest_pair=largest,
    )


@contextmanager
def answered(plan: RunMemory | str, tokens: int | None = None) -> Iterator[None]:
    """Memory that runs out within it is answered with the plan's numbers and the setting to change.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(plan, str):
            advice = f"there is no plan ({plan}). Set a smaller max_tokens_per_forest or max_length"
        else:
            advice = plan.answer(max(tokens or plan.tokens, plan.tokens))
        raise TrainingError(f"out of memory ({said}): {advice}; docs/memory.md has more") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised it, on a card or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in _WORDS)


def _settings(config: Any, shape: ModelShape) -> StepSettings | str:
    """The configuration as the planner has it, or what of it the planner does not know."""
    dtype = str(resolve_dtype(config.dtype)).removeprefix("torch.")
    if config.entry.token_kl:
        return f"the method {config.method} meets two models' heads in a step, which is not planned for"
    optimiser = str(getattr(config.optim, "value", config.optim))
    if optimiser not in STATE_BYTES:
        return f"the optimiser {optimiser} is not planned for"
    names = {linear.name for linear in shape.linears}
    given = [str(name).rsplit(".", 1)[-1] for name in config.lora_target_modules or ()]
    on_head = [name for name in given if name in ("lm_head", "embed_out")]
    if any(name not in names and name not in on_head for name in given):
        return f"adapters on {', '.join(given)} are not planned for"
    targets = tuple(dict.fromkeys(name for name in given if name in names)) if given else None
    reference = "adapters_off"
    if not config.lora_r:
        reference = "model_copy" if config.entry.needs_reference else "adapters_off"
    elif config.entry.moving_reference or (config.adapter is not None and config.adapter_mode == "continue"):
        reference = "adapter_copy"
    return StepSettings(
        weights="nf4" if config.load_in_4bit else dtype,
        compute=dtype,
        lora_r=config.lora_r,
        lora_targets=targets,
        lora_head=bool(config.lora_head or on_head),
        lora_dropout=float(config.lora_dropout),
        optimiser=optimiser,
        checkpointing=bool(config.gradient_checkpointing),
        offload=bool(config.activation_offload),
        reference=reference,
        device=config.device.type,
    )


def _card_here(device: torch.device) -> Card:
    """What is free where the run computes."""
    if device.type != "cuda":
        return Card(name=f"{device.type}, what is free of it", memory=host_bytes(), tflops=None)
    free, total = torch.cuda.mem_get_info(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)  # newer than torch 2.9
    allowed = int(fraction * total)
    # The plan counts the context, which stands already where memory can be asked for.
    return Card(name=torch.cuda.get_device_name(device), memory=min(free + 600 * MIB, allowed), tflops=None)
