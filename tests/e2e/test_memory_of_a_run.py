"""Is a run that cannot fit refused before its weights are read, and memory that runs out answered with what to change?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpo_engine.errors import ConfigError, ModelError, TrainingError
from dpo_engine.memory.cards import Card
from dpo_engine.memory.shapes import shipped_config
from dpo_engine.train.memory import answered, is_out_of_memory
from dpo_engine.train.run import TrainConfig, prepare_run, run_training
from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_models import tiny_model
from support.tiny_pairs import tiny_llama


def folder_of(path: Path, config: dict[str, Any] | None) -> Path:
    """A model folder: a tiny Llama with its weights, or a config alone."""
    tokenizer = small_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if config is None:
        tiny_llama(vocab_size=len(tokenizer), hidden_size=64, eos_token_id=end).save_pretrained(path)
    else:
        (path / "config.json").write_text(json.dumps(config))
    return path


def run_config(tmp_path: Path, config: dict[str, Any] | None = None, *, words: int = 1, **more: Any) -> TrainConfig:
    folder = folder_of(tmp_path / "model", config)
    rows = [
        {"prompt": f"where is {a}?", "chosen": f"{a} is here. " * words, "rejected": f"no {a} at all. " * words}
        for a in "abcdefgh"
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {
        "model": str(folder), "data": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "out"), "dtype": "float32",
        "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "picture": False, "disable_tqdm": True,
    }  # fmt: skip
    return TrainConfig(**{**given, **more})


def with_memory(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    card = Card(name="a small card", memory=int(gigabytes * 2**30), tflops=None)
    monkeypatch.setattr("dpo_engine.train.memory._card_here", lambda device: card)


def test_what_cannot_fit_is_refused_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 16)
    config = run_config(tmp_path, shipped_config("llama-3.1-8b"))  # its folder has no weights
    with pytest.raises(ConfigError) as refused:
        prepare_run(config, print)
    said = str(refused.value)
    assert re.search(r"planned at 3\d,\d{3} MiB, and 16,384 are free", said), said
    assert "the cheapest change: load_in_4bit: true; check_memory: false tries all the same" in said
    config.check_memory = False
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):
        prepare_run(config, print)


def test_a_forest_that_is_larger_than_memory_allows_is_answered_with_one_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, 12)
    config = run_config(
        tmp_path,
        shipped_config("llama-3.1-8b"),
        words=6000,
        max_length=2048,
        load_in_4bit=True,
        optim="paged_adamw_8bit",
        max_tokens_per_forest=60000,
    )
    with pytest.raises(ConfigError, match=r"the cheapest change: max_tokens_per_forest: \d+") as refused:
        prepare_run(config, print)
    found = re.search(r"max_tokens_per_forest: (\d+)", str(refused.value))
    assert found
    config.max_tokens_per_forest = int(found[1])
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):  # the plan is content
        prepare_run(config, print)


def test_scoring_alone_is_not_held_to_the_plan_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 0.001)
    config = run_config(tmp_path)
    with pytest.raises(ConfigError, match="does not fit"):
        prepare_run(config, print)
    assert len(prepare_run(config, print, trains=False).data) == 8


def test_a_run_says_what_it_was_planned_at_and_another_kind_of_model_goes_on_without(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_training(run_config(tmp_path, reference_cache="off"), lines.append)
    (line,) = [line for line in lines if line.startswith("memory: ")]
    assert re.fullmatch(
        r"memory: planned at \d+ MiB of [\d,]+ \(cpu, what is free of it\), with forests of \d+ tokens", line
    )
    assert result["planned_mb"] > 0
    # Planned are the forests that are trained on, which a step's pairs or the budget bound.
    tokens = int(line.split()[-2])
    assert tokens <= result["max_tokens_per_forest"] and tokens > 100

    other, vocabulary = tmp_path / "other", len(small_tokenizer())
    config = run_config(tmp_path, output_dir=str(other))
    tiny_model("GPT2", vocab_size=vocabulary, n_positions=512).save_pretrained(tmp_path / "model")
    lines.clear()
    prepare_run(config, lines.append)
    assert any(line.startswith("memory: no plan (model") and "'gpt2'" in line for line in lines)


def test_memory_that_runs_out_in_a_step_is_answered_with_the_plan_and_the_setting_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_engine.train.scoring import Scorer

    whole, calls = Scorer.token_logps, []

    def runs_out(self: Scorer, model: Any, forest: Any) -> torch.Tensor:
        calls.append(forest)
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return whole(self, model, forest)

    monkeypatch.setattr(Scorer, "token_logps", runs_out)
    with pytest.raises(TrainingError) as stopped:
        run_training(run_config(tmp_path, reference_cache="off", max_tokens_per_forest=400), lambda line: None)
    said = str(stopped.value)
    assert said.startswith(
        "out of memory (CUDA out of memory. Tried to allocate 3.00 GiB.): forests of 400 tokens are planned at"
    )
    assert "Set max_tokens_per_forest: 256; docs/memory.md has more" in said
    assert calls and not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_largest_pair_itself_is_answered_with_a_setting_that_takes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, 12)
    config = run_config(tmp_path, shipped_config("qwen3-8b"), load_in_4bit=True, optim="adamw_torch")
    config.check_memory = False
    with pytest.raises(TrainingError, match=r"out of memory \(.*Set (optim|activation_offload|gradient|lora)"):
        from transformers import AutoConfig

        from dpo_engine.train.memory import plan_run

        with answered(plan_run(config, AutoConfig.from_pretrained(config.model), [])):
            raise torch.OutOfMemoryError("no")


def test_the_hosts_own_words_are_known_and_other_errors_go_through() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**52)
    assert is_out_of_memory(failed.value) and is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError, match="shapes"), answered("none"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(TrainingError, match=r"there is no plan \(none\)\. Set a smaller max_tokens_per_forest"):
        with answered("none"):
            torch.empty(2**52)
