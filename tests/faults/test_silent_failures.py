"""Does a whole run compute what it says, where trainers are known to have gone wrong without a word?

docs/silent-failures.md lists the failures and which test holds each; those that other tests hold already are not repeated here.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.errors import ConfigError, DataError
from support.gradients import GradientRecorder, assert_same_gradients
from support.naive_dpo import completion_logps, train_naively
from support.small_tokenizers import small_tokenizer
from support.tiny_models import tiny_model
from support.tiny_pairs import VOCABULARY, random_pairs, tiny_llama

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
START = math.log(2)


def run_of(
    folder: Path,
    model: Any,
    data: Any = None,
    *,
    ref_model: Any = None,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[DPOTrainer, GradientRecorder]:
    """A run of three steps of four pairs; `changes` are config keys, `more` arguments of the trainer."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "max_tokens_per_forest": 400,
        "reference_cache": "off",
    }
    seen = GradientRecorder()
    run = DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=DPOConfig(**(settings | changes)),
        train_dataset=random_pairs(12) if data is None else data,
        callbacks=[seen],
        **(more or {}),
    )
    return run, seen


def logged(run: DPOTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def naive_margins(policy: Any, reference: Any, pairs: Sequence[Any], beta: float = 0.1) -> Tensor:
    """(B,) of models in eval mode, without dropout."""
    with torch.no_grad():
        its = completion_logps(reference, pairs)
    ratios = completion_logps(policy, pairs) - its
    return beta * (ratios[0::2] - ratios[1::2])


def naive_loss(policy: Any, reference: Any, pairs: Sequence[Any]) -> float:
    with torch.no_grad():
        return -logsigmoid(naive_margins(policy, reference, pairs)).mean().item()


# ---- the loss ----


def test_label_smoothing_changes_loss_and_gradient_as_conservative_dpo_says(tmp_path: Path) -> None:
    data = random_pairs(4, seed=3)
    policy, reference = tiny_llama(seed=1), tiny_llama(seed=2)
    found = {}
    for smoothing in (0.0, 0.2):
        naive = copy.deepcopy(policy)
        margins = naive_margins(naive, reference, data.trees)
        expected = (-(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)).mean()
        expected.backward()
        gradients = {name: parameter.grad for name, parameter in naive.named_parameters()}
        run, seen = run_of(
            tmp_path, copy.deepcopy(policy), data, ref_model=reference, label_smoothing=smoothing, max_steps=1
        )
        run.train()
        assert logged(run)[0] == pytest.approx(expected.item(), rel=1e-5)
        assert_same_gradients(seen.steps, [gradients])
        found[smoothing] = seen.steps[0]["lm_head.weight"], logged(run)[0]
    assert abs(found[0.0][1] - found[0.2][1]) > 1e-2
    assert (found[0.0][0] - found[0.2][0]).norm() > 0.05 * found[0.0][0].norm()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_step_of_four_pairs_is_the_same_however_it_is_accumulated(tmp_path: Path, lora: bool) -> None:
    data = random_pairs(8, seed=8, longest=40)
    lengths = [len(ids) for tree in data.trees for ids in tree.completions]
    assert max(lengths) > 5 * min(lengths)
    start = get_peft_model(tiny_llama(), LORA) if lora else tiny_llama()
    naive = train_naively(copy.deepcopy(start), [data.trees[i : i + 4] for i in (0, 4)], beta=0.1, lr=1e-2)
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        run, seen = run_of(tmp_path, copy.deepcopy(start), data, max_steps=2, **changes)
        run.train()
        assert logged(run) == pytest.approx(naive.losses, rel=1e-5), changes
        assert_same_gradients(seen.steps[:1], naive.gradients[:1])
    assert abs(naive.losses[1] - START) > 1e-3


@pytest.mark.parametrize("name", ["Gemma2", "Cohere", "Granite"])
def test_a_head_that_scales_or_caps_its_logits_trains_as_by_its_own_logits(tmp_path: Path, name: str) -> None:
    data = random_pairs(12)
    model = tiny_model(name, vocab_size=VOCABULARY, attn_implementation="eager")
    plain = copy.deepcopy(model)
    for key, without in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        if hasattr(plain.config, key):
            setattr(plain.config, key, without)
    if hasattr(plain, "logit_scale"):
        plain.logit_scale = 1.0
    if hasattr(plain, "logits_scaling"):
        plain.logits_scaling = 1.0
    with torch.no_grad():
        logps, dropped = completion_logps(model, data.trees[:4]), completion_logps(plain, data.trees[:4])
    assert (logps - dropped).abs().min() > 1e-2, "a transform left out would not show"
    naive = train_naively(copy.deepcopy(model), [data.trees[i : i + 4] for i in (0, 4, 8)], beta=0.1, lr=1e-2)
    run, seen = run_of(tmp_path, model, data)
    run.train()
    assert logged(run) == pytest.approx(naive.losses, rel=1e-4)
    assert abs(naive.losses[2] - START) > 1e-3
    assert logged(run, "logps/chosen")[0] == pytest.approx(logps[0::2].mean().item(), rel=1e-5)
    for mine, its in ((seen.steps[0][key], naive.gradients[0][key]) for key in naive.gradients[0]):
        assert (mine - its).norm() <= 1e-4 * max(its.norm().item(), 1e-3)


# ---- the reference: dropout ----


class PutsInTrainMode(TrainerCallback):
    """What a user's code may do at any time."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.model.train()


DROPOUT: dict[str, Any] = {
    "functional": lambda rate: tiny_llama(attention_dropout=rate),
    "modules": lambda rate: tiny_model(
        "GPT2", vocab_size=VOCABULARY, n_positions=256, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate
    ),
}


@pytest.mark.parametrize("asked", [{}, {"precompute_ref_log_probs": True}, {"reference_cache": "cache"}], ids=str)
@pytest.mark.parametrize("kind", DROPOUT)
def test_a_reference_with_dropout_says_what_it_says_without_whatever_its_mode(
    tmp_path: Path, kind: str, asked: dict[str, Any]
) -> None:
    if "reference_cache" in asked:
        asked = {"reference_cache": str(tmp_path / "cache")}
    reference = DROPOUT[kind](0.5).train()
    with torch.no_grad():
        assert not torch.equal(*(completion_logps(reference, random_pairs(2).trees) for _ in range(2)))
    run, _ = run_of(tmp_path, DROPOUT[kind](0.0), ref_model=reference, **asked)
    run.add_callback(PutsInTrainMode(reference))
    reference.train()
    run.train()
    without, _ = run_of(tmp_path, DROPOUT[kind](0.0), ref_model=DROPOUT[kind](0.0))
    without.train()
    assert logged(run)[0] == pytest.approx(START, abs=1e-6)
    assert logged(run) == pytest.approx(logged(without), rel=1e-5)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_evaluation_amid_training_is_without_dropout_in_policy_and_reference(tmp_path: Path, lora: bool) -> None:
    held_out = random_pairs(5, seed=4)
    base = tiny_llama(attention_dropout=0.5)
    model = copy.deepcopy(base).train()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    run, _ = run_of(tmp_path, model, eval_strategy="steps", eval_steps=1, more={"eval_dataset": held_out})
    assert run.evaluate()["eval_loss"] == pytest.approx(START, abs=1e-7)
    modes, expected = [], []

    class Judges(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            policy = copy.deepcopy(model).eval()
            expected.append(naive_loss(policy, base.eval(), held_out.trees))

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            modes.append(all(module.training for module in model.modules()))

    run.add_callback(Judges())
    run.train()
    expected.append(naive_loss(copy.deepcopy(model).eval(), base.eval(), held_out.trees))
    assert logged(run, "eval_loss") == pytest.approx(expected[1:], rel=1e-5)
    assert abs(expected[-1] - START) > 1e-4
    assert modes == [True] * 3  # dropout is on again in every step


@pytest.mark.parametrize("asked", [{"precompute_ref_log_probs": True}, {"reference_cache": "cache"}], ids=str)
def test_what_is_known_of_a_reference_under_dropout_is_without_it(tmp_path: Path, asked: dict[str, Any]) -> None:
    if "reference_cache" in asked:
        asked = {"reference_cache": str(tmp_path / "cache")}
    base = tiny_llama(attention_dropout=0.5).eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)).train()
    run, _ = run_of(tmp_path, model, **asked)
    run.know_reference()
    sums = [[logps.sum().item() for logps in tree.reference_token_logps] for tree in run.train_dataset]
    with torch.no_grad():
        expected = completion_logps(base, random_pairs(12).trees).view(-1, 2)
    torch.testing.assert_close(torch.tensor(sums), expected, rtol=1e-5, atol=1e-4)


# ---- the reference: the model as it is in memory ----


def test_a_model_changed_in_memory_by_one_number_is_the_reference_and_no_cached_row_is_believed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "model")
    data = random_pairs(12)
    label = data.trees[0].completions[0][0]
    first, _ = run_of(tmp_path, get_peft_model(_loaded(tmp_path), LORA), reference_cache=str(tmp_path / "cache"))
    first.know_reference()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[label, 3] += 2.0
        expected = completion_logps(model, data.trees)
    run, _ = run_of(tmp_path, get_peft_model(model, LORA), reference_cache=str(tmp_path / "cache"))
    run.train()
    assert run.references.filled.reused == 0 and run.references.filled.computed == 12
    sums = [logps.sum().item() for tree in run.train_dataset for logps in tree.reference_token_logps]
    assert sums == pytest.approx(expected.tolist(), rel=1e-5)
    assert logged(run)[0] == pytest.approx(START, abs=1e-6)


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "precomputed"])
@pytest.mark.parametrize("whose", ["under the adapters", "second model"])
def test_a_reference_changed_between_two_runs_of_one_trainer_is_asked_again(
    tmp_path: Path, whose: str, cached: bool
) -> None:
    data = random_pairs(12)
    label = data.trees[0].completions[0][0]
    second = tiny_llama(seed=2) if whose == "second model" else None
    model = tiny_llama() if second is not None else get_peft_model(tiny_llama(), LORA)
    asked = {"reference_cache": str(tmp_path / "cache")} if cached else {"precompute_ref_log_probs": True}
    run, _ = run_of(tmp_path, model, data, ref_model=second, learning_rate=0.0, **asked)
    run.train()
    reference = model.get_base_model() if second is None else second
    with torch.no_grad():
        reference.lm_head.weight[label] *= 1.5  # one row of all, and none of the others
        plain = tiny_llama() if second is None else tiny_llama(seed=2)
        plain.lm_head.weight[label] *= 1.5
        changed, policy = completion_logps(plain, data.trees), completion_logps(model, data.trees)
    run.train()
    sums = [logps.sum().item() for tree in run.train_dataset for logps in tree.reference_token_logps]
    assert sums == pytest.approx(changed.tolist(), rel=1e-5)
    ratios = 0.1 * (policy - changed)
    expected = -logsigmoid(ratios[0::2] - ratios[1::2])[:4].mean().item()
    assert logged(run)[0] == pytest.approx(expected, abs=1e-5)


# ---- the reference: adapters ----


def test_a_reference_pass_that_breaks_off_leaves_adapters_modes_and_gradients_as_they_were(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2))
    model.add_adapter("second", LORA)
    model.set_adapter("second")
    run, _ = run_of(tmp_path, model, precompute_ref_log_probs=True)
    model.train()

    def state() -> list[Any]:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        return [
            model.active_adapter,
            list(model.active_adapters),
            [list(layer.active_adapters) for layer in layers],
            [layer.disable_adapters for layer in layers],
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
        ]

    before, inside = state(), []

    def breaks(*_: Any) -> None:
        inside.append(state())
        raise KeyboardInterrupt

    hook = model.get_base_model().get_decoder().register_forward_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        run.know_reference()
    hook.remove()
    assert state() == before
    assert all(inside[0][3]) and not any(inside[0][4])  # it did break off with adapters and dropout off
    run.train()
    assert state() == before
    assert logged(run)[0] == pytest.approx(START, abs=1e-6)
    assert all(not bool(p.any()) for n, p in model.named_parameters() if "lora_B.default" in n)
    assert all(bool(p.any()) for n, p in model.named_parameters() if "lora_B.second" in n)


@pytest.mark.parametrize("asked", [{}, {"precompute_ref_log_probs": True}, {"reference_cache": "cache"}], ids=str)
def test_what_the_reference_said_is_used_and_the_loss_moves(tmp_path: Path, asked: dict[str, Any]) -> None:
    if "reference_cache" in asked:
        asked = {"reference_cache": str(tmp_path / "cache")}
    data = random_pairs(12)
    policy, reference = tiny_llama(seed=1), tiny_llama(seed=2)
    run, _ = run_of(tmp_path, policy, data, ref_model=reference, learning_rate=0.0, **asked)
    run.train()
    expected = [naive_loss(policy, reference, data.trees[i : i + 4]) for i in (0, 4, 8)]
    assert logged(run) == pytest.approx(expected, rel=1e-5)
    assert all(abs(loss - START) > 1e-3 for loss in expected)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_log_probs_kept_by_a_run_of_dpo_are_weighed_anew_by_one_of_ld_dpo(tmp_path: Path, alpha: float) -> None:
    found = []
    for changes in ({}, {"method": "ld_dpo", "ld_alpha": alpha}, {"method": "ld_dpo", "ld_alpha": alpha, "live": True}):
        cache = "off" if changes.pop("live", False) else str(tmp_path / "cache")
        run, _ = run_of(tmp_path, tiny_llama(seed=1), ref_model=tiny_llama(seed=2), reference_cache=cache, **changes)
        run.train()
        found.append(logged(run))
    assert found[1] == pytest.approx(found[2], rel=1e-5)
    assert found[1] != pytest.approx(found[0], rel=1e-3)


# ---- tokens ----


def texts(long: int = 0) -> list[dict[str, str]]:
    rows = [
        {"prompt": f"where is the {a}? ", "chosen": f"the {a} is on the mat.", "rejected": f"the {b} ran after it."}
        for a in ("cat", "dog", "man", "hat")
        for b in ("cat", "dog", "man")
    ]
    return [{**row, "prompt": row["prompt"] * (30 if number < long else 1)} for number, row in enumerate(rows)]


def text_run(folder: Path, tokenizer: Any, data: Any = None, **changes: Any) -> DPOTrainer:
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    data = texts() if data is None else data
    run, _ = run_of(folder, model, data, more={"processing_class": tokenizer}, chat_template="off", **changes)
    return run


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = small_tokenizer()
    assert found.pad_token_id == found.eos_token_id
    return found


def test_the_end_token_counts_although_it_is_the_padding_token(tmp_path: Path, tokenizer: Any) -> None:
    run = text_run(tmp_path, tokenizer, share_prompt="off", learning_rate=0.0)
    trees = run.train_dataset.trees[:4]
    assert all(ids[-1] == tokenizer.pad_token_id for tree in trees for ids in tree.completions)
    with torch.no_grad():
        expected = completion_logps(run.model, trees)[0::2].mean().item()
        masked = [
            type(tree)(prompt_ids=tree.prompt_ids, completions=tuple(ids[:-1] for ids in tree.completions), origin="")
            for tree in trees
        ]
        by_id = completion_logps(run.model, masked)[0::2].mean().item()
    run.train()
    assert abs(expected - by_id) > 1e-2
    assert logged(run, "logps/chosen")[0] == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    right = text_run(tmp_path, tokenizer, share_prompt="off")
    tokenizer_left = copy.deepcopy(tokenizer)
    tokenizer_left.padding_side = tokenizer_left.truncation_side = "left"
    left = text_run(tmp_path, tokenizer_left, share_prompt="off")
    assert left.train_dataset.trees == right.train_dataset.trees
    right.train()
    left.train()
    assert logged(left) == logged(right) and abs(logged(left)[2] - START) > 1e-4


def test_rows_that_a_data_set_loses_are_announced_with_their_number_and_reason(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = texts(long=3)
    rows.append({"prompt": "a", "chosen": "the cat " * 40 + "sat", "rejected": "the cat " * 40 + "ran"})
    run = text_run(tmp_path, tokenizer, rows, max_length=40)
    assert len(run.train_dataset) == 9
    (said,) = [record for record in caplog.records if "are used; left out" in record.message]
    assert said.levelno == logging.WARNING
    assert said.message.startswith("train_dataset: 9 of 13 rows are used; left out: 3 completion lost by truncation (")
    assert "1 identical after truncation (train_dataset:row 13)" in said.message
    caplog.clear()
    text_run(tmp_path, tokenizer, max_length=40)
    assert "left out" not in caplog.text


def test_rows_that_a_stream_loses_are_announced_when_it_was_trained_on(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import Dataset

    rows = Dataset.from_list(texts(long=3)).to_iterable_dataset()
    text_run(tmp_path, tokenizer, rows, max_length=40, max_steps=2, per_device_train_batch_size=5).train()
    assert "train_dataset: " in caplog.text and "3 completion lost by truncation (train_dataset:row 1" in caplog.text


def test_a_data_set_of_which_no_row_fits_is_refused_instead_of_trained_on_in_vain(
    tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=r"no usable row is left of 12: 12 completion lost by truncation"):
        text_run(tmp_path, tokenizer, texts(long=12), max_length=40)


# ---- options ----


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"beta": 0.0}, "a finite number above 0"),
        ({"beta": -0.1}, "a finite number above 0"),
        ({"beta": math.inf}, "a finite number above 0"),
        ({"beta": math.nan}, "a finite number above 0"),
        ({"label_smoothing": 0.5}, "a finite number of at least 0 and below 0.5"),
        ({"label_smoothing": -0.1}, "a finite number of at least 0 and below 0.5"),
        ({"label_smoothing": math.nan}, "a finite number of at least 0 and below 0.5"),
        ({"method": "ipo", "ipo_reduction": "average"}, "one of mean, sum"),
        ({"method": "ipo", "label_smoothing": 0.1}, "the method ipo does not use it"),
        ({"ipo_reduction": "sum"}, "the method dpo does not use it"),
        ({"learning_rate": math.inf}, "a finite number of at least 0"),
        ({"learning_rate": math.nan}, "a finite number of at least 0"),
    ],
    ids=str,
)
def test_an_option_that_makes_no_loss_is_refused_with_what_is_expected(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=f"(is out of range; expected|is given, but).*{expected}"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **changes)
