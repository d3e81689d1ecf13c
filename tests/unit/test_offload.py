"""Does offloading move the input of every checkpointed layer and nothing else, and change no gradient?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.batch import build_forest
from dpo_engine.errors import ConfigError
from dpo_engine.model.adapters import add_lora
from dpo_engine.model.layout import prepare_model
from dpo_engine.model.scoring import forest_token_logps
from dpo_engine.train.budget import bytes_per_token
from dpo_engine.train.offload import Offloader, checkpoints_offloaded
from support.tiny_pairs import random_pairs, tiny_llama

CPU = torch.device("cpu")
LAYERS, WIDTH = 3, 64
DATA = random_pairs(8)


def policy(lora: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = tiny_llama(hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=LAYERS).to(dtype)
    if lora:
        model = add_lora(model, r=4, head=True)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: Any, offloader: Offloader | None, **kind: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Of the model, whose layers are checkpointed; and the tokens of the forest."""
    forest = build_forest(DATA.trees, prepare_model(model).name)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False} | kind)
    with checkpoints_offloaded(model, offloader):
        logps = forest_token_logps(model, forest)
    logps.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, forest.tokens


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [True, False])
def test_one_tensor_per_checkpointed_layer_moves_and_gradients_keep_every_bit(
    lora: bool, dtype: torch.dtype, reentrant: bool
) -> None:
    offloader = Offloader(CPU, least_bytes=1024)
    expected, _ = gradients(policy(lora, dtype), None, use_reentrant=reentrant)
    found, tokens = gradients(policy(lora, dtype), offloader, use_reentrant=reentrant)
    assert expected.keys() == found.keys() and len(found) > 2 * LAYERS
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert offloader.moved == LAYERS
    assert offloader.moved_bytes == tokens * WIDTH * dtype.itemsize * LAYERS


def test_it_is_the_moved_copy_that_the_layers_are_computed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = gradients(policy(), None)
    move = Offloader.move

    def spoil(self: Offloader, tensor: torch.Tensor) -> Any:
        moved = move(self, tensor)
        moved.host.zero_()
        return moved

    monkeypatch.setattr(Offloader, "move", spoil)
    found, _ = gradients(policy(), Offloader(CPU, least_bytes=1024))
    layer = "layers.1.mlp.up_proj.lora_A.default.weight"
    (name,) = [name for name in expected if name.endswith(layer)]
    assert not torch.allclose(expected[name], found[name])


def test_what_is_small_and_what_is_a_parameter_stays() -> None:
    offloader = Offloader(CPU, least_bytes=10**9)
    gradients(policy(), offloader)
    assert offloader.moved == 0
    weight = torch.nn.Parameter(torch.ones(512, 512))
    assert not Offloader(CPU).takes(weight) and not Offloader(CPU).takes(weight[2:])
    assert Offloader(CPU).takes(weight * 2) and not Offloader(CPU).takes((weight * 2).detach())
    assert not Offloader(CPU).takes((weight * 2)[:10]) and not Offloader(torch.device("meta")).takes(weight * 2)


def test_models_get_their_own_checkpointing_back_and_no_graph_no_copies() -> None:
    model = policy()
    gradients(model, None)
    before = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    offloader = Offloader(CPU, least_bytes=1)
    with pytest.raises(KeyboardInterrupt), checkpoints_offloaded(model, offloader), torch.no_grad():
        forest_token_logps(model, build_forest(DATA.trees, "shared"))
        raise KeyboardInterrupt
    assert [vars(module).get("_gradient_checkpointing_func") for module in model.modules()] == before
    assert offloader.moved == 0


def settings(folder: Path, **changes: Any) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder), use_cpu=True, max_steps=2, per_device_train_batch_size=4, save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, reference_cache="off", logging_steps=1,
        train_sampling_strategy="sequential", **changes,
    )  # fmt: skip


def test_without_checkpointing_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"activation_offload=True .* gradient_checkpointing: true"):
        settings(tmp_path, activation_offload=True)


def test_on_a_cpu_there_is_nothing_to_do_and_a_line_says_so(tmp_path: Path) -> None:
    args = settings(tmp_path, activation_offload=True, gradient_checkpointing=True)
    trainer = DPOTrainer(model=policy(), args=args, train_dataset=DATA)
    assert "activation_offload: nothing to do on cpu, where activations are in host memory already" in trainer.lines()
    assert trainer.scorer.offloader is None


def test_the_trainer_moves_every_forests_checkpoints(tmp_path: Path) -> None:
    losses = []
    for offloader in (None, Offloader(CPU, least_bytes=1)):
        args = settings(tmp_path, activation_offload=True, gradient_checkpointing=True, max_tokens_per_forest=60)
        trainer = DPOTrainer(model=policy(), args=args, train_dataset=DATA)
        trainer.scorer.offloader = offloader
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and offloader is not None
    forests = sum(len(trainer.packed(DATA.trees[i : i + 4]).forests) for i in (0, 4))
    assert offloader.moved == LAYERS * forests and forests > 2


def test_a_token_takes_less_of_the_device_where_inputs_wait_elsewhere() -> None:
    model = policy(lora=False)
    prepare_model(model)
    kept, moved = (
        bytes_per_token(model, "shared", checkpointing=True, layers=LAYERS, device=CPU, offloaded=offloaded)
        for offloaded in (False, True)
    )
    assert kept - moved == WIDTH * 4 * (LAYERS - 2)
