"""Which settings does a trainer have? One flat, typed, checked dataclass; YAML keys and flags are its fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from dpo_engine.data.templates import CHAT_TEMPLATE_CHOICES
from dpo_engine.data.truncation import TRUNCATIONS
from dpo_engine.errors import ConfigError
from dpo_engine.model.layout import SHARE_PROMPT
from dpo_engine.model.liger import LIGER, LOSSES
from dpo_engine.ops import BACKENDS
from dpo_engine.train.method_arguments import MethodArguments
from dpo_engine.train.trl_names import TrlArguments
from dpo_engine.train.trl_settle import settle_names

DTYPES = ("auto", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16")


class LigerChoice(str):
    """auto, on or off. Never true: transformers asks whether to put Liger's kernels, losses included, in place itself."""

    def __bool__(self) -> bool:
        return False


@dataclass
class DPOConfig(MethodArguments, TrlArguments, TrainingArguments):
    """What `DPOTrainer` is told: `transformers.TrainingArguments`, the method's (`MethodArguments`) and the fields below.

    TRL's names are taken too (`dpo_engine/train/trl_names.py`); docs/trl-differences.md says what each is here.

    `per_device_train_batch_size` counts trees: pairs, ranked lists, or prompts with labelled completions. A step's gradient is
    the mean over the step's trees, whatever the packing.
    """

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Most tokens in a prompt and its longest completion; `truncation` says what is done."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a prompt, which loses its beginning; before max_length."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a completion, which loses its end; before max_length."}
    )
    truncation: str = field(
        default="keep_start", metadata={"help": "What is done to longer rows: keep_start, keep_end, drop or error."}
    )
    chat_template: str = field(
        default="auto",
        metadata={"help": "Whether prompts given as text are put in the chat template: auto, on or off."},
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out (and count) rows that cannot be parsed, instead of stopping."}
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Ask the reference once before training and keep its log-probs in memory, also without a reference_cache."
        },
    )
    reference_cache: str = field(
        default="auto",
        metadata={
            "help": "Where reference log-probs are kept on disk and found again by every run that would compute the same: a "
            "folder, on (~/.cache/dpo-engine/reference), off, or auto: on for LoRA."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch off every nn.Dropout of the models, that of LoRA too."},
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Padding token that the tokenizer is given, and is saved with."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What from_pretrained is told where DPOTrainer is given a model by its name: dtype, ..."},
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The same, for a ref_model that is given by its name."}
    )
    max_tokens_per_forest: int | None = field(
        default=None,
        metadata={
            "help": "Tokens computed at once: memory and speed only, never the result. By free memory if not given."
        },
    )
    share_prompt: str = field(
        default="auto",
        metadata={
            "help": "Compute each prompt once for all its completions: auto (where the model, probed, agrees), on or off."
        },
    )
    backend: str = field(
        default="auto",
        metadata={"help": "How log-probs are computed: auto (what `dpo-engine doctor` measured), tiled, triton, ..."},
    )
    activation_offload: bool = field(
        default=False,
        metadata={
            "help": "With gradient_checkpointing, on a GPU: what goes into each layer waits for the backward pass in pinned host "
            "memory."
        },
    )
    use_liger_kernel: str = field(  # type: ignore[assignment]  # a bool in transformers
        default="auto",
        metadata={
            "help": "Liger's norms, rope and gated activations, never its losses: auto (where liger-kernel is installed, on a "
            "CUDA device, for models that it supports), on or off."
        },
    )

    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate (about 5e-6 suits LoRA)."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (or share of steps, if < 1)."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave off: it reads the loss from the device at every micro-batch."}
    )
    # Written in this order because transformers' parser takes the second of the three for the flag's type.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Where to log: none, tensorboard, wandb, mlflow, ... (transformers' names)."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: batches are forests."})

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as in the base class
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "ref_model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        self.settle()
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            # The re-entrant kind needs inputs with gradients; under LoRA there are none and nothing would train.
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        super().__post_init__()
        parts = self.liger_kernel_config  # transformers reads it from JSON
        require(
            not any((parts or {}).get(name) for name in LOSSES),
            "liger_kernel_config",
            parts,
            f"no {' or '.join(LOSSES)}: log-probs are computed by the engine",
        )
        require(
            not self.activation_offload or bool(self.gradient_checkpointing),
            "activation_offload",
            self.activation_offload,
            "false, or gradient_checkpointing: true: it is the inputs of checkpointed layers that are moved",
        )

    def settle(self) -> None:
        """Take TRL's names for ours, fill in what follows from the method, and check all of it; again after a change.

        Raises:
            ConfigError: the first value that is out of range, or that TRL takes and the engine cannot do.
        """
        settle_names(self)
        self.settle_method()
        self._check()

    def _check(self) -> None:
        """Raise a `ConfigError` for the first value out of range."""
        require(
            self.max_length is None or self.max_length >= 2, "max_length", self.max_length, "at least 2 tokens, or none"
        )
        for name in ("max_prompt_length", "max_completion_length"):
            if getattr(self, name) == -1:  # how TRL 0.25 to 0.28 write that it is not given
                setattr(self, name, None)
            bound = getattr(self, name)
            require(bound is None or bound >= 1, name, bound, "at least 1 token, or none")
        require(self.truncation in TRUNCATIONS, "truncation", self.truncation, f"one of {', '.join(TRUNCATIONS)}")
        for name in ("chat_template", "share_prompt"):  # YAML reads on and off as booleans
            value = getattr(self, name)
            setattr(self, name, {"true": "on", "false": "off"}.get(str(value).lower(), value))
        liger = str(self.use_liger_kernel).lower()
        self.use_liger_kernel = LigerChoice({"true": "on", "false": "off"}.get(liger, liger))
        require(str(self.use_liger_kernel) in LIGER, "use_liger_kernel", liger, f"one of {', '.join(LIGER)}")
        require(
            self.share_prompt in SHARE_PROMPT, "share_prompt", self.share_prompt, f"one of {', '.join(SHARE_PROMPT)}"
        )
        words = {"none": "off", "false": "off", "true": "on", "": "off"}  # YAML reads off as false
        self.reference_cache = words.get(str(self.reference_cache).lower(), str(self.reference_cache))
        choices = CHAT_TEMPLATE_CHOICES
        require(self.chat_template in choices, "chat_template", self.chat_template, f"one of {', '.join(choices)}")
        require(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")
        budget = self.max_tokens_per_forest
        require(budget is None or budget > 0, "max_tokens_per_forest", budget, "a number above 0, or none")
        rate = self.learning_rate
        require(0 <= rate < math.inf, "learning_rate", rate, "a finite number of at least 0")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "a number above 0")
        require(
            self.max_steps == -1 or self.max_steps > 0,
            "max_steps",
            self.max_steps,
            "a number above 0, or -1 for all epochs",
        )
        keeps_more = self.entry.moving_reference or self.entry.baseline is not None
        require(
            not (self.load_best_model_at_end and keeps_more),
            "load_best_model_at_end",
            self.load_best_model_at_end,
            f"false: the method {self.method} is more than its weights (a reference that moves, or a running mean)",
        )
        require(
            self.neftune_noise_alpha is None,
            "neftune_noise_alpha",
            self.neftune_noise_alpha,
            "none: its noise depends on the length of a row, and a forest is one row",
        )
        seen = self.include_num_input_tokens_seen
        require(seen in (False, "no"), "include_num_input_tokens_seen", seen, "no: batches are forests")
        order = getattr(self, "train_sampling_strategy", "random")
        require(order in ("random", "sequential"), "train_sampling_strategy", order, "random or sequential")
        smoothing = self.label_smoothing_factor
        require(smoothing == 0, "label_smoothing_factor", smoothing, "0; the loss's own parameter is label_smoothing")

    def pair_options(self) -> dict[str, Any]:
        """What `load_pairs` and `tokenize_pairs` are told about reading data."""
        return {
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "max_completion_length": self.max_completion_length,
            "truncation": self.truncation,
            "chat_template": self.chat_template,
            "skip_bad_rows": self.skip_bad_rows,
            "method": self.method,
            "kind": self.entry.kind,
        }


def require(holds: bool, name: str, given: Any, expected: str) -> None:
    """Raise a `ConfigError` that says what was given and what was expected, unless `holds`."""
    if not holds:
        raise ConfigError(f"{name}={given!r} is out of range; expected {expected}")
