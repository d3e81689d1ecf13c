"""Does the table of TRL's names have all of them, and does a configuration that uses them mean what it says?"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import TrainingArguments

from dpo_engine import DPOConfig
from dpo_engine.cli.options import parse
from dpo_engine.errors import ConfigError
from dpo_engine.losses import LOSSES
from dpo_engine.train.method_arguments import MethodArguments
from dpo_engine.train.run import TrainConfig
from dpo_engine.train.trl_names import ALIAS, DPO_CONFIG, LOSS_TYPES, NO_EFFECT, ONLY, SAME, TRL_NAMES, trl_name
from dpo_engine.train.trl_settle import say_once

ALWAYS = """learning_rate logging_steps gradient_checkpointing bf16 model_init_kwargs disable_dropout dataset_num_proc pad_token
    max_length truncation_mode padding_free precompute_ref_log_probs precompute_ref_batch_size loss_type beta f_divergence_type
    f_alpha_divergence_coef label_smoothing use_weighting ld_alpha discopop_tau loss_weights sync_ref_model
    ref_model_mixup_alpha ref_model_sync_steps""".split()
OLD = """ref_model_init_kwargs model_adapter_name ref_adapter_name force_use_ref_model use_logits_to_keep label_pad_token_id
    max_prompt_length max_completion_length tools base_model_attribute_name reference_free rpo_alpha
    generate_during_eval""".split()
NEW = """use_liger_kernel lr_scheduler_kwargs torch_empty_cache_steps trust_remote_code router_aux_loss_coef pad_to_multiple_of
    activation_offloading""".split()
FIELDS = {  # of DPOConfig beyond transformers' own, as those releases' sources have them
    "0.24": {*ALWAYS, *OLD, "use_liger_loss", "padding_value"},
    "1.8": {*ALWAYS, *NEW},
    "1.13": {*ALWAYS, *NEW},
}
FLAGS = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "out"]


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    say_once.cache_clear()


def made(**changes: Any) -> DPOConfig:
    return DPOConfig(output_dir="out", use_cpu=True, **changes)


def own_fields(config: type) -> dict[str, Any]:
    """The fields that a class and its bases add to transformers', or whose default they change, with their defaults."""
    fields = {field.name: default_of(field) for field in dataclasses.fields(config)}
    theirs = {field.name: default_of(field) for field in dataclasses.fields(TrainingArguments)}
    return {name: default for name, default in fields.items() if name not in theirs or theirs[name] != default}


def default_of(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def said_by(config: type) -> set[str]:
    """Fields that a class says itself, or by what says the methods' parameters for it."""
    bases = [base for base in (config, MethodArguments) if issubclass(config, base)]
    return set().union(*(inspect.get_annotations(base) for base in bases))


@pytest.mark.parametrize("release", FIELDS)
def test_every_field_of_a_release_is_in_the_table(release: str) -> None:
    assert FIELDS[release] <= {row.name for row in TRL_NAMES}


@pytest.mark.parametrize("name", ["DPOConfig", "ModelConfig", "ScriptArguments", "DatasetMixtureConfig"])
def test_every_field_of_the_installed_release_is_in_the_table_with_its_default(name: str, trl: Any) -> None:
    config = getattr(trl, name)
    fields = (
        own_fields(config) if name == "DPOConfig" else {f: config().__dict__[f] for f in config.__dataclass_fields__}
    )
    missing = set(fields) - {row.name for row in TRL_NAMES}
    assert not missing, f"say in dpo_engine/train/trl_names.py what these are here: {sorted(missing)}"
    if trl.__version__.startswith("1.16."):
        assert {name: trl_name(name).default for name in fields} == fields  # type: ignore[union-attr]


def test_every_loss_of_the_installed_release_is_in_the_table(trl: Any) -> None:
    source = inspect.getsource(trl.DPOTrainer)
    names = set(re.findall(r'loss_type == "(\w+)"', source))
    assert "sigmoid" in names
    assert names <= set(LOSS_TYPES)


def test_names_are_fields_once() -> None:
    names = [row.name for row in TRL_NAMES]
    assert len(set(names)) == len(names)
    ours = TrainConfig.__dataclass_fields__
    for row in TRL_NAMES:
        assert row.name in ours, row.name
        config = DPOConfig if row.owner == DPO_CONFIG else TrainConfig
        own = row.name in said_by(config) or row.name in TrainingArguments.__dataclass_fields__
        same = own or row.name in inspect.get_annotations(TrainConfig)
        assert same == (row.kind == SAME), f"{row.name}: a key of ours, and yet {row.kind} (or the other way round)"
        assert row.kind != ALIAS or row.to in ours


def test_trls_own_defaults_written_out_are_taken() -> None:
    written = {row.name: row.default for row in TRL_NAMES if row.owner == DPO_CONFIG}
    config = made(**written)
    assert (config.method, config.beta, config.truncation, config.learning_rate) == ("dpo", 0.1, "keep_start", 1e-6)


@pytest.mark.parametrize("row", [row for row in TRL_NAMES if row.kind == ONLY], ids=lambda row: row.name)
def test_what_cannot_be_done_is_refused_by_name_with_what_to_do(row: Any) -> None:
    config = made() if row.owner == DPO_CONFIG else None
    other = {bool: "true", int: "7"}.get(row.type, "0.37" if "float" in str(row.type) else "x7")
    other = "false" if row.name == "use_bnb_nested_quant" else other
    value: Any = True if row.type is bool else other
    with pytest.raises(ConfigError, match=f"{row.name}=.* cannot be done here; expected") as caught:
        if config is None:
            parse(TrainConfig, [*FLAGS, f"--{row.name}", other])
        else:
            made(**{row.name: value})
    assert row.note and row.note in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_loss_is_a_method_or_refused_with_the_nearest(name: str) -> None:
    entry = LOSS_TYPES[name]
    assert entry.nearest in LOSSES
    if entry.method in LOSSES:
        assert made(loss_type=name).method == made(loss_type=[name]).method == entry.method
        return
    with pytest.raises(ConfigError, match=f"loss_type='{name}'.*the nearest that is: method '{entry.nearest}'"):
        made(loss_type=name)


def test_several_losses_are_a_mixture_with_trls_weights(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = made(loss_type=["sigmoid", "nca_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    assert (config.method, config.loss_weights, config.loss_type) == ("dpo+nca+sft", [0.8, 0.2, 1.0], None)
    assert [(weight, part.name) for weight, part in config.entry.parts] == [(0.8, "dpo"), (0.2, "nca"), (1.0, "sft")]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("dpo_engine")]
    said = "loss_type=['sigmoid', 'nca_pair', 'sft'] is TRL's name for method='dpo+nca+sft'"
    assert sum(said in line for line in lines) == 1
    assert [weight for weight, _ in made(loss_type=["sigmoid", "sft"]).entry.parts] == [1.0, 1.0]
    assert parse(TrainConfig, [*FLAGS, "--loss_type", "sigmoid", "sft"]).method == "dpo+sft"


def test_weights_that_do_not_fit_a_loss_without_a_method_and_an_unknown_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss_weights=\[0.8, 0.2\] with the one method 'dpo'; expected none"):
        made(loss_weights=[0.8, 0.2])
    with pytest.raises(ConfigError, match=r"loss_weights=\[1.0\] for method='dpo\+sft'; expected 2 finite numbers"):
        made(loss_type=["sigmoid", "sft"], loss_weights=[1.0])
    with pytest.raises(ConfigError, match=r"method='dpo\+dpo' has a method twice"):
        made(loss_type=["sigmoid", "sigmoid"])
    with pytest.raises(ConfigError, match=r"loss_type='aot_unpaired' \(TRL's\) has no method of the same formula"):
        made(loss_type=["sigmoid", "aot_unpaired"])
    for names in ("sigmod", ["sigmoid", "sigmod"]):
        with pytest.raises(ConfigError, match=r"loss_type='sigmod' is not one of TRL's"):
            made(loss_type=names)


def test_an_alias_says_once_what_it_is_and_reads_none_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        configs = [made(loss_type="ipo", truncation_mode="keep_end", dataset_num_proc=4) for _ in range(2)]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("dpo_engine")]
    assert sum("loss_type='ipo' is TRL's name for method='ipo'" in line for line in lines) == 1
    assert sum("dataset_num_proc=4 (TRL's) has no effect" in line for line in lines) == 1
    assert sum("learning_rate 5e-06 (TRL: 1e-06)" in line for line in lines) == 1
    assert all(
        (c.method, c.loss_type, c.truncation, c.dataset_num_proc) == ("ipo", None, "keep_end", 4) for c in configs
    )  # type: ignore[attr-defined]
    assert dataclasses.replace(configs[0], method="dpo").method == "dpo"


def test_nothing_is_said_of_a_configuration_of_our_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made(method="ipo", max_length=64, truncation="drop", label_smoothing=0.0)
    assert not [record for record in caplog.records if record.name.startswith("dpo_engine")]


def test_an_alias_and_its_key_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss_type='ipo'.* and method='bco' are both given and differ"):
        made(loss_type="ipo", method="bco")
    assert made(loss_type="ipo", method="ipo").method == "ipo"
    with pytest.raises(ConfigError, match=r"loss_type=\['ipo'\].* and method='dpo' are both given and differ"):
        parse(TrainConfig, [*FLAGS, "--loss_type", "ipo", "--method", "dpo"])
    with pytest.raises(ConfigError, match=r"model_name_or_path='m'.* and model='other' are both given"):
        parse(TrainConfig, [*FLAGS, "--model", "other"])


def test_what_is_set_on_a_configuration_later_is_settled_again() -> None:
    config = made()
    config.loss_type = "ipo"  # type: ignore[attr-defined]
    config.settle()
    assert (config.method, config.loss_type) == ("ipo", None)  # type: ignore[attr-defined]
    config.rpo_alpha = 1.0  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="rpo_alpha"):
        config.settle()


@pytest.mark.parametrize(
    ("name", "value", "method"),
    [
        ("ld_alpha", 0.3, "ld_dpo"),
        ("rpo_alpha", 0.3, "dpo_nll"),
        ("f_divergence_type", "js_divergence", "f_dpo"),
        ("use_weighting", True, "wpo"),
        ("sync_ref_model", True, "tr_dpo"),
    ],
)
def test_what_makes_trls_dpo_another_method_makes_it_that_method_and_says_so(
    name: str, value: Any, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert made(**{name: value}).method == made(**{name: value}, loss_type="sigmoid").method == method
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line == f"{name}={value} with method 'dpo': the method is {method!r}" for line in lines) == 1
    own = made(method=method)
    assert own.method == method and own.entry.settings(own) == LOSSES[method].settings(None)
    with pytest.raises(
        ConfigError, match=rf"{name}={value!r} is (given, but|out of range; expected false:) the method ipo"
    ):
        made(**{name: value}, loss_type="ipo")
    assert (made().method, made(f_divergence_type="reverse_kl").method) == ("dpo", "dpo")


def test_a_run_by_trls_names_trains_what_it_would_there(tmp_path: Path) -> None:
    file = tmp_path / "trl.yaml"
    file.write_text(
        "model_name_or_path: m\ndataset_name: owner/pairs\ndataset_train_split: a\ndataset_test_split: b\noutput_dir: out\n"
        "use_peft: true\nlora_r: 8\nlora_target_modules: all-linear\ntorch_dtype: float32\nloss_type: [ipo]\n"
        "eval_strategy: steps\nlora_task_type: CAUSAL_LM\n",
        encoding="utf-8",
    )
    config = parse(TrainConfig, [str(file)])
    assert (config.model, config.data, config.data_split, config.eval_split) == ("m", "owner/pairs", "a", "b")
    assert (config.eval_data, config.lora_r, config.lora_target_modules) == ("owner/pairs", 8, None)
    assert (config.dtype, config.method, config.disable_dropout) == ("float32", "ipo", False)
    assert parse(TrainConfig, FLAGS).lora_r == 0  # TRL trains every parameter unless use_peft is true
    assert parse(TrainConfig, ["--model", "m", "--data", "d", "--output_dir", "out"]).lora_r == 16
    with pytest.raises(ConfigError, match=r"lora_r=8 is out of range; expected it left out, or use_peft: true"):
        parse(TrainConfig, [*FLAGS, "--lora_r", "8"])
    with pytest.raises(ConfigError, match=r"lora_r=0 is out of range"):
        parse(TrainConfig, [*FLAGS, "--use_peft", "--lora_r", "0"])
    with pytest.raises(ConfigError, match=r"model_init_kwargs=.*dtype"):
        parse(TrainConfig, [*FLAGS, "--model_init_kwargs", '{"dtype": "float32"}'])


def test_a_mixture_of_data_sets_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mixture.yaml"
    file.write_text("datasets:\n  - path: owner/pairs\n    split: train\noutput_dir: out\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"datasets=.* cannot be done here; .*join them in one file"):
        parse(TrainConfig, [str(file)])


def test_what_has_no_effect_says_why() -> None:
    assert all(row.note for row in TRL_NAMES if row.kind == NO_EFFECT)


def test_defaults_of_a_method_that_are_not_trls_are_said_where_trls_names_are_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        made(loss_type="robust")
        made(loss_type="sppo_hard")
        made(loss_type="ipo")
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        "method 'rdpo' has defaults of its own that are not TRL's: label_smoothing 0.1 (TRL: 0.0)" in line
        for line in lines
    )
    assert any(
        "method 'sppo' has defaults of its own that are not TRL's: beta 0.001 (TRL: 0.1)" in line for line in lines
    )
    assert not any("method 'ipo' has defaults" in line for line in lines)


def test_a_method_set_later_takes_its_own_beta_unless_one_was_given() -> None:
    config = made()
    config.method = "simpo"
    config.settle()
    assert config.beta == 2.0
    config.method = "sft"
    config.settle()
    assert config.beta is None
    config = made(beta=0.3)
    config.method = "ipo"
    config.settle()
    assert config.beta == 0.3
