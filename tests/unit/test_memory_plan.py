"""Does a plan count what is there, fit what it says fits, and say what to change where nothing does?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.memory.cards import GIB, read_card
from dpo_engine.memory.plan import LEAST_LENGTH, make_plan, most_tokens
from dpo_engine.memory.shapes import read_shape, shipped_config, shipped_names, shipped_shape
from dpo_engine.memory.step import (
    HEAD_TILE,
    MIB,
    STATE_BYTES,
    StepSettings,
    step_parts,
    trained_parameters,
    weight_bytes,
)

LLAMA = shipped_shape("llama-3.1-8b")
QLORA = StepSettings()


# ---- shapes ----


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_shape_has_every_parameter_of_the_model_that_transformers_builds(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = dict(shipped_config(name))
    config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    head, shape = model.get_output_embeddings(), shipped_shape(name)
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear and m is not head]
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.linear_weights == sum(module.weight.numel() for module in linear)


def test_sizes_that_a_config_leaves_out_are_those_of_its_family() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    shape = read_shape(text, "bare")
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary, shape.tied) == (8, 4, 256, 262208, True)
    llama = {**shipped_config("llama-2-7b")}
    del llama["num_key_value_heads"], llama["tie_word_embeddings"]
    assert (read_shape(llama, "x").kv_heads, read_shape(llama, "x").tied) == (32, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size is missing in its config; expected a whole number above 0"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"model_type": "mamba"}, "memory is not planned for model_type 'mamba'; expected one of llama"),
        ({"num_local_experts": 8}, "memory is not planned for"),
        ({"text_config": "x"}, "text_config is str; expected the config of a text model"),
        ({"vision_config": {}}, "(vision_config): hidden_size is missing"),
        ({"num_key_value_heads": 7}, "32 heads are no multiple of num_key_value_heads=7"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false' in its config; expected true or false"),
        ({"quantization_config": {"load_in_4bit": True}}, "it is stored quantised (quantization_config)"),
        ({"num_attention_heads": 33}, "hidden_size 4096 is no multiple of its 33 heads; expected head_dim"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused_in_one_line(change: dict[str, object], said: str) -> None:
    config = {**shipped_config("llama-3.1-8b"), **change}
    with pytest.raises(ModelError) as refused:
        read_shape(config, "odd")
    assert said in str(refused.value) and "\n" not in str(refused.value)


# ---- parts, by hand ----


def test_weights_of_llama_8b_in_four_bits_are_what_one_counts_by_hand() -> None:
    linear = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 4096 * 14336 * 3)
    other = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096
    assert weight_bytes(LLAMA, QLORA) == pytest.approx(linear / 2 + linear / 64 + linear / 64 / 256 * 4 + 2 * other)
    assert weight_bytes(LLAMA, replace(QLORA, weights="bfloat16")) == 2 * (linear + other)


def test_adapters_gradients_and_optimiser_of_llama_8b_are_what_one_counts_by_hand() -> None:
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert trained_parameters(LLAMA, QLORA) == adapters == 41943040
    parts = step_parts(LLAMA, QLORA, 1024)
    assert parts.adapters == parts.gradients == 4 * adapters
    assert parts.optimiser == int(adapters * (2 + 8 / 256))
    assert step_parts(LLAMA, replace(QLORA, optimiser="adamw_torch_fused"), 1024).optimiser == 8 * adapters
    two = replace(QLORA, lora_targets=("q_proj", "v_proj"))
    assert trained_parameters(LLAMA, two) == 32 * 16 * (4096 + 4096 + 4096 + 1024)
    assert trained_parameters(LLAMA, replace(two, lora_head=True)) == 32 * 16 * 13312 + 16 * (4096 + 128256)


def test_checkpoints_are_two_bytes_a_token_and_layer_and_offload_leaves_two_of_them() -> None:
    stays, goes = (step_parts(LLAMA, replace(QLORA, offload=offload), 8192) for offload in (False, True))
    assert stays.activations - goes.activations == 30 * 2 * 4096 * 8192


def test_full_fine_tuning_keeps_weights_gradients_state_and_a_reference_in_float32() -> None:
    full = StepSettings(weights="bfloat16", lora_r=0, optimiser="adamw_torch_fused", reference="model_copy")
    parts = step_parts(shipped_shape("smollm2-135m"), full, 512)
    assert parts.weights == parts.gradients == parts.reference == 4 * 134515008 and parts.adapters == 0
    assert parts.optimiser == 8 * 134515008


def test_an_existing_adapter_is_held_twice() -> None:
    assert step_parts(LLAMA, replace(QLORA, reference="adapter_copy"), 512).reference == 4 * 41943040


def test_tiles_of_the_head_are_those_that_the_operator_cuts() -> None:
    plan = pytest.importorskip("dpo_engine.ops.plan")
    assert {device: (plan.TILE_ROWS[device], plan.TILE_COLUMNS[device]) for device in ("cuda", "cpu")} == HEAD_TILE


# ---- plans ----


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("gpu", ["12GB", "16GB", "24GB"])
def test_what_fits_fits_and_one_step_more_does_not(name: str, gpu: str) -> None:
    shape, card = shipped_shape(name), read_card(gpu)
    most = most_tokens(shape, QLORA, card.memory)
    assert step_parts(shape, QLORA, most).total <= card.memory
    assert most == 131072 or step_parts(shape, QLORA, most + 64).total > card.memory
    plan = make_plan(shape, QLORA, card)
    assert plan.fits and 2 * plan.max_length <= plan.tokens == most and plan.max_length <= shape.longest


@pytest.mark.parametrize(
    ("settings", "gpu", "length", "change"),
    [
        (replace(QLORA, weights="bfloat16"), "16GB", 1024, "load_in_4bit: true"),
        (replace(QLORA, weights="bfloat16", checkpointing=False), "24GB", 1024, "gradient_checkpointing: true"),
        (replace(QLORA, checkpointing=False), "12GB", 2048, "gradient_checkpointing: true"),
        (QLORA, "24GB", 20000, "activation_offload: true"),
        (replace(QLORA, lora_r=128, optimiser="adamw_torch"), "12GB", 512, "optim: paged_adamw_8bit"),
    ],
)
def test_the_cheapest_change_is_named_and_makes_it_fit(
    settings: StepSettings, gpu: str, length: int, change: str
) -> None:
    plan = make_plan(LLAMA, settings, read_card(gpu), max_length=length)
    assert not plan.fits and plan.change == change


def test_where_no_setting_helps_the_smallest_card_is_named_and_it_does_fit() -> None:
    plan = make_plan(shipped_shape("gemma-2-9b"), QLORA, read_card("6GB"))
    assert not plan.fits and plan.change is not None
    assert plan.change == "a card of 8 GB; or a smaller model"
    assert most_tokens(shipped_shape("gemma-2-9b"), QLORA, read_card("8GB").memory) >= 2 * LEAST_LENGTH


def test_a_length_that_is_too_long_by_itself_is_answered_with_one_that_fits() -> None:
    plan = make_plan(LLAMA, replace(QLORA, offload=True, lora_r=8), read_card("12GB"), max_length=100000)
    assert not plan.fits and plan.change is not None and plan.change.startswith("max_length: ")
    length = int(plan.change.split()[-1])
    assert make_plan(LLAMA, plan.settings, read_card("12GB"), max_length=length).fits
    assert not make_plan(LLAMA, plan.settings, read_card("12GB"), max_length=length + 64).fits


def test_the_largest_pair_of_the_data_decides_where_it_is_known() -> None:
    card = read_card("12GB")
    most = most_tokens(LLAMA, QLORA, card.memory)
    assert make_plan(LLAMA, QLORA, card, max_length=most, largest_pair=most).fits
    assert not make_plan(LLAMA, QLORA, card, max_length=most, largest_pair=most + 64).fits


def test_more_of_anything_takes_more_memory() -> None:
    base = step_parts(LLAMA, QLORA, 4096).total
    assert step_parts(LLAMA, QLORA, 4160).total > base
    for change in ({"lora_r": 32}, {"checkpointing": False}, {"weights": "bfloat16"}, {"optimiser": "adamw_torch"}):
        assert step_parts(LLAMA, replace(QLORA, **change), 4096).total > base, change  # type: ignore[arg-type]


def test_optimisers_are_named_as_transformers_names_them() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    assert set(STATE_BYTES) <= {name.value for name in training_args.OptimizerNames}


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("24GB", 24 * GIB),
        ("24", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("RTX 4090", 24564 * MIB),
        ("NVIDIA-A10", 23028 * MIB),
    ],
)
def test_a_card_is_known_by_its_size_or_its_name(text: str, memory: int) -> None:
    assert 0.97 * memory < read_card(text).memory <= memory


@pytest.mark.parametrize("text", ["", "12TB", "rtx-4091", "-3GB", "0GB", "nan", "1e9GB"])
def test_an_unknown_card_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is unknown; expected a size such as 24GB, or one of rtx-3060"):
        read_card(text)


# ---- the command ----


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpo_engine.cli.main", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_plan_takes_less_than_two_seconds_and_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['dpo-engine', 'plan', '--model', 'qwen3-8b', '--gpu', '24GB', '--json']\n"
        "from dpo_engine.cli.main import main\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begin < 2
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"fits", "peak_mb", "parts", "max_length", "max_tokens_per_forest", "change"} <= set(found)
    assert found["fits"] and sum(found["parts"].values()) == pytest.approx(found["peak_mb"], abs=1)


def test_the_yaml_of_a_plan_is_one_that_train_takes_and_that_fits(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from dpo_engine.cli.options import parse
    from dpo_engine.train.run import TrainConfig

    file = tmp_path / "plan.yaml"
    done = run_plan("--model", "mistral-7b", "--gpu", "12GB", "--output", str(file))
    assert done.returncode == 0, done.stderr
    config = parse(TrainConfig, [str(file), "--dtype", "float32"])  # bfloat16 is asked for, which a CPU may not have
    assert config.load_in_4bit and config.optim == "paged_adamw_8bit" and config.gradient_checkpointing
    assert config.max_tokens_per_forest is not None and config.max_length is not None
    assert config.max_tokens_per_forest >= 2 * config.max_length
    peak = step_parts(shipped_shape("mistral-7b"), QLORA, config.max_tokens_per_forest).total
    assert peak <= read_card("12GB").memory
    again = run_plan("--model", "mistral-7b", "--gpu", "12GB", "--output", str(file))
    assert again.returncode == 2 and "exists; expected a file that does not" in again.stderr


def test_where_nothing_fits_the_number_and_the_change_are_one_line_and_no_file_is_written(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    done = run_plan(
        "--model", "llama-3.1-8b", "--gpu", "16GB", "--load_in_4bit", "false", "--json", "--output", str(file)
    )
    assert done.returncode == 2 and not file.exists()
    assert done.stderr.splitlines()[-1].endswith("the cheapest change: load_in_4bit: true")
    found = json.loads(done.stdout)
    assert (found["fits"], found["max_length"], found["change"]) == (False, None, "load_in_4bit: true")


def test_a_folder_is_planned_by_its_config_and_data_by_its_lengths(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from support.small_tokenizers import CHATML, small_tokenizer

    small_tokenizer(chat_template=CHATML).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(shipped_config("qwen3-8b")))
    rows = [{"prompt": "why?", "chosen": "because " * n, "rejected": "no"} for n in (1, 50)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_plan("--model", str(tmp_path), "--gpu", "24GB", "--data", str(tmp_path / "pairs.jsonl"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and 40 < found["max_length"] < 600
    assert "2 rows" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "qwen3-8"), "did you mean qwen3-8b?"),
        (("--model", "/nowhere"), "model '/nowhere': no such folder or file"),
        (("--model", "qwen3-8b", "--gpu", "24GB", "--max_length", "50000"), "beyond the 40960 positions"),
        (("--model", "phi-4-mini", "--gpu", "24GB", "--lora_target_modules", "q_proj"), "names 'q_proj', which is no"),
        (("--model", "gemma-2-9b", "--gpu", "24GB", "--lora_head", "true"), "is tied to its input embeddings"),
        (("--model", "qwen3-8b", "--gpu", "9000"), "gpu='9000' is unknown"),
        (("--model", "qwen3-8b", "--gpu", "24GB", "--optim", "lion"), "optim='lion' is not planned for"),
        (("--model", "qwen3-8b", "--gpu", "24GB", "--dtype", "fp8"), "dtype='fp8'; expected one of auto, float32"),
        (("--model", "qwen3-8b", "--gpu", "24GB", "--load_in_4bit", "maybe"), "load_in_4bit='maybe'; expected true or"),
        (("--gpu", "24GB"), "gpu is given without a model"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo_engine.cli.main import main

    monkeypatch.setattr("sys.argv", ["dpo-engine", "plan", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said_lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said_lines) == 1 and said in said_lines[0]
