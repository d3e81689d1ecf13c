"""Is the reference asked exactly once for every row, and never believed where it would say something else?

The six defects measured in another trainer's cache are replayed: a changed weighting, a changed max_length, a changed config,
needless misses, an interruption, a flipped bit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import get_peft_model

from dpo_engine import DPOTrainer, ReferenceCache, prepare_model
from dpo_engine.batch import Tree
from dpo_engine.data import PairData, TokenizedTree
from dpo_engine.errors import CacheError, ConfigError, DataError, TrainingError
from dpo_engine.reference.files import entry_files
from support.cached_runs import PAIRS, forward_calls, known, known_by_one_of_many, logged, lora, make
from support.naive_dpo import completion_logps
from support.rank_processes import start_ranks
from support.small_tokenizers import CHATML, small_tokenizer
from support.tiny_pairs import random_pairs, tiny_llama

ROWS = [
    {
        "prompt": f"where is the {a}?",
        "chosen": f"the {a} is on the mat.",
        "rejected": f"the {b} ran after the {a} and away.",
    }
    for a in ("cat", "dog", "man", "hat")
    for b in ("cat", "dog", "man")
    if a != b
]


def rope_halved(model: Any) -> Any:
    """Frequencies changed in memory, which the config does not tell."""
    model.model.rotary_emb.inv_freq.mul_(0.5)
    return model


def changed(filled: Any) -> tuple[int, int]:
    return filled.reused, filled.computed


# ---- hits ----


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-3},
        {"beta": 0.5},
        {"label_smoothing": 0.1},
        {"method": "ipo"},
        {"method": "ld_dpo", "ld_alpha": 0.3},
        {"method": "bco"},
        {"seed": 7, "data_seed": 9},
        {"num_train_epochs": 3},
        {"output_dir": "elsewhere"},
        {"rank": 8},
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"train_sampling_strategy": "random"},
        {"max_tokens_per_forest": 500},
        {"share_prompt": "off"},
        {"backend": "reference"},
        {"gradient_checkpointing": True},
        {"rank": 0},  # full fine-tuning has the same reference
    ],
    ids=str,
)
def test_what_changes_no_reference_finds_every_row(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert changed(known(tmp_path)) == (0, PAIRS)
    assert changed(known(tmp_path, **({"output_dir": str(tmp_path / "other")} | changes))) == (PAIRS, 0)


def test_rows_in_another_order_and_rows_added_are_found(tmp_path: Path) -> None:
    data = random_pairs(PAIRS)
    known(tmp_path, data=data)
    more = random_pairs(5, seed=99)
    trees = [*more.trees[:2], *data.trees[::-1], *more.trees[2:]]
    mixed = PairData(trees=trees, rows=data.rows + more.rows, report=data.report)
    assert changed(known(tmp_path, data=mixed)) == (PAIRS, 5)


def test_rows_that_share_a_completion_share_its_entry(tmp_path: Path) -> None:
    data = random_pairs(4)
    known(tmp_path, data=data)
    swapped = [
        TokenizedTree(prompt_ids=t.prompt_ids, completions=t.completions[::-1], origin=t.origin) for t in data.trees
    ]
    assert changed(known(tmp_path, data=PairData(trees=swapped, rows=data.rows, report=data.report))) == (4, 0)


def test_equal_rows_are_computed_once(tmp_path: Path) -> None:
    data = random_pairs(3)
    thrice = PairData(trees=data.trees * 3, rows=data.rows * 3, report=data.report)
    run = make(tmp_path, data=thrice)
    calls = forward_calls(run.references.reference)
    asked = sum(len(trees) for trees in (run.references.pack(data.trees)))
    run.know_reference()
    assert run.references.filled.computed == 9 and len(calls) == len(run.references.pack(data.trees)) and asked == 3


# ---- misses ----


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        lambda: tiny_llama(rms_norm_eps=1e-3),
        lambda: tiny_llama().bfloat16(),
        lambda: tiny_llama(seed=1),
        lambda: rope_halved(tiny_llama()),
    ],
    ids=["rope_theta", "epsilon", "dtype", "weights", "buffers"],
)
def test_another_model_or_config_or_dtype_finds_nothing(tmp_path: Path, model: Any) -> None:
    known(tmp_path)
    assert changed(known(tmp_path, model=model())) == (0, PAIRS)
    assert changed(known(tmp_path)) == (PAIRS, 0)


def test_a_quantised_model_finds_nothing_of_the_whole_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "model")

    def load(**more: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, **more)

    def nf4(double: bool) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )

    assert changed(known(tmp_path, model=load())) == (0, PAIRS)
    assert changed(known(tmp_path, model=load(quantization_config=nf4(True)))) == (0, PAIRS)
    assert changed(known(tmp_path, model=load(quantization_config=nf4(True)))) == (PAIRS, 0)
    assert changed(known(tmp_path, model=load(quantization_config=nf4(False)))) == (0, PAIRS)


def texts(folder: Path, **changes: Any) -> tuple[int, int]:
    tokenizer = changes.pop("tokenizer", None) or small_tokenizer(chat_template=CHATML)
    model = tiny_llama(vocab_size=1100)
    rows = changes.pop("rows", ROWS)
    return changed(
        known(folder, model=model, data=rows, processing_class=tokenizer, max_tokens_per_forest=400, **changes)
    )


def test_a_change_of_template_tokenizer_or_length_misses_exactly_the_rows_it_changes(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(chat_template=CHATML)
    run = make(
        tmp_path, model=tiny_llama(vocab_size=1100), data=ROWS, processing_class=tokenizer, max_tokens_per_forest=400
    )
    longest = [len(t.prompt_ids) + max(map(len, t.completions)) for t in run.train_dataset]
    limit = sorted(longest)[len(longest) // 2]
    cut = sum(length > limit for length in longest)
    assert 0 < cut < len(ROWS)
    assert texts(tmp_path) == (0, len(ROWS))
    assert texts(tmp_path) == (len(ROWS), 0)
    assert texts(tmp_path, max_length=limit) == (len(ROWS) - cut, cut)
    assert texts(tmp_path, max_length=limit, truncation="keep_end") == (len(ROWS) - cut, cut)
    assert texts(tmp_path, max_length=None) == (len(ROWS), 0)
    assert texts(tmp_path, chat_template="off") == (0, len(ROWS))
    assert texts(tmp_path, tokenizer=small_tokenizer("merging", chat_template=CHATML)) == (0, len(ROWS))
    with_system = [{**row, "system": "be brief"} if number < 2 else row for number, row in enumerate(ROWS)]
    assert texts(tmp_path, rows=with_system) == (len(ROWS) - 2, 2)


# ---- values ----


def test_cached_values_are_the_references_log_probs_and_no_step_asks_it_again(tmp_path: Path) -> None:
    data, reference = random_pairs(PAIRS), tiny_llama()
    known(tmp_path, data=data)
    run = make(tmp_path, data=data)
    calls = forward_calls(run.references.reference)
    run.know_reference()
    guarded = len(calls)
    run.train()
    found = [[logps.sum().item() for logps in tree.reference_token_logps] for tree in run.train_dataset]
    torch.testing.assert_close(torch.tensor(found), completion_logps(reference, data.trees).view(-1, 2))
    # What is left are the policy's forwards, and the check of the first step's loss.
    forests = sum(len(run.packed(data.trees[i : i + 4]).forests) for i in (0, 4, 8))
    first = len(run.packed(data.trees[:4]).forests)
    assert len(calls) - guarded == forests + 2 * first


def test_losses_with_and_without_the_cache_agree_to_rounding(tmp_path: Path) -> None:
    without = make(tmp_path, reference_cache=None, num_train_epochs=2)
    without.config.reference_cache = "off"
    assert without.references.cache is not None  # auto is on for LoRA
    off = DPOTrainer(model=tiny_llama(), args=without.args, train_dataset=random_pairs(PAIRS), peft_config=lora())
    assert off.references.cache is None
    fresh, again = (make(tmp_path, num_train_epochs=2) for _ in range(2))
    for run in (off, fresh, again):
        run.train()
    assert logged(fresh) == logged(again)
    assert logged(fresh) == pytest.approx(logged(off), rel=1e-6)


def test_where_the_batches_are_the_same_the_cache_changes_no_bit(tmp_path: Path) -> None:
    data = random_pairs(4)  # one step, so that bulk and step pack alike
    settings = {"data": data, "max_tokens_per_forest": 500, "num_train_epochs": 3}
    off = make(tmp_path, **settings, reference_cache=None, output_dir=str(tmp_path / "off"))
    off.references.cache, off.references.in_bulk = None, False
    on = make(tmp_path, **settings)
    off.train()
    on.train()
    assert on.references.filled.computed == 4
    assert logged(on) == logged(off) and logged(on, "rewards/margins") == logged(off, "rewards/margins")
    assert all(torch.equal(a, b) for a, b in zip(on.model.parameters(), off.model.parameters(), strict=True))


def test_a_sweep_of_betas_asks_the_reference_once(tmp_path: Path) -> None:
    found = []
    for beta in (0.05, 0.1, 0.2, 0.5):
        run = make(tmp_path, beta=beta)
        run.train()
        found.append(changed(run.references.filled))
    assert found == [(0, PAIRS), (PAIRS, 0), (PAIRS, 0), (PAIRS, 0)]


# ---- the guard ----


def altered_in_memory(model: Any) -> Any:
    """A rope that neither config nor weights nor buffers tell of."""
    model.model.rotary_emb.attention_scaling = 1.1
    return model


def test_a_model_that_is_not_what_it_says_is_stopped_by_rows_with_both_values(tmp_path: Path) -> None:
    known(tmp_path)
    with pytest.raises(CacheError) as error:
        known(tmp_path, model=altered_in_memory(tiny_llama()))
    message = str(error.value)
    assert "row " in message and " known, " in message and " now (worst token off by " in message
    assert "attention_scaling" in message and "cache verify --all" in message and "prune --space" in message


def test_the_guard_lets_rounding_pass(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype)
        known(tmp_path, model=copy.deepcopy(model), max_tokens_per_forest=2000)
        run = make(tmp_path, model=model, share_prompt="off", backend="reference")
        values = run.references.known(random_pairs(PAIRS), "train_dataset", guard=PAIRS)
        assert not values.missing  # type: ignore[union-attr]


def test_one_row_that_is_off_by_a_hundredth_of_a_nat_is_found_by_a_full_check(tmp_path: Path) -> None:
    data = random_pairs(PAIRS)
    run = make(tmp_path, data=data)
    run.know_reference()
    values = run.train_dataset
    values.logps(7)[1][0] += 0.01
    (mismatch,) = run.references.mismatches(values, range(PAIRS))
    assert mismatch.origin == "row 8" and mismatch.completion == 1
    assert mismatch.known - mismatch.now == pytest.approx(0.01, abs=1e-4)


# ---- sums that users bring ----


def with_sums(data: PairData, sums: torch.Tensor, rows: range) -> PairData:
    trees = [
        TokenizedTree(
            prompt_ids=tree.prompt_ids,
            completions=tree.completions,
            origin=tree.origin,
            reference_logps=tuple(sums[index].tolist()) if index in rows else None,
        )
        for index, tree in enumerate(data.trees)
    ]
    return PairData(trees=trees, rows=data.rows, report=data.report)


def test_sums_that_a_data_set_brings_are_used_and_the_others_computed(tmp_path: Path) -> None:
    data = random_pairs(PAIRS)
    sums = completion_logps(tiny_llama(), data.trees).detach().view(-1, 2)
    plain, run = make(tmp_path, data=data), make(tmp_path, data=with_sums(data, sums, range(8)))
    for trainer in (plain, run):
        trainer.train()
    assert changed(run.references.filled) == (PAIRS, 0)  # four rows of the first run were in the cache
    assert logged(run) == pytest.approx(logged(plain), rel=1e-5)
    assert logged(run, "rewards/margins") == pytest.approx(logged(plain, "rewards/margins"), rel=1e-4, abs=1e-6)


def test_sums_that_are_not_the_references_are_refused(tmp_path: Path) -> None:
    data = random_pairs(PAIRS)
    sums = completion_logps(tiny_llama(), data.trees).detach().view(-1, 2) - 1.0
    with pytest.raises(
        CacheError, match=r"reference_chosen_logps .* is not what the reference says now: row \d+ chosen"
    ):
        make(tmp_path, data=with_sums(data, sums, range(PAIRS))).train()


def test_sums_are_refused_for_a_method_that_needs_tokens(tmp_path: Path) -> None:
    data = random_pairs(PAIRS)
    sums = completion_logps(tiny_llama(), data.trees).detach().view(-1, 2)
    with pytest.raises(DataError, match="weighs tokens one by one"):
        make(tmp_path, data=with_sums(data, sums, range(PAIRS)), method="ld_dpo").train()


def test_columns_of_sums_are_read_from_rows(tmp_path: Path) -> None:
    tokenizer, model = small_tokenizer(chat_template=CHATML), tiny_llama(vocab_size=1100)
    plain = make(tmp_path, model=copy.deepcopy(model), data=ROWS, processing_class=tokenizer, max_tokens_per_forest=400)
    sums = completion_logps(model, plain.train_dataset.trees).detach().view(-1, 2).tolist()
    rows = [
        {**row, "reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
        for row, (chosen, rejected) in zip(ROWS, sums, strict=True)
    ]
    run = make(tmp_path, model=model, data=rows, processing_class=tokenizer, max_tokens_per_forest=400)
    run.train()
    assert changed(run.references.filled) == (len(rows), 0)
    rows[3]["reference_chosen_logps"] = "much"
    with pytest.raises(DataError, match=r"row 4: column 'reference_chosen_logps' must be a finite log-prob"):
        make(tmp_path, data=rows, processing_class=tokenizer)


# ---- other references ----


def test_a_second_model_is_addressed_by_its_own_weights(tmp_path: Path) -> None:
    known(tmp_path)
    assert changed(known(tmp_path, ref_model=tiny_llama(seed=5))) == (0, PAIRS)
    assert changed(known(tmp_path, ref_model=tiny_llama(seed=5))) == (PAIRS, 0)
    assert changed(known(tmp_path, ref_model=tiny_llama())) == (PAIRS, 0)  # the same model as lies under the adapters


def test_a_reference_with_adapters_is_addressed_by_them_too(tmp_path: Path) -> None:
    def reference(seed: int) -> Any:
        model = get_peft_model(tiny_llama(), lora())
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    assert changed(known(tmp_path)) == (0, PAIRS)
    assert changed(known(tmp_path, ref_model=reference(1))) == (0, PAIRS)
    assert changed(known(tmp_path, ref_model=reference(2))) == (0, PAIRS)
    assert changed(known(tmp_path, ref_model=reference(1))) == (PAIRS, 0)


def test_a_reference_that_moves_is_refused(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Sync(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            for parameter in run.references.reference.parameters():
                parameter.data.mul_(0.9)

    for changes in ({}, {"max_steps": 2, "logging_steps": 100}):
        run = make(tmp_path, ref_model=tiny_llama(seed=5), **changes)
        run.add_callback(Sync())
        with pytest.raises(CacheError, match=r"the reference changed while training, .* reference_cache: off"):
            run.train()
    # Nothing that it said since lies under the address of what it was.
    layout = prepare_model(fresh := tiny_llama(seed=5).requires_grad_(False))
    data = random_pairs(PAIRS).trees
    cached = ReferenceCache(tmp_path / "cache").token_logps(fresh, data, layout=layout)
    sums = torch.tensor([[logps.sum().item() for logps in tree] for tree in cached])
    torch.testing.assert_close(sums, completion_logps(fresh, data).view(-1, 2))


# ---- interruptions, streams, folders ----


def test_an_interrupted_pass_is_gone_on_with(tmp_path: Path) -> None:
    run = make(tmp_path, data=random_pairs(200), max_tokens_per_forest=40)
    score, forests = run.references.score, []

    def breaks(trees: Any) -> Any:
        forests.append(len(trees))
        if len(forests) == 60:
            raise KeyboardInterrupt
        return score(trees)

    run.references.score = breaks
    with pytest.raises(KeyboardInterrupt):
        run.know_reference()
    again = make(tmp_path, data=random_pairs(200), max_tokens_per_forest=40)
    again.know_reference()
    filled = again.references.filled
    assert filled.reused == sum(forests[:-1])  # Ctrl-C loses the forest that was being computed, and no other
    whole = make(tmp_path / "whole", data=random_pairs(200), max_tokens_per_forest=40)
    whole.know_reference()
    for index in range(200):
        for mine, other in zip(again.train_dataset.logps(index), whole.train_dataset.logps(index), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_a_flipped_bit_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make(tmp_path)
    first.know_reference()
    (space,) = (tmp_path / "cache").iterdir()
    (path,) = entry_files(space)
    value = bytes(first.train_dataset.logps(3)[0].numpy().tobytes())
    content = path.read_bytes()
    at = content.index(value)
    path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    again = make(tmp_path)
    again.know_reference()
    assert changed(again.references.filled) == (PAIRS - 1, 1) and again.references.filled.bad == 1
    assert "is damaged" in caplog.text
    for index in range(PAIRS):
        for mine, other in zip(again.train_dataset.logps(index), first.train_dataset.logps(index), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_a_stream_is_scored_as_it_arrives_and_found_again(tmp_path: Path) -> None:
    from datasets import Dataset

    tokenizer = small_tokenizer(chat_template=CHATML)

    def run(data: Any, **more: Any) -> Any:
        settings = {"processing_class": tokenizer, "max_steps": 2, "max_tokens_per_forest": 400}
        trainer = make(tmp_path, model=tiny_llama(vocab_size=1100), data=data, **(settings | more))
        trainer.train()
        return trainer

    def stream() -> Any:
        return Dataset.from_list(ROWS).to_iterable_dataset()

    whole = run(ROWS, output_dir=str(tmp_path / "whole"), reference_cache=tmp_path / "other")
    first, again = run(stream()), run(stream())
    assert changed(first.references.filled) == (0, 8) and changed(again.references.filled) == (8, 0)
    assert logged(first) == logged(again)
    assert logged(first) == pytest.approx(logged(whole), rel=1e-6)
    # Its second pass comes after the first, also for a run that goes on in the middle of it.
    out = {"output_dir": str(tmp_path / "passes"), "save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    passes = run(stream(), **out)
    resumed = make(
        tmp_path,
        model=tiny_llama(vocab_size=1100),
        data=stream(),
        processing_class=tokenizer,
        max_tokens_per_forest=400,
        **out,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "passes" / "checkpoint-3"))
    assert logged(resumed) == logged(passes)
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), passes.model.parameters(), strict=True))


def test_a_stream_that_cannot_be_read_again_stops_the_run_that_needs_it(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(chat_template=CHATML)
    settings = {"processing_class": tokenizer, "max_tokens_per_forest": 400, "max_steps": 4}
    run = make(tmp_path, model=tiny_llama(vocab_size=1100), data=_OnceOnly(), **settings)
    with pytest.raises(
        DataError, match="train_dataset ended after 9 usable rows and cannot be read again; set max_steps"
    ):
        run.train()


class _OnceOnly:
    """Rows that a second reader does not get."""

    def __init__(self) -> None:
        self._rows = iter(ROWS)

    def __iter__(self) -> Any:
        return self._rows


def test_sums_are_checked_also_where_rows_come_step_by_step(tmp_path: Path) -> None:
    data = random_pairs(PAIRS)
    sums = completion_logps(tiny_llama(), data.trees).detach().view(-1, 2)
    right, wrong = (with_sums(data, sums - off, range(6)) for off in (0.0, 1.0))
    run = make(tmp_path, data=right, max_steps=2)  # forests with and without sums of their own
    run.train()
    assert logged(run)[0] == pytest.approx(0.693147, abs=1e-5)
    with pytest.raises(CacheError, match="is not what the reference says now"):
        make(tmp_path, data=wrong, max_steps=2).train()
    with pytest.raises(DataError, match="weighs tokens one by one"):
        make(tmp_path, data=right, max_steps=2, method="ld_dpo").train()
    with pytest.raises(DataError, match="weighs tokens one by one"):
        make(tmp_path, data=list(with_sums(data, sums, range(PAIRS)).trees), method="ld_dpo").train()


def test_sums_beside_token_weights_are_refused(tmp_path: Path) -> None:
    data = random_pairs(PAIRS)
    trees = [
        Tree(
            prompt_ids=tree.prompt_ids,
            completions=tree.completions,
            token_weights=[[0.5] * len(ids) for ids in tree.completions],
            reference_logps=[-1.0, -1.0] if index == 3 else None,
        )
        for index, tree in enumerate(data.trees)
    ]
    with pytest.raises(DataError, match="a sum does not say what it weighed"):
        make(tmp_path, data=trees).train()


def test_a_wrong_value_that_no_sample_met_is_found_in_the_first_batch(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.know_reference()
    run.train_dataset.logps(1)[0].sub_(0.5)
    with pytest.raises(TrainingError, match=r"known reference log-probs that sum to .* \(chosen\), and .* now"):
        run.train()


def test_a_reference_that_was_changed_between_two_runs_of_one_trainer_is_asked_anew(tmp_path: Path) -> None:
    data = random_pairs(PAIRS)
    run = make(tmp_path, data=data, ref_model=tiny_llama(seed=5), rank=0)
    run.train()
    assert logged(run)[0] != pytest.approx(0.693147, abs=1e-2)
    run.references.reference.load_state_dict(run.model.state_dict())
    more = random_pairs(6, seed=9)
    run.evaluate(more)
    run.train()
    assert logged(run)[0] == pytest.approx(0.693147, abs=1e-4)
    layout = prepare_model(fresh := tiny_llama(seed=5).requires_grad_(False))
    cached = ReferenceCache(tmp_path / "cache").token_logps(fresh, more.trees, layout=layout)
    sums = torch.tensor([[logps.sum().item() for logps in tree] for tree in cached])
    torch.testing.assert_close(sums, completion_logps(fresh, more.trees).view(-1, 2))


def test_a_run_shorter_than_its_data_asks_for_the_rows_it_sees(tmp_path: Path) -> None:
    run = make(tmp_path, max_steps=2)
    run.train()
    assert changed(run.references.filled) == (0, 8)
    part = make(tmp_path, num_train_epochs=0.3)
    part.train()
    assert changed(part.references.filled) == (4, 0)
    assert changed(known(tmp_path)) == (8, 4)


def test_a_trainer_that_only_evaluates_needs_no_training_data(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.train_dataset = None
    run.evaluate(random_pairs(PAIRS))
    run.evaluate(random_pairs(PAIRS))
    assert changed(run.references.filled) == (PAIRS, PAIRS)


def test_a_stream_without_an_end_needs_max_steps(tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ConfigError, match="is a stream, whose length is not known; set max_steps"):
        make(tmp_path, data=data, processing_class=small_tokenizer(chat_template=CHATML))


def test_an_unusable_default_folder_is_announced_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DPO_ENGINE_CACHE", "/proc/version/cache")
    run = make(tmp_path, reference_cache=None)
    run.train()
    assert "reference log-probs are kept in memory only: " in caplog.text
    with pytest.raises(CacheError, match="cannot be written"):
        make(tmp_path, reference_cache="/proc/version/cache").train()


def test_a_log_prob_that_is_not_finite_is_refused_with_its_row(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[random_pairs(PAIRS).trees[2].prompt_ids[0]] = float("nan")  # type: ignore[operator]
    run = make(tmp_path)
    run.references.reference.load_state_dict(model.state_dict(), strict=False)
    for parameter, source in zip(
        (p for n, p in run.model.named_parameters() if "lora_" not in n), model.parameters(), strict=True
    ):
        parameter.data.copy_(source.data)
    with pytest.raises(CacheError, match=r"row \d+: the reference gives completion 1 a log-prob that is not finite"):
        run.know_reference()


# ---- without the trainer ----


def test_the_cache_serves_a_loop_of_ones_own(tmp_path: Path) -> None:
    data, model = random_pairs(6), tiny_llama().requires_grad_(False)
    layout = prepare_model(model)
    cache = ReferenceCache(tmp_path)
    first = cache.token_logps(model, data.trees, layout=layout)
    calls = forward_calls(model)
    plain = [(tree.prompt_ids, list(tree.completions)) for tree in data.trees]
    second = cache.token_logps(model, plain, layout=layout, guard=0)
    assert not calls
    cache.token_logps(model, plain, layout=layout)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cache.token_logps(model, plain, layout=layout)
    assert not all(
        torch.equal(a, b) for one, two in zip(first, rounded, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert len(cache.spaces()) == 2
    model.model.rotary_emb.attention_scaling = 1.1
    with pytest.raises(CacheError, match="is not what the reference says now"):
        cache.token_logps(model, plain, layout=layout)
    model.model.rotary_emb.attention_scaling = 1.0
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    sums = torch.tensor([[logps.sum().item() for logps in tree] for tree in first])
    torch.testing.assert_close(sums, completion_logps(tiny_llama(), data.trees).view(-1, 2))
    # A trainer on the same model finds them.
    assert changed(known(tmp_path, data=data, reference_cache=tmp_path)) == (6, 0)


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_that_build_at_once_give_one_complete_cache(tmp_path: Path, count: int) -> None:
    start_ranks(known_by_one_of_many, (tmp_path,), count)
    for number in range(count):
        reused, computed = map(int, (tmp_path / f"{number}.txt").read_text().split())
        assert reused + computed == 120
    assert changed(known(tmp_path, data=random_pairs(120))) == (120, 0)
    (space,) = ReferenceCache(tmp_path / "cache").look()
    assert space.entries == 240 and space.bad == 0
