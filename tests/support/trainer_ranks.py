"""What do two ranks of the trainer make of a data set that neither their number nor the forests divide evenly?

`run` starts the ranks as processes (gloo, on the CPU); each trains a case and keeps the gradients of every step, the losses
and what evaluation said.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.reference.filling import Filled
from support.method_trees import trees_for
from support.rank_processes import start_ranks
from support.tiny_pairs import tiny_llama

RANKS, PAIRS, HELD_OUT, STEPS = 2, 10, 7, 4
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
HEAD_LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")

CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora": True},
    "lora on the head": {"lora": True},
    "full": {"lora": False, "reference_cache": "off"},
    "full with a frozen head": {"lora": False, "reference_cache": "off", "label_smoothing": 0.2},
    "shuffled, evaluated first": {"lora": True, "train_sampling_strategy": "random", "seed": 3},
    "bco": {"lora": True, "method": "bco", "beta": 0.5},
    "kto": {"lora": True, "method": "kto"},
    "aot": {"lora": True, "method": "aot", "beta": 0.5},
    "mixture": {"lora": True, "method": "dpo+bco+sft", "loss_weights": [0.8, 0.2, 1.0], "beta": 0.5},
    "plackett_luce": {"lora": True, "method": "plackett_luce"},
    "bco of ranked lists": {"lora": True, "method": "bco", "beta": 0.5},
    "tdpo": {"lora": True, "method": "tdpo", "reference_cache": "off"},
    "tr_dpo": {"lora": True, "method": "tr_dpo", "ref_model_sync_steps": 2, "reference_cache": "off"},
    "known reference": {"lora": True, "precompute_ref_log_probs": True, "reference_cache": "off"},
    "reference in every step": {"lora": True, "reference_cache": "off"},
    "weights on the first rank only": {"lora": True, "reference_cache": "auto"},
    "fully sharded": {"lora": False, "reference_cache": "off"},
    "fully sharded bco": {"lora": False, "method": "bco", "beta": 0.5},
    "fully sharded lora": {"lora": True},
    "fully sharded kto": {"lora": False, "method": "kto"},
}


@dataclass
class Run:
    """What one process saw."""

    gradients: list[dict[str, torch.Tensor]]
    losses: list[float]
    margins: list[float]
    held_out: dict[str, float]
    sharded: bool
    """Whether every gradient was a part of a whole one."""
    forests: list[int]
    """Forests with trees of each step, on this rank."""
    reference: Filled
    """Where its reference log-probs came from."""
    reduced: list[list[bool]]
    """For each step, whether each of its backwards added up gradients over replicas."""


def train(folder: Path, case: str, ranks: int) -> Run:
    """Two epochs of ten pairs, eight pairs a step whatever the number of ranks, then an evaluation on seven."""
    settings = dict(CASES[case])
    lora = settings.pop("lora")
    args = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        max_tokens_per_forest=60,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **({"train_sampling_strategy": "sequential", "reference_cache": str(folder / "reference")} | settings),
    )
    seen = _Recorder()
    # Loaders that spare memory leave other ranks with anything, until the first one's weights are sent round.
    model = tiny_llama(seed=int(case.startswith("weights on") and os.environ.get("RANK") == "1"))
    model.lm_head.requires_grad_("frozen head" not in case)
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=trees_for(args.method, PAIRS, seed=0, ranked="lists" in case),
        eval_dataset=trees_for(args.method, HELD_OUT, seed=5, ranked="lists" in case),
        peft_config=(HEAD_LORA if "on the head" in case else LORA) if lora else None,
        callbacks=[seen],
    )
    if "evaluated first" in case:
        trainer.evaluate()
    if ranks > 1 and case.startswith("fully sharded"):
        _shard(trainer)
    forests: list[int] = []
    reduced: list[list[bool]] = []
    step, backward = trainer.training_step, trainer.accelerator.backward

    def seen_backward(loss: Any, **more: Any) -> None:
        reduced[-1].append(getattr(trainer.model_wrapped, "require_backward_grad_sync", True))
        backward(loss, **more)

    trainer.accelerator.backward = seen_backward

    def counted(model: Any, inputs: Any, *more: Any) -> Any:
        if inputs.forests or inputs.idle:
            forests.append(len(inputs.forests))
            reduced.append([])
        return step(model, inputs, *more)

    trainer.training_step = counted  # type: ignore[method-assign]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    held_out = {name: value for name, value in trainer.evaluate().items() if "reward" in name or name == "eval_loss"}
    return Run(
        gradients=seen.steps,
        losses=[entry["loss"] for entry in logs],
        margins=[entry.get("rewards/margins", 0.0) for entry in logs],
        held_out=held_out,
        sharded=seen.sharded,
        forests=forests,
        reference=trainer.references.filled,
        reduced=reduced,
    )


def _shard(trainer: DPOTrainer) -> None:
    """Send the trainer down accelerate's FSDP2 path, which accelerate itself takes with accelerators only."""
    from accelerate import FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does itself
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    trainer.is_fsdp_enabled = True


class _Recorder(TrainerCallback):
    """Every gradient just before each optimiser step, whole."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.sharded = False

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.sharded = all(isinstance(gradient, DTensor) for gradient in grads.values())
        self.steps.append(
            {
                name.removeprefix("module."): (g.full_tensor() if isinstance(g, DTensor) else g).detach().clone()
                for name, g in grads.items()
            }
        )


def run(folder: Path, cases: list[str]) -> dict[str, list[Run]]:
    """Every case on two ranks; one start of the processes for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(_rank, (str(folder), cases, port), RANKS)
    return {
        case: [torch.load(folder / f"{case}-{rank}.pt", weights_only=False) for rank in range(RANKS)] for case in cases
    }


def _rank(rank: int, folder: str, cases: list[str], port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",  # a container's own name need not resolve
        "ACCELERATE_USE_CPU": "true",
    }
    for case in cases:
        AcceleratorState._reset_state()  # a case may have changed it
        if PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        found = train(Path(folder) / case, case, RANKS)
        torch.save(found, f"{folder}/{case}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    print({case: [len(run.gradients) for run in runs] for case, runs in run(Path(sys.argv[1]), sys.argv[2:]).items()})
