"""Is what `dpo-engine export` writes the adapted model, and is nothing left of what it refuses?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_engine.cli.main import main
from dpo_engine.export import check as checking
from dpo_engine.export import run as exporting
from support.adapters import adapted, greedy, logits, plain, save_adapter, save_base, start

LLAMA_CPP = os.environ.get("LLAMA_CPP")  # the tests themselves run without it

CONVERTER = """
import pathlib, sys
model, flags = pathlib.Path(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2]))
out = pathlib.Path(flags["--outfile"])
out.write_text(" ".join([str((model / "model.safetensors").stat().st_size), flags["--outtype"]]))
if pathlib.Path(sys.argv[0]).parent.name == "fail":
    print("no such architecture", file=sys.stderr)
    sys.exit(3)
"""


class Export:
    """`dpo-engine export`, called in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.err = ""

    def run(self, *arguments: Any) -> tuple[int, dict[str, Any] | None]:
        """Exit code and the JSON object."""
        self.monkeypatch.setattr("sys.argv", ["dpo-engine", "export", *map(str, arguments), "--json"])
        self.capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, self.err = self.capsys.readouterr()
        assert "Traceback" not in self.err
        return code, json.loads(out.splitlines()[-1]) if out else None

    def refused(self, *arguments: Any) -> str:
        """The one line that says why; nothing on stdout."""
        code, result = self.run(*arguments)
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert code in (1, 2) and result is None and len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    return Export(monkeypatch, capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "run", base)


def same(merged: Path, base: Path, adapter: Path) -> None:
    """The files as anybody loads them, against peft's own adapter-on model."""
    policy, model = adapted(base, adapter), plain(merged)
    torch.testing.assert_close(logits(model), logits(policy), rtol=1e-4, atol=2e-4)
    assert greedy(model) == greedy(policy)
    with policy.disable_adapter():
        assert (logits(model) - logits(policy)).abs().max() > 0.1
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "r": 8},
        {"use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    ],
    ids=["lora", "rslora", "dora", "on the head", "whole head", "ranks by layer"],
)
def test_a_float32_merge_is_the_adapted_model(
    export: Export, base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    adapter, output = save_adapter(tmp_path / "run", base, **config), tmp_path / "merged"
    code, result = export.run(adapter, "--merge", "--dtype", "float32", "--output", output)
    assert code == 0 and result, export.err
    assert result["merged"] == str(output) and result["dtype"] == "float32" and result["check"]["max"] < 1e-4
    assert result["effect"] > 0.05
    same(output, base, adapter)
    names = {path.name for path in output.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json", "README.md"} <= names
    assert "adapter_config.json" not in names
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_sixteen_bits_round_each_weight_once_and_say_what_it_costs(export: Export, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter, output = save_adapter(tmp_path / "run", base), tmp_path / "run-merged"
    code, result = export.run(adapter, "--merge")
    assert code == 0 and result, export.err
    assert result["dtype"] == "bfloat16" and result["merged"] == str(output)
    assert 1e-4 < result["check"]["mean"] < 0.2 and "read back from the bfloat16 files" in export.err
    assert f"mean {result['check']['mean']:.2e}" in export.err
    exact = adapted(base, adapter).merge_and_unload().state_dict()
    with safe_open(output / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), exact[name].to(torch.bfloat16)), name
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_trained_on_4_bits_is_merged_into_what_they_stand_for(export: Export, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    from dpo_engine.model.loading import load_model

    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    adapter = save_adapter(tmp_path / "run", base)
    flags = [adapter, "--merge", "--dtype", "float32", "--output"]
    quantised = load_model(str(base), dtype=torch.float32, trainable=False, in_4bit=True)
    wanted = logits(PeftModel.from_pretrained(quantised, adapter).eval())
    facts = {
        "schema": 1,
        "load_in_4bit": True,
        "dtype": "float32",
        "base": {"name": "base"},
        "lora": {"r": 4},
        "method": None,
    }
    (adapter / "dpo_engine_run.json").write_text(json.dumps(facts))
    code, result = export.run(*flags, tmp_path / "recorded")
    assert code == 0 and result and result["from_4bit"], export.err
    torch.testing.assert_close(logits(plain(tmp_path / "recorded")), wanted, rtol=1e-3, atol=1e-3)
    assert result["check_4bit"]["max"] < 1e-3 and "the 4-bit weights as they are computed in training" in export.err
    assert (logits(adapted(base, adapter)) - wanted).abs().max() > 0.05
    (adapter / "dpo_engine_run.json").unlink()
    code, result = export.run(*flags, tmp_path / "said", "--load_in_4bit", "true", "--dtype", "bfloat16")
    assert code == 0 and result and result["from_4bit"], export.err


def test_a_run_on_4_bits_leaves_a_record_that_the_merge_goes_by(export: Export, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    rows = [
        {"prompt": f"where is the {a}?", "chosen": "here.", "rejected": f"the {a} ran away."} for a in ("cat", "dog")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    settings = {
        "model": base,
        "data": data,
        "output_dir": run,
        "dtype": "float32",
        "load_in_4bit": True,
        "max_steps": 2,
    }
    settings |= {"learning_rate": 0.05, "save_strategy": "no", "lora_r": 4, "picture": False, "reference_cache": "off"}
    export.monkeypatch.setattr(
        "sys.argv", ["dpo-engine", "train", *[f"--{key}={value}" for key, value in settings.items()]]
    )
    with pytest.raises(SystemExit, match="0"):
        main()
    code, result = export.run(run, "--merge", "--dtype", "float32", "--output", tmp_path / "out")
    assert code == 0 and result and result["from_4bit"], export.err
    assert result["check_4bit"]["max"] < 1e-3 < result["effect"]
    assert "what NF4 makes of" in export.err and "NF4" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("config", "rank", "said"),
    [
        ({"r": 4}, 8, None),
        ({"r": 33}, 64, None),
        ({"r": 600, "target_modules": ["q_proj"]}, None, "its rank is 600"),
        ({"use_dora": True}, None, "it is DoRA"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save: lm_head"),
        ({"target_modules": ["lm_head"]}, None, "on the head"),
        ({"alpha_pattern": {"q_proj": 16}}, None, "its scale differs between layers"),
    ],
)
def test_the_serving_line_fits_the_adapter_or_says_why_there_is_none(
    export: Export, base: Path, tmp_path: Path, config: dict[str, Any], rank: int | None, said: str | None
) -> None:
    adapter = save_adapter(tmp_path / "run", base, **config)
    code, result = export.run(adapter)
    assert code == 0 and result and result["merged"] is None, export.err
    text = "\n".join(result["serve"])
    if rank:
        expected = f"vllm serve {base} --enable-lora --lora-modules run={adapter} --max-lora-rank {rank}"
        assert expected in result["serve"] and "transformers serve takes no adapters" in text
    else:
        assert said and said in text and "vllm serve" not in text and "--merge" in text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def break_shape(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file(tensors | {name: torch.zeros(4, 5)}, folder / "adapter_model.safetensors")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "q_proj.lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors")


def other_record(folder: Path) -> None:
    facts = {"schema": 1, "base": {"name": "other", "num_hidden_layers": 30}}
    (folder / "dpo_engine_run.json").write_text(json.dumps(facts))


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def whole_model(folder: Path) -> None:
    (folder / "adapter_config.json").rename(folder / "config.json")


def prompt_tuning(folder: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (whole_model, "it holds a whole model"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"), "cannot be read"),
        (only_pickle, "a pickle"),
        (break_shape, "instead of"),
        (drop_tensor, "is missing"),
        (other_record, "num_hidden_layers 30"),
        (prompt_tuning, "it cannot be merged"),
        (lambda folder: (folder / "dpo_engine_run.json").write_text('{"schema": 99}'), "not of schema 1"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_in_one_line(
    export: Export, adapter: Path, tmp_path: Path, change: Any, message: str
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "run"))
    change(copy)
    assert message in export.refused(copy, "--merge", "--output", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == []


def test_a_base_that_does_not_fit_is_refused_before_weights_are_read(
    export: Export, base: Path, adapter: Path, tmp_path: Path
) -> None:
    wide = save_base(tmp_path / "wide", hidden_size=48)
    for name in wide.glob("*.safetensors"):
        name.unlink()
    remote = Path(shutil.copytree(wide, tmp_path / "remote"))
    config = {"model_type": "made_up", "auto_map": {"AutoModelForCausalLM": "model.Made"}}
    (remote / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    flags = [adapter, "--merge", "--output", output, "--base"]
    assert "does not fit the base" in export.refused(*flags, wide)
    assert "needs code of its own" in export.refused(*flags, remote)
    assert "no such folder" in export.refused(*flags, tmp_path / "nowhere")
    config = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    packed = Path(shutil.copytree(base, tmp_path / "packed"))
    (packed / "config.json").write_text(json.dumps(config))
    assert "is stored quantised" in export.refused(*flags, packed)
    assert not output.exists()


@pytest.mark.parametrize("config", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_is_tied_is_not_merged(export: Export, tmp_path: Path, config: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "run", base, **config)
    assert "ties its head" in export.refused(adapter, "--merge", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_stay_tied(export: Export, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    adapter, output = save_adapter(tmp_path / "run", base), tmp_path / "merged"
    assert export.run(adapter, "--merge", "--output", output)[0] == 0, export.err
    same(output, base, adapter)
    assert "lm_head.weight" not in load_file(output / "model.safetensors")


def test_a_place_that_cannot_take_it_is_refused(export: Export, adapter: Path, tmp_path: Path) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "kept").write_text("kept")
    file.write_text("kept")
    assert "is not empty" in export.refused(adapter, "--merge", "--output", full)
    assert "is a file" in export.refused(adapter, "--merge", "--output", file)
    assert (full / "kept").read_text() == file.read_text() == "kept"
    usage = namedtuple("usage", "total used free")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**6, 10**6))
        assert "GiB, and 0.00 GiB are free there" in export.refused(adapter, "--merge", "--output", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "host_bytes", lambda: 1000)
        assert "main memory" in export.refused(adapter, "--merge", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export.monkeypatch.chdir(empty)
    assert export.run(adapter, "--merge", "--output", ".")[0] == 0, export.err
    assert (empty / "model.safetensors").is_file()


@pytest.mark.parametrize("flags", [["--dtype", "int8"], ["--outtype", "q4"], ["--load_in_4bit", "maybe"]])
def test_a_value_out_of_range_is_refused(export: Export, adapter: Path, flags: list[str]) -> None:
    assert f"{flags[0][2:]}={flags[1]} is out of range" in export.refused(adapter, "--merge", *flags)


def test_a_merge_that_says_something_else_is_not_kept(
    export: Export, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(folder: Path, dtype: torch.dtype) -> Any:
        model = plain(folder)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[0] += 0.05
        return model

    monkeypatch.setattr(exporting, "_read_back", spoilt)
    assert "is not the adapted one" in export.refused(adapter, "--merge", "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rounding_that_costs_too_much_is_not_kept(
    export: Export, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "MOST_MEAN", 1e-5)
    message = export.refused(adapter, "--merge", "--dtype", "bf16", "--output", tmp_path / "out")
    assert "rounding to bfloat16 changes the merged model" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_after_the_write_and_before_the_rename_leaves_nothing(
    export: Export, adapter: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    seen = []

    def interrupted(folder: Path, dtype: torch.dtype) -> Any:
        seen.append((folder / "model.safetensors").is_file())
        os.kill(os.getpid(), number)
        return plain(folder)

    export.monkeypatch.setattr(exporting, "_read_back", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    found, result = export.run(adapter, "--merge", "--output", tmp_path / "out")
    assert (found, result, seen) == (code, None, [True])
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is handler


def test_a_kill_during_the_write_leaves_no_folder_of_the_final_name_and_the_next_export_says_what_lies_there(
    export: Export, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start("export", adapter, "--merge", "--output", output)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*.partial/*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not output.exists()
    (left,) = tmp_path.iterdir()
    assert export.run(adapter, "--merge", "--output", output)[0] == 0
    assert f"{left} is of an export that was killed" in export.err and (output / "model.safetensors").is_file()


def converter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


@pytest.mark.parametrize("where", ["flag", "variable", "path"])
def test_the_converter_is_given_the_merged_folder_a_temporary_name_and_the_type(
    export: Export, adapter: Path, tmp_path: Path, where: str
) -> None:
    folder, output = converter(tmp_path / "llama"), tmp_path / "out"
    flags = ["--llama_cpp", folder] if where == "flag" else []
    if where == "variable":
        export.monkeypatch.setenv("LLAMA_CPP", str(folder))
    if where == "path":
        export.monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
    code, result = export.run(adapter, "--gguf", "--outtype", "f16", "--output", output, *flags)
    assert code == 0 and result, export.err
    assert result["gguf"] == str(output / "out-f16.gguf")
    size = (output / "model.safetensors").stat().st_size
    assert (output / "out-f16.gguf").read_text() == f"{size} f16"
    assert not [path for path in output.iterdir() if path.name.endswith(".partial")]


def test_a_converter_that_fails_is_quoted_and_leaves_the_merged_model_alone(
    export: Export, adapter: Path, tmp_path: Path
) -> None:
    folder, output = converter(tmp_path / "fail"), tmp_path / "out"
    message = export.refused(adapter, "--gguf", "--llama-cpp", folder, "--output", output)
    assert "ended with 3: no such architecture" in message and "is whole" in message
    assert (output / "model.safetensors").is_file()
    assert not [path for path in output.iterdir() if ".gguf" in path.name]


def test_without_a_converter_the_commands_are_printed_and_nothing_is_claimed(
    export: Export, adapter: Path, tmp_path: Path
) -> None:
    code, result = export.run(adapter, "--gguf", "--output", tmp_path / "out")
    assert code == 0 and result and result["gguf"] is None and result["merged"]
    assert "nothing was converted to GGUF" in export.err
    assert f"convert_hf_to_gguf.py {tmp_path / 'out'} --outfile" in export.err and "llama-quantize" in export.err
    message = export.refused(adapter, "--gguf", "--llama_cpp", tmp_path, "--output", tmp_path / "again")
    assert "holds no convert_hf_to_gguf.py" in message and not (tmp_path / "again").exists()


@pytest.mark.slow
def test_the_real_converter_writes_a_file_that_says_the_same(export: Export, tmp_path: Path) -> None:
    if not LLAMA_CPP:
        pytest.skip("needs a checkout of llama.cpp, named by LLAMA_CPP, and what its converter imports")
    pytest.importorskip("gguf")
    pytest.importorskip("sentencepiece")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GgufConfig

    from dpo_engine.errors import ModelError
    from dpo_engine.model.smollm2 import smollm2_folder

    try:
        base = smollm2_folder()
    except ModelError as error:
        pytest.skip(f"the packaged model cannot be had here: {error}")
    policy = get_peft_model(plain(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    policy.save_pretrained(tmp_path / "run")
    output = tmp_path / "out"
    code, result = export.run(
        tmp_path / "run", "--base", base, "--gguf", "--outtype", "bf16", "--llama_cpp", LLAMA_CPP, "--output", output
    )
    assert code == 0 and result, export.err
    read = AutoModelForCausalLM.from_pretrained(
        output,
        gguf_file=Path(result["gguf"]).name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    merged = plain(output)
    torch.testing.assert_close(logits(read), logits(merged), rtol=1e-4, atol=1e-4)
    assert greedy(read) == greedy(merged)
