"""Does a TRL script, its import changed, log what TRL logs?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import dpo_engine
from support.trl_scripts import CONVERSATIONS, ENDS_WITH_TURN, STANDARD, saved_model, script_log

COMPARED = (
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
ABSENT = ("entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected")
"""What TRL 1.16 logs beside them."""


@pytest.fixture(scope="module")
def trl() -> Any:
    module = pytest.importorskip("trl", reason="TRL is not installed: make trl installs it")
    if tuple(map(int, module.__version__.split(".")[:2])) < (1, 16):
        pytest.skip(f"TRL {module.__version__} is installed; the comparison is with 1.16")
    return module


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("chat"), chat_template=ENDS_WITH_TURN)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("plain"), adds_bos=True)


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ("chat", {}),
        ("plain", {"loss_type": "ipo"}),
        ("chat", {"ld_alpha": 0.3, "beta": 0.5}),
        ("chat", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("plain", {"max_length": 12, "truncation_mode": "keep_start", "precompute_ref_log_probs": True}),
        ("chat", {"lora": True, "learning_rate": 1e-2}),
    ],
    ids=["sigmoid", "ipo", "ld_alpha", "accumulated", "cut", "lora"],
)
def test_losses_and_metrics_are_those_of_trl(
    rows: str, changes: dict[str, Any], trl: Any, chat_model: str, plain_model: str, tmp_path: Path
) -> None:
    model, data = {"chat": (chat_model, CONVERSATIONS), "plain": (plain_model, STANDARD)}[rows]
    more = dict(changes)
    if more.pop("lora", False):
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM")
    theirs = script_log(trl, tmp_path / "trl", model, data, **more)
    ours = script_log(dpo_engine, tmp_path / "ours", model, data, **more)
    steps = [[entry for entry in log if "loss" in entry] for log in (theirs, ours)]
    assert len(steps[0]) == len(steps[1]) == 5
    for step, (entry, other) in enumerate(zip(*steps, strict=True), start=1):
        for name in COMPARED:
            if (
                name == "rewards/accuracies" and step <= 2
            ):  # every pair is a tie until a step was taken: half a correct one here
                assert (entry[name], other[name]) == (0.0, 0.5)
                continue
            assert other[name] == pytest.approx(entry[name], rel=1e-4, abs=2e-6), f"step {step}: {name}"
    evaluated = [next(entry for entry in log if "eval_loss" in entry) for log in (theirs, ours)]
    for name in COMPARED[4:] + ("loss",):
        name = f"eval_{name}"
        assert evaluated[1][name] == pytest.approx(evaluated[0][name], rel=1e-4, abs=2e-6), name
    assert {name for name in steps[0][0] if name not in steps[1][0]} == set(ABSENT)
