"""Which names do TRL's DPO scripts use, and what is each here? One table; flags, YAML keys, checks and a page follow from it.

`TRL_NAMES` has every field of TRL's `DPOConfig`, `ModelConfig` and `ScriptArguments` from 0.24 to 1.16 beyond
`transformers.TrainingArguments`, and those of `TrainingArguments` whose default TRL changes. `LOSS_TYPES` has the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

SAME = "same"
"""The same name is a key of ours; `note` says where its meaning differs."""
ALIAS = "alias"
"""Another name for the key `to`; reads None once the configuration is made."""
NO_EFFECT = "no effect"
"""Any value is taken and none changes a result; a value that is not the default is said to have no effect, once."""
ONLY = "only"
"""Taken at the values `only`, and refused at any other."""

DPO_CONFIG, MODEL_CONFIG, SCRIPT = "DPOConfig", "ModelConfig", "ScriptArguments"


@dataclass(frozen=True, kw_only=True)
class TrlName:
    """One name of TRL's."""

    name: str
    kind: str
    versions: str
    """TRL's releases that have it, of those from 0.24 to 1.16."""
    default: Any
    """TRL's, in the last release that has it."""
    note: str = ""
    """What differs, why it has no effect, or what to do instead."""
    to: str = ""
    """Our key, of an alias."""
    values: Mapping[Any, Any] | None = None
    """Of an alias: TRL's value -> ours; None: they are the same."""
    only: tuple[Any, ...] = ()
    type: Any = str | None
    """How a flag of this name is parsed."""
    unset: Any = ...
    """What the field holds when it is not given: None for an alias, else TRL's default, unless this says otherwise."""
    owner: str = DPO_CONFIG

    @property
    def not_given(self) -> Any:
        if self.unset is not ...:
            return self.unset
        return None if self.kind == ALIAS else self.default


@dataclass(frozen=True, kw_only=True)
class LossType:
    """One of TRL's losses."""

    method: str
    """Ours of that formula; empty: there is none."""
    nearest: str
    """The nearest method that there is, where none has the same formula."""
    note: str = ""


ALL, OLD, NEW = "0.24-1.16", "0.24-0.28", "0.29-1.16"

LOSS_TYPES: dict[str, LossType] = {
    "sigmoid": LossType(
        method="dpo",
        nearest="dpo",
        note=(
            "With label_smoothing it is cDPO, as in TRL 0.24 to 0.28; TRL from 0.29 on ignores label_smoothing "
            "here, in silence."
        ),
    ),
    "ipo": LossType(method="ipo", nearest="ipo", note="Means over tokens (ipo_reduction: mean), as in TRL."),
    "hinge": LossType(method="hinge", nearest="dpo"),
    "robust": LossType(method="rdpo", nearest="dpo", note="dpo with label_smoothing (cDPO) is the biased kin of it."),
    "exo_pair": LossType(method="exo", nearest="dpo"),
    "nca_pair": LossType(method="nca", nearest="dpo"),
    "bco_pair": LossType(
        method="",
        nearest="bco",
        note="TRL from 0.29 on has no running mean in it, and TRL 0.24 to 0.28 one that is not the paper's (a mean of the means of "
        "micro-batches); method bco has the paper's, over all pairs since the run began: say method: bco if that is wanted.",
    ),
    "sppo_hard": LossType(method="sppo", nearest="dpo"),
    "aot": LossType(
        method="aot", nearest="dpo", note="TRL sorts within a micro-batch; a method here sees a whole step."
    ),
    "aot_pair": LossType(method="", nearest="dpo", note="TRL 0.24's name for what is aot_unpaired since."),
    "aot_unpaired": LossType(
        method="",
        nearest="dpo",
        note="Chosen and rejected sorted apart: AOT for data without pairs; kto takes labels.",
    ),
    "apo_zero": LossType(method="apo_zero", nearest="dpo"),
    "apo_down": LossType(method="apo_down", nearest="dpo"),
    "discopop": LossType(method="discopop", nearest="dpo"),
    "sft": LossType(method="sft", nearest="dpo", note="TRL's is a mean over the tokens of a micro-batch."),
    "sigmoid_norm": LossType(method="dpo_norm", nearest="ipo"),
    "kto_pair": LossType(
        method="", nearest="kto", note="TRL took it out of its DPOTrainer too; kto takes pairs as two labels each."
    ),
}

TRL_NAMES: tuple[TrlName, ...] = (
    # ---- TrainingArguments whose default TRL changes ----
    TrlName(
        name="learning_rate",
        kind=SAME,
        versions=ALL,
        default=1e-6,
        note="Say it: 5e-6 suits LoRA, 1e-6 suits full fine-tuning.",
    ),
    TrlName(name="logging_steps", kind=SAME, versions=ALL, default=10),
    TrlName(name="gradient_checkpointing", kind=SAME, versions=ALL, default=True, note="Memory and speed only."),
    TrlName(
        name="bf16",
        kind=SAME,
        versions=ALL,
        default=None,
        note="TRL: on unless fp16 is; here off unless it is said. `dpo-engine train` has dtype instead.",
    ),
    TrlName(
        name="use_liger_kernel",
        kind=SAME,
        versions="1.0-1.16",
        default=False,
        note="Norms, rope and gates; here auto, and never its losses.",
    ),
    TrlName(name="lr_scheduler_kwargs", kind=SAME, versions="0.28-1.16", default=None),
    TrlName(name="torch_empty_cache_steps", kind=SAME, versions="1.0-1.16", default=None),
    TrlName(
        name="no_gradient_checkpointing",
        kind=ALIAS,
        versions=ALL,
        default=None,
        to="gradient_checkpointing",
        values={True: False},
        type=bool | None,
        note="A flag that TRL's parser makes of a default that is true.",
    ),
    TrlName(
        name="no_remove_unused_columns",
        kind=NO_EFFECT,
        versions=ALL,
        default=False,
        type=bool,
        note="columns that are not read are left alone, and named",
    ),
    # ---- the loss ----
    TrlName(
        name="loss_type",
        kind=ALIAS,
        versions=ALL,
        default=["sigmoid"],
        to="method",
        type=list[str] | None,
        note="The table of losses says which; several are a mixture, whose weights are loss_weights.",
    ),
    TrlName(
        name="beta",
        kind=SAME,
        versions=ALL,
        default=0.1,
        note="None is the method's own: 0.1 for most (docs/methods.md).",
    ),
    TrlName(
        name="label_smoothing",
        kind=SAME,
        versions=ALL,
        default=0.0,
        note="Refused by a method that does not use it; TRL warns or is silent.",
    ),
    TrlName(
        name="ld_alpha",
        kind=SAME,
        versions=ALL,
        default=None,
        note="TRL: in any loss; here with dpo (which becomes ld_dpo), refused with others.",
    ),
    TrlName(
        name="loss_weights",
        kind=SAME,
        versions=ALL,
        default=None,
        note="Of a mixture, method: dpo+sft (or loss_type with several names).",
    ),
    TrlName(
        name="rpo_alpha",
        kind=SAME,
        versions=OLD,
        default=None,
        note="TRL: added to any loss, a mean over a micro-batch's tokens; here with dpo (which becomes dpo_nll), a mean over each "
        "sequence's tokens. With others: a mixture with sft.",
    ),
    TrlName(
        name="f_divergence_type",
        kind=SAME,
        versions=ALL,
        default="reverse_kl",
        note="TRL: in any loss of a difference; here with dpo (which becomes f_dpo).",
    ),
    TrlName(name="f_alpha_divergence_coef", kind=SAME, versions=ALL, default=0.5, note="Not 1, which is reverse_kl."),
    TrlName(name="discopop_tau", kind=SAME, versions=ALL, default=0.05),
    TrlName(
        name="use_weighting",
        kind=SAME,
        versions=ALL,
        default=False,
        note="TRL: in any loss, the weight unbounded; here with dpo (which becomes wpo), the weight at most 1.",
    ),
    TrlName(
        name="reference_free",
        kind=ONLY,
        versions=OLD,
        default=False,
        only=(False, None),
        type=bool,
        note="methods simpo, cpo and orpo have no reference",
    ),
    TrlName(
        name="router_aux_loss_coef",
        kind=ONLY,
        versions="1.8-1.16",
        default=None,
        only=(None, 0.0, 0.001),
        type=float | None,
        note=(
            "a mixture's balancing loss is not added here (TRL from 1.14 on adds it with the model's own coefficient "
            "unless told 0): say 0.0"
        ),
    ),
    # ---- the reference ----
    TrlName(
        name="precompute_ref_log_probs",
        kind=SAME,
        versions=ALL,
        default=False,
        note="Beside it, reference_cache keeps them on disk.",
    ),
    TrlName(
        name="precompute_ref_batch_size",
        kind=NO_EFFECT,
        versions=ALL,
        default=None,
        type=int | None,
        note="the reference is asked in forests of up to max_tokens_per_forest tokens",
    ),
    TrlName(
        name="sync_ref_model",
        kind=SAME,
        versions=ALL,
        default=False,
        note="With dpo, which becomes tr_dpo.",
    ),
    TrlName(
        name="ref_model_mixup_alpha",
        kind=SAME,
        versions=ALL,
        default=0.6,
        note="Under LoRA the adapters are mixed, factor by factor.",
    ),
    TrlName(name="ref_model_sync_steps", kind=SAME, versions=ALL, default=512),
    TrlName(
        name="force_use_ref_model",
        kind=NO_EFFECT,
        versions=OLD,
        default=False,
        type=bool,
        note="a ref_model that is given is always the reference, of a PeftModel too",
    ),
    TrlName(
        name="model_adapter_name",
        kind=ONLY,
        versions=OLD,
        default=None,
        only=(None,),
        note="call model.set_adapter(name) before the trainer is made",
    ),
    TrlName(
        name="ref_adapter_name",
        kind=ONLY,
        versions=OLD,
        default=None,
        only=(None, "reference"),
        note="the adapter that is the reference has the name 'reference': load it with adapter_name='reference'",
    ),
    # ---- the models ----
    TrlName(
        name="model_init_kwargs",
        kind=SAME,
        versions=ALL,
        default=None,
        note=(
            "For a model given by name; refused beside a model object, which TRL warns of or uses for the reference."
        ),
    ),
    TrlName(
        name="ref_model_init_kwargs",
        kind=SAME,
        versions=OLD,
        default=None,
        note="For a ref_model given by name; refused otherwise.",
    ),
    TrlName(
        name="trust_remote_code",
        kind=ONLY,
        versions="1.8-1.16 (before, in ModelConfig)",
        default=False,
        only=(False,),
        type=bool,
        note=(
            "the engine runs no code that comes with a model: where you trust it, load model and tokenizer "
            "yourself and pass them"
        ),
    ),
    TrlName(
        name="disable_dropout",
        kind=SAME,
        versions=ALL,
        default=True,
        note=(
            "Every nn.Dropout, LoRA's too. `dpo-engine train` leaves dropout on, since its own lora_dropout is 0 "
            "unless it is given."
        ),
    ),
    TrlName(
        name="use_logits_to_keep",
        kind=NO_EFFECT,
        versions=OLD,
        default=False,
        type=bool,
        note="no logits are built, and only scored tokens go through the head",
    ),
    TrlName(
        name="use_liger_loss",
        kind=NO_EFFECT,
        versions="0.24",
        default=False,
        type=bool,
        note="log-probs are computed without logits whatever it says; the loss is the same",
    ),
    TrlName(
        name="base_model_attribute_name",
        kind=NO_EFFECT,
        versions=OLD,
        default="model",
        type=str,
        note="the model is asked for its decoder and head",
    ),
    TrlName(
        name="activation_offloading",
        kind=ALIAS,
        versions=NEW,
        default=False,
        to="activation_offload",
        type=bool | None,
        note="Needs gradient_checkpointing, on a GPU.",
    ),
    # ---- the data ----
    TrlName(name="max_length", kind=SAME, versions=ALL, default=1024),
    TrlName(
        name="max_prompt_length",
        kind=SAME,
        versions=OLD,
        default=None,
        note="TRL 0.24 to 0.28: 512 if not given; here no bound.",
    ),
    TrlName(name="max_completion_length", kind=SAME, versions=OLD, default=None),
    TrlName(
        name="truncation_mode",
        kind=ALIAS,
        versions=ALL,
        default="keep_start",
        to="truncation",
        values={"keep_start": "keep_start", "keep_end": "keep_end"},
        note=(
            "TRL 0.24 to 0.28: keep_end if not given. keep_end cuts the prompt, once for both completions; TRL "
            "cuts each sequence by itself."
        ),
    ),
    TrlName(
        name="pad_token",
        kind=SAME,
        versions=ALL,
        default=None,
        note="Set on the tokenizer that is saved; nothing is masked by it.",
    ),
    TrlName(
        name="padding_value",
        kind=NO_EFFECT,
        versions="0.24",
        default=None,
        type=int | None,
        note="what padding holds is never read",
    ),
    TrlName(
        name="label_pad_token_id",
        kind=NO_EFFECT,
        versions=OLD,
        default=-100,
        type=int | None,
        note="there are no labels to pad: what is scored is indexed",
    ),
    TrlName(name="pad_to_multiple_of", kind=NO_EFFECT, versions=NEW, default="auto", note="forests are not padded"),
    TrlName(
        name="padding_free",
        kind=NO_EFFECT,
        versions=ALL,
        default=False,
        type=bool,
        note="forests are not padded, with any attention",
    ),
    TrlName(
        name="dataset_num_proc",
        kind=NO_EFFECT,
        versions=ALL,
        default=None,
        type=int | None,
        note="one process tokenises, in threads",
    ),
    TrlName(
        name="tools",
        kind=ONLY,
        versions=OLD,
        default=None,
        only=(None, []),
        type=list[str] | None,
        note=(
            "tool definitions are not rendered yet: render them into the prompt yourself, and give prompt, chosen"
            " and rejected as text"
        ),
    ),
    # ---- logging ----
    TrlName(
        name="generate_during_eval",
        kind=ONLY,
        versions=OLD,
        default=False,
        only=(False, None),
        type=bool,
        note="`dpo-engine train --sample_prompts N` answers held-out prompts before and after training",
    ),
    # ---- ModelConfig ----
    TrlName(name="model_name_or_path", kind=ALIAS, versions=ALL, default=None, to="model", owner=MODEL_CONFIG),
    TrlName(
        name="model_revision",
        kind=ONLY,
        versions=ALL,
        default="main",
        only=("main",),
        type=str,
        owner=MODEL_CONFIG,
        note=(
            "download that revision into a folder (hf download ID --revision REV --local-dir FOLDER), and give "
            "the folder"
        ),
    ),
    TrlName(
        name="dtype",
        kind=SAME,
        versions=ALL,
        default="float32",
        owner=MODEL_CONFIG,
        note="Weights that train are float32 whatever it says, under autocast.",
    ),
    TrlName(name="torch_dtype", kind=ALIAS, versions="0.24", default=None, to="dtype", owner=MODEL_CONFIG),
    TrlName(
        name="attn_implementation",
        kind=ONLY,
        versions=ALL,
        default=None,
        only=(None,),
        owner=MODEL_CONFIG,
        note=(
            "leave it out: the engine takes what the model, probed, is right with; DPOTrainer takes a model "
            "loaded as you like"
        ),
    ),
    TrlName(
        name="use_peft",
        kind=SAME,
        versions=ALL,
        default=False,
        owner=MODEL_CONFIG,
        note="With model_name_or_path, as in TRL: every parameter trains unless it is true.",
    ),
    TrlName(name="lora_r", kind=SAME, versions=ALL, default=16, owner=MODEL_CONFIG),
    TrlName(name="lora_alpha", kind=SAME, versions=ALL, default=32, owner=MODEL_CONFIG),
    TrlName(
        name="lora_dropout",
        kind=SAME,
        versions=ALL,
        default=0.05,
        owner=MODEL_CONFIG,
        note="Here 0; TRL's disable_dropout switches its 0.05 off again.",
    ),
    TrlName(
        name="lora_target_modules",
        kind=SAME,
        versions=ALL,
        default=None,
        owner=MODEL_CONFIG,
        note=(
            "None: every linear layer but the head here, PEFT's choice by architecture (often q_proj and v_proj) "
            "in TRL."
        ),
    ),
    TrlName(
        name="lora_target_parameters",
        kind=ONLY,
        versions=ALL,
        default=None,
        only=(None,),
        type=list[str] | None,
        owner=MODEL_CONFIG,
        note="give a PeftModel or peft_config to DPOTrainer",
    ),
    TrlName(
        name="lora_modules_to_save",
        kind=ONLY,
        versions=ALL,
        default=None,
        only=(None,),
        type=list[str] | None,
        owner=MODEL_CONFIG,
        note="give a PeftModel or peft_config to DPOTrainer",
    ),
    TrlName(
        name="lora_task_type",
        kind=ONLY,
        versions=ALL,
        default="CAUSAL_LM",
        only=("CAUSAL_LM",),
        type=str,
        owner=MODEL_CONFIG,
        note="the engine trains causal language models",
    ),
    TrlName(name="use_rslora", kind=SAME, versions=ALL, default=False, owner=MODEL_CONFIG),
    TrlName(name="use_dora", kind=SAME, versions=ALL, default=False, owner=MODEL_CONFIG),
    TrlName(
        name="load_in_4bit",
        kind=SAME,
        versions=ALL,
        default=False,
        owner=MODEL_CONFIG,
        note="NF4 with double quantisation.",
    ),
    TrlName(
        name="load_in_8bit",
        kind=ONLY,
        versions=ALL,
        default=False,
        only=(False,),
        type=bool,
        owner=MODEL_CONFIG,
        note="load_in_4bit: true",
    ),
    TrlName(
        name="bnb_4bit_quant_type",
        kind=ONLY,
        versions=ALL,
        default="nf4",
        only=("nf4",),
        type=str,
        owner=MODEL_CONFIG,
        note="DPOTrainer takes a model quantised otherwise, or quantization_config",
    ),
    TrlName(
        name="use_bnb_nested_quant",
        kind=ONLY,
        versions=ALL,
        default=False,
        only=(None, True),
        type=bool | None,
        unset=None,
        owner=MODEL_CONFIG,
        note="load_in_4bit quantises twice here, also where it is not said; DPOTrainer takes quantization_config",
    ),
    TrlName(
        name="bnb_4bit_quant_storage",
        kind=ONLY,
        versions="0.28-1.16",
        default=None,
        only=(None, "uint8"),
        owner=MODEL_CONFIG,
        note="DPOTrainer takes quantization_config",
    ),
    # ---- ScriptArguments and DatasetMixtureConfig ----
    TrlName(
        name="dataset_name",
        kind=ALIAS,
        versions=ALL,
        default=None,
        to="data",
        owner=SCRIPT,
        note="A hub id; with eval_strategy, its dataset_test_split is eval_data.",
    ),
    TrlName(
        name="dataset_config",
        kind=ONLY,
        versions=ALL,
        default=None,
        only=(None,),
        owner=SCRIPT,
        note=(
            "save that configuration as a file (load_dataset(ID, NAME)['train'].to_json(...)), and give the file "
            "as data"
        ),
    ),
    TrlName(name="dataset_train_split", kind=ALIAS, versions=ALL, default="train", to="data_split", owner=SCRIPT),
    TrlName(name="dataset_test_split", kind=ALIAS, versions=ALL, default="test", to="eval_split", owner=SCRIPT),
    TrlName(
        name="dataset_streaming",
        kind=ONLY,
        versions=ALL,
        default=False,
        only=(False,),
        type=bool,
        owner=SCRIPT,
        note="DPOTrainer takes a stream (an IterableDataset) as train_dataset, with max_steps",
    ),
    TrlName(
        name="gradient_checkpointing_use_reentrant",
        kind=ONLY,
        versions="0.24",
        default=False,
        only=(False,),
        type=bool,
        owner=SCRIPT,
        note="gradient_checkpointing_kwargs: {use_reentrant: true}",
    ),
    TrlName(
        name="ignore_bias_buffers",
        kind=ONLY,
        versions=ALL,
        default=False,
        only=(False,),
        type=bool,
        owner=SCRIPT,
        note="nothing here needs it; leave it out",
    ),
    TrlName(
        name="datasets",
        kind=ONLY,
        versions=ALL,
        default=[],
        only=(None, []),
        unset=None,
        type=list[str] | None,
        owner=SCRIPT,
        note=(
            "a mixture of data sets: join them in one file (concatenate_datasets(...).to_json(...)), and give the"
            " file as data"
        ),
    ),
    TrlName(
        name="streaming",
        kind=ONLY,
        versions=ALL,
        default=False,
        only=(False,),
        type=bool,
        owner=SCRIPT,
        note="DPOTrainer takes a stream (an IterableDataset) as train_dataset, with max_steps",
    ),
    TrlName(
        name="test_split_size",
        kind=ONLY,
        versions=ALL,
        default=None,
        only=(None,),
        type=float | None,
        owner=SCRIPT,
        note="give the held-out pairs as eval_data",
    ),
)


def trl_name(name: str) -> TrlName | None:
    """The row of that name."""
    return next((row for row in TRL_NAMES if row.name == name), None)


def _arguments(class_name: str, in_config: bool) -> Any:
    """A dataclass of the names that no key of ours has, so that scripts, flags and YAML may use them."""
    rows = [row for row in TRL_NAMES if row.kind != SAME and (row.owner == DPO_CONFIG) == in_config]
    fields = []
    for row in rows:
        text = f"TRL's name for {row.to}." if row.kind == ALIAS else f"TRL's; {row.note}."
        fields.append((row.name, row.type, field(default=row.not_given, metadata={"help": text.replace("%", "%%")})))
    made = make_dataclass(class_name, fields)
    made.__module__ = __name__
    return made


if TYPE_CHECKING:

    class TrlArguments:
        """TRL's names as fields of `DPOConfig`."""

    class TrlScriptArguments:
        """TRL's names as keys of `dpo-engine train`."""

else:
    TrlArguments = _arguments("TrlArguments", in_config=True)
    TrlScriptArguments = _arguments("TrlScriptArguments", in_config=False)
