"""From training to a model that is handed over: does what was trained come out, and is an adapter kept off other bases?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_engine.cli.main import main
from dpo_engine.model.fingerprint import weights_fingerprint
from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_models import tiny_model
from support.tiny_pairs import tiny_llama

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


class Commands:
    """`dpo-engine` in this process, in a folder with two bases of one shape and a few pairs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        tokenizer = small_tokenizer(chat_template=CHATML)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        for number, name in enumerate(("base", "other")):
            model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, eos_token_id=end, seed=number)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        rows = [{"prompt": f"where is {a}?", "chosen": f"{a} is here.", "rejected": f"no {a} at all."} for a in "abcd"]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, verb: str, *arguments: Any) -> tuple[int, str]:
        self.monkeypatch.setattr("sys.argv", ["dpo-engine", verb, *map(str, arguments)])
        self.capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, self.capsys.readouterr().err

    def train(self, name: str, **more: Any) -> Path:
        given = {
            "model": self.folder / "base", "data": self.folder / "pairs.jsonl", "output_dir": self.folder / name,
            "dtype": "float32", "max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "picture": False,
            "save_strategy": "no", "reference_cache": "off", "disable_tqdm": True, **more,
        }  # fmt: skip
        code, said = self("train", *[f"--{key}={value}" for key, value in given.items()])
        assert code == 0, said
        return self.folder / name


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_an_adapter_is_continued_stacked_and_merged_into_what_was_trained(command: Commands) -> None:
    first = command.train("first")
    base = str(command.folder / "base")

    continued = command.train("continued", adapter=first, adapter_mode="continue")
    assert command("export", continued, "--merge", "--output", command.folder / "a")[0] == 0
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), continued)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(command.folder / "a")), logits(policy))

    stacked = command.train("stacked", adapter=first, adapter_mode="stack")
    code, said = command("export", stacked, "--merge", "--output", command.folder / "b")
    assert (
        code == 2
        and "merged into it; give that merged model with --base" in said
        and not (command.folder / "b").exists()
    )
    assert command("export", first, "--merge", "--output", command.folder / "m")[0] == 0
    code, said = command("export", stacked, "--merge", "--base", command.folder / "m", "--output", command.folder / "b")
    assert code == 0, said
    merged_first = AutoModelForCausalLM.from_pretrained(command.folder / "m")
    policy = PeftModel.from_pretrained(merged_first, stacked)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(command.folder / "b")), logits(policy))
    assert f"base_model: {command.folder / 'm'}" in (command.folder / "b" / "README.md").read_text()
    assert "began from the adapter" in (stacked / "README.md").read_text()


def test_an_adapter_is_refused_on_other_weights_of_the_same_shape(command: Commands) -> None:
    adapter = command.train("adapter")
    code, said = command(
        "export", adapter, "--merge", "--base", command.folder / "other", "--output", command.folder / "x"
    )
    assert code == 2 and "was trained on other weights" in said and not (command.folder / "x").exists()
    moved = (command.folder / "base").rename(command.folder / "moved")
    assert command("export", adapter, "--merge", "--base", moved, "--output", command.folder / "x")[0] == 0


def test_a_fingerprint_is_of_the_numbers_not_of_how_they_are_saved(command: Commands) -> None:
    base = command.folder / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(command.folder / "narrow")
    model.float().save_pretrained(command.folder / "cut", max_shard_size="50KB")
    assert len(list((command.folder / "cut").glob("*.safetensors"))) > 1
    narrow, cut = (weights_fingerprint(str(command.folder / name)) for name in ("narrow", "cut"))
    assert narrow == cut != weights_fingerprint(str(base)) != weights_fingerprint(str(command.folder / "other"))
    assert weights_fingerprint(str(command.folder)) is None and weights_fingerprint("nobody/nothing") is None


def test_a_run_that_is_refused_leaves_no_folder(command: Commands) -> None:
    code, _ = command(
        "train", "--model", command.folder / "base", "--data", "missing.jsonl", "--output_dir", "out/of/it"
    )
    assert code == 2 and not Path("out/of/it").exists()


def test_transposed_layers_in_four_bits_are_merged_the_right_way_round(command: Commands) -> None:
    pytest.importorskip("bitsandbytes")
    tokenizer = small_tokenizer(chat_template=CHATML)
    gpt = command.folder / "gpt"
    tiny_model("GPT2", vocab_size=len(tokenizer), n_positions=512, n_embd=64).save_pretrained(gpt)
    tokenizer.save_pretrained(gpt)
    adapter = command.train("four", model=gpt, load_in_4bit=True)
    code, said = command("export", adapter, "--merge", "--output", command.folder / "merged")
    assert code == 0, said
    assert (command.folder / "merged" / "model.safetensors").is_file()
