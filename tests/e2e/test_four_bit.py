"""Does QLoRA train for real: NF4 weights that stay as they are, adapters that learn, the base as the reference?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.batch import build_forest
from dpo_engine.errors import ConfigError
from dpo_engine.model.adapters import add_lora
from dpo_engine.model.loading import load_model
from dpo_engine.model.scoring import forest_token_logps
from dpo_engine.train.run import TrainConfig
from support.tiny_pairs import random_pairs, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def four_bit(folder: Path) -> Any:
    return load_model(str(folder), dtype=torch.float32, trainable=False, in_4bit=True)


def test_linear_layers_are_nf4_with_double_quantisation_and_head_and_norms_keep_their_dtype(folder: Path) -> None:
    model = four_bit(folder)
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(quantised) == 2 * 7 and not any("lm_head" in name for name in quantised)
    for layer in quantised.values():
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.float32
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_adapters_learn_on_weights_that_stay_and_the_base_is_the_reference(folder: Path, tmp_path: Path) -> None:
    model = add_lora(four_bit(folder), r=4, alpha=8)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    data = random_pairs(16)
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        max_tokens_per_forest=120, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = DPOTrainer(model=model, args=args, train_dataset=data)
    assert trainer.layout.name == "shared"
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.6
    for name, before in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], before), name
    moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(moved) == 2 * 2 * 7 and all(p.dtype == torch.float32 and bool(p.any()) for p in moved.values())


def test_a_shared_prompt_gives_what_separate_sequences_give(folder: Path) -> None:
    model = add_lora(four_bit(folder), r=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    args = DPOConfig(output_dir=str(folder), use_cpu=True, dataloader_pin_memory=False)
    DPOTrainer(model=model, args=args, train_dataset=random_pairs(4))  # binds and chooses the layout
    trees = random_pairs(5, seed=2).trees
    found = {layout: forest_token_logps(model, build_forest(trees, layout)) for layout in ("shared", "alone")}
    wanted = found["alone"].detach()
    assert ((found["shared"] - wanted).abs() <= 1e-5 * wanted.abs().clamp(min=1)).all()


def test_the_command_line_trains_a_model_in_four_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo_engine.cli.main import main
    from support.small_tokenizers import CHATML, small_tokenizer

    tokenizer = small_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tiny_llama(vocab_size=len(tokenizer), hidden_size=64, eos_token_id=end).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"where is {a}?", "chosen": f"{a} is here.", "rejected": f"no {a} at all."} for a in "abcdefgh"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {
        "model": tmp_path / "model", "data": tmp_path / "pairs.jsonl", "output_dir": tmp_path / "out", "max_steps": 2,
        "dtype": "float32", "load_in_4bit": True, "optim": "paged_adamw_8bit", "picture": False, "save_strategy": "no",
    }  # fmt: skip
    monkeypatch.setattr("sys.argv", ["dpo-engine", "train", *[f"--{k}={v}" for k, v in arguments.items()]])
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_what_cannot_be_is_refused_with_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="4-bit weights cannot train; put adapters on them"):
        load_model(str(folder), dtype=torch.float32, trainable=True, in_4bit=True)
    with pytest.raises(ConfigError, match="lora_r=0 is out of range; expected a rank above 0 with load_in_4bit"):
        TrainConfig(model="m", data="d", output_dir="o", load_in_4bit=True, lora_r=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ConfigError, match="bitsandbytes, which is not installed; pip install"):
        load_model(str(folder), dtype=torch.float32, trainable=False, in_4bit=True)
