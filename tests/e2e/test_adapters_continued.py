"""Does an adapter train on, with a frozen copy of itself as the reference, or become part of the base of another?"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftModel
from safetensors.torch import load_file

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.errors import ConfigError, ModelError
from dpo_engine.model.adapters import REFERENCE, add_lora, reference_of
from dpo_engine.model.existing_adapters import continue_adapter, merge_adapter
from dpo_engine.model.loading import load_model
from dpo_engine.reference.space import reference_space
from dpo_engine.train.run import TrainConfig
from support.naive_dpo import completion_logps
from support.tiny_pairs import random_pairs, tiny_llama

DATA = random_pairs(16)


def noisy(policy: Any, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    return policy


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is not zero, r=4, on the layers and the head of `tiny_llama()`."""
    path = tmp_path_factory.mktemp("adapter")
    noisy(add_lora(tiny_llama(), r=4, alpha=8, head=True)).save_pretrained(path)
    return path


def trained(output: Path, policy: Any, resume: bool = False, **changes: Any) -> DPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True,
        "dataloader_pin_memory": False, "max_tokens_per_forest": 120, "reference_cache": "off",
    }  # fmt: skip
    run = DPOTrainer(model=policy, args=DPOConfig(**(settings | changes)), train_dataset=DATA)
    run.train(resume_from_checkpoint=resume or None)
    return run


def logged(run: DPOTrainer) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["rewards/margins"]) for entry in run.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module")
def continued(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    output = tmp_path_factory.mktemp("continued")
    run = trained(output, continue_adapter(tiny_llama(), adapter))
    run.save_model(str(output / "final"))
    return run


def test_a_run_starts_at_its_frozen_copy_which_stays_what_it_was(adapter: Path, continued: DPOTrainer) -> None:
    assert logged(continued)[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(continued)[-1][0] != pytest.approx(math.log(2), abs=1e-2)
    first = PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    with torch.no_grad():
        wanted, base = completion_logps(first, DATA.trees), completion_logps(tiny_llama(), DATA.trees)
        assert not torch.allclose(wanted, base, atol=1e-2)
        with reference_of(continued.model) as reference:
            torch.testing.assert_close(completion_logps(reference, DATA.trees), wanted)
        assert not torch.allclose(completion_logps(continued.model, DATA.trees), wanted, atol=1e-2)
    assert continued.model.active_adapters == ["default"]
    flags = {name: p.requires_grad for name, p in continued.model.named_parameters() if "lora_" in name}
    assert set(flags.values()) == {True, False} and all(
        flag == (f".{REFERENCE}." not in n) for n, flag in flags.items()
    )


def test_the_reference_puts_everything_back_also_after_an_exception(adapter: Path) -> None:
    policy = continue_adapter(tiny_llama(), adapter).train()
    noisy(policy, seed=9)

    def state() -> list[Any]:
        return [
            [module.training for module in policy.modules()], [p.requires_grad for p in policy.parameters()],
            policy.active_adapters, policy.base_model.active_adapter,
        ]  # fmt: skip

    before = state()
    with pytest.raises(KeyboardInterrupt), reference_of(policy):
        assert policy.active_adapters == [REFERENCE]
        raise KeyboardInterrupt
    assert state() == before
    with torch.no_grad(), policy.disable_adapter():
        off = completion_logps(policy, DATA.trees[:2])
        with reference_of(policy):
            pass
        assert torch.equal(completion_logps(policy, DATA.trees[:2]), off)


def test_what_is_saved_is_the_trained_adapter_alone_in_the_ordinary_place(continued: DPOTrainer) -> None:
    output = Path(str(continued.args.output_dir))
    for folder in (output / "final", output / "checkpoint-4"):
        assert not (folder / REFERENCE).exists()
        assert not any(f".{REFERENCE}" in name for name in load_file(folder / "adapter_model.safetensors"))
        again = PeftModel.from_pretrained(tiny_llama(), folder)
        mine = {n: w for n, w in weights(continued.model).items() if REFERENCE not in n}
        assert mine.keys() == weights(again).keys() and all(torch.equal(mine[n], w) for n, w in weights(again).items())
    assert REFERENCE in continued.model.peft_config


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_began_by_changing_the_model_is_not_continued(adapter: Path, tmp_path: Path, init: str) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "begun"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(ModelError, match="began by changing the model's own weights"):
        continue_adapter(tiny_llama(), folder)


def test_a_resumed_run_is_the_same_run_and_takes_its_reference_from_the_folder(
    adapter: Path, continued: DPOTrainer, tmp_path: Path
) -> None:
    shutil.copytree(Path(str(continued.args.output_dir)) / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = trained(tmp_path, continue_adapter(tiny_llama(), adapter), resume=True)
    assert logged(resumed) == logged(continued)
    ours, theirs = weights(resumed.model), weights(continued.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_address_of_a_reference_is_of_its_adapter_whatever_the_policy_is(adapter: Path, tmp_path: Path) -> None:
    def address(run: DPOTrainer) -> str:
        run.know_reference()
        assert run.references.space is not None
        return run.references.space.address

    def run_of(policy: Any) -> DPOTrainer:
        return trained(
            tmp_path / "out", policy, save_strategy="no", max_steps=2, reference_cache=str(tmp_path / "cache")
        )

    first = run_of(continue_adapter(tiny_llama(), adapter))
    assert logged(first)[0][0] == pytest.approx(math.log(2), abs=1e-6)
    again = run_of(continue_adapter(tiny_llama(), adapter))
    assert address(first) == address(again)
    assert again.references.filled.computed == 0 and again.references.filled.reused > 0
    space = reference_space(first.model.get_base_model(), with_adapters=True, adapter=REFERENCE)
    assert space.address == address(first)  # after training, too
    other = tmp_path / "other"
    noisy(add_lora(tiny_llama(), r=4, alpha=8, head=True), seed=4).save_pretrained(other)
    assert address(run_of(continue_adapter(tiny_llama(), other))) != address(first)
    assert address(run_of(add_lora(tiny_llama(), r=4, alpha=8))) != address(first)


def test_an_adapter_named_reference_is_one_also_without_being_the_start(adapter: Path, tmp_path: Path) -> None:
    policy = PeftModel.from_pretrained(tiny_llama(), adapter, is_trainable=True)
    other = tmp_path / "other"
    noisy(add_lora(tiny_llama(), r=2, alpha=8), seed=4).save_pretrained(other)
    policy.load_adapter(str(other), REFERENCE)
    run = trained(tmp_path, policy, max_steps=1, save_strategy="no")
    assert logged(run)[0][0] != pytest.approx(math.log(2), abs=1e-3)
    with torch.no_grad(), reference_of(run.model) as reference:
        wanted = completion_logps(PeftModel.from_pretrained(tiny_llama(), other), DATA.trees)
        torch.testing.assert_close(completion_logps(reference, DATA.trees), wanted)
    policy.set_adapter(REFERENCE)
    with pytest.raises(ConfigError, match="is the reference by its name, and it is active"):
        trained(tmp_path, policy)


def test_stacking_merges_and_trains_a_new_adapter_from_there(adapter: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = completion_logps(PeftModel.from_pretrained(tiny_llama(), adapter), DATA.trees)
        merged = merge_adapter(tiny_llama(), adapter)
        torch.testing.assert_close(completion_logps(merged, DATA.trees), wanted, rtol=1e-5, atol=1e-4)
    run = trained(tmp_path, add_lora(merged, r=2), save_strategy="no")
    assert logged(run)[0][0] == pytest.approx(math.log(2), abs=1e-6)
    with torch.no_grad(), reference_of(run.model) as reference:
        torch.testing.assert_close(completion_logps(reference, DATA.trees), wanted, rtol=1e-5, atol=1e-4)


def test_an_adapter_trains_on_over_four_bit_weights(adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    tiny_llama(**wide).save_pretrained(tmp_path / "model")
    noisy(add_lora(tiny_llama(**wide), r=4)).save_pretrained(tmp_path / "adapter")
    model = load_model(str(tmp_path / "model"), dtype=torch.float32, trainable=False, in_4bit=True)
    run = trained(tmp_path / "out", continue_adapter(model, tmp_path / "adapter"), gradient_checkpointing=True)
    assert logged(run)[0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_settings_that_contradict_the_adapter_are_refused(adapter: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "m", "data": "d", "output_dir": str(tmp_path), "adapter": str(adapter)}
    config = TrainConfig(**given)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout, config.use_dora) == (4, 8, 0.0, False)
    assert TrainConfig(**given, lora_r=4, use_rslora=False).lora_r == 4
    for name, value in {
        "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.1, "use_dora": True, "use_rslora": True, "lora_head": True,
        "lora_target_modules": ["q_proj"],
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name}=.* expected it left out"):
            TrainConfig(**given, **{name: value})
        if name != "lora_r":
            assert getattr(TrainConfig(**given, adapter_mode="stack", **{name: value}), name) == value
    with pytest.raises(
        ConfigError,
        match=r"adapter_mode='stack' .* load_in_4bit continue, or load_in_4bit: false: in 4 bits",
    ):
        TrainConfig(**given, adapter_mode="stack", load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"adapter_mode='merge' .* continue, stack"):
        TrainConfig(**given, adapter_mode="merge")
    with pytest.raises(ConfigError, match="a folder outside of output_dir"):
        TrainConfig(**{**given, "output_dir": str(adapter.parent)})


def test_a_folder_that_cannot_be_used_gets_one_clear_line(adapter: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str, model: Any = None) -> None:
        with pytest.raises(ModelError, match=message) as found:
            continue_adapter(model or tiny_llama(), folder)
        assert "\n" not in str(found.value) and str(folder) in str(found.value)

    refused(tmp_path / "none", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not an adapter")
    refused(adapter, r"does not fit LlamaForCausalLM \(.* is another than the model's", tiny_llama(seed=5))
    plain = tmp_path / "plain"
    noisy(add_lora(tiny_llama(), r=4, target_modules=["q_proj", "down_proj"])).save_pretrained(plain)
    refused(plain, r"does not fit LlamaForCausalLM \(.* is \(32, 4\), not \(64, 4\)", tiny_llama(hidden_size=64))
    refused(
        plain, r"does not fit LlamaForCausalLM \(.*layers\.2.* is not in the adapter", tiny_llama(num_hidden_layers=3)
    )
    refused(plain, r"does not fit LlamaForCausalLM \(.*layers\.1.* has no place", tiny_llama(num_hidden_layers=1))
    for change, message in (({"peft_type": "IA3"}, "of kind IA3"), ({"r": "many"}, "")):
        broken = shutil.copytree(adapter, tmp_path / f"broken {next(iter(change))}")
        config = json.loads((broken / "adapter_config.json").read_text()) | change
        (broken / "adapter_config.json").write_text(json.dumps(config))
        if message:
            refused(broken, message)
    cut = shutil.copytree(adapter, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes(b"short")
    refused(cut, "cannot be read")
    (cut / "adapter_model.safetensors").unlink()
    refused(cut, "has no adapter_model.safetensors")


def test_the_command_line_goes_on_from_an_adapter_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo_engine.train.run import run_training
    from support.small_tokenizers import CHATML, small_tokenizer

    tokenizer = small_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=end)
    model.save_pretrained(tmp_path / "model")
    noisy(add_lora(model, r=4)).save_pretrained(tmp_path / "adapter")
    rows = [{"prompt": f"where is {a}?", "chosen": f"{a} is here.", "rejected": f"no {a} at all."} for a in "abcdefgh"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    for mode in ("continue", "stack"):
        config = TrainConfig(
            model=str(tmp_path / "model"), data=str(tmp_path / "pairs.jsonl"), eval_data=str(tmp_path / "pairs.jsonl"),
            output_dir=str(tmp_path / mode), adapter=str(tmp_path / "adapter"), adapter_mode=mode, dtype="float32",
            max_steps=2, picture=False, save_strategy="no", disable_tqdm=True, reference_cache=str(tmp_path / "cache"),
        )  # fmt: skip
        result = run_training(config, said.append)
        assert result["held_out_loss"]["before"] == pytest.approx(math.log(2), abs=1e-5)
        assert (tmp_path / mode / "adapter_model.safetensors").is_file()
        assert (
            json.loads((tmp_path / mode / "adapter_config.json").read_text())["r"] == {"continue": 4, "stack": 16}[mode]
        )
    assert any("trains on; a frozen copy of it is the reference" in line for line in said)
    assert any("is merged into the model in memory" in line for line in said)
