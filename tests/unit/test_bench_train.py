"""May the training benchmark's figures stand side by side? Its rows on a tiny model, and its tables on made-up records."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.benchmark_scripts import load
from support.tiny_pairs import random_pairs, tiny_llama

rows = load("steps.rows")
tables = load("steps.tables")
watch = load("steps.watch")
engine = load("steps.engine")
train = load("steps.run")

HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="trl or datasets is not installed")
BATCH, PAIRS = 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer of two words, of which TRL needs the padding token's number."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(pad_token_id=0, eos_token_id=1).save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    return path


def job(folder: Path, **changes: Any) -> Any:
    pairs = [
        {"prompt_ids": tree.prompt_ids, "chosen_ids": tree.completions[0], "rejected_ids": tree.completions[1]}
        for tree in random_pairs(PAIRS)
    ]
    settings = {
        "case": "made up", "model_path": str(folder), "pairs": pairs, "dtype": "float32", "batch": BATCH, "max_length": 64,
        "learning_rate": 1e-3, "beta": 0.1, "lora_r": 4, "lora_alpha": 8.0, "seed": 3, "threads": 1,
    }  # fmt: skip
    return rows.Job(**(settings | changes))


def run_here(name: str, its: Any, out: Path) -> dict[str, Any]:
    """A row as its script runs it, in this process."""
    row = rows.ROWS[name]
    side = load(row.module.removeprefix("benchmarks."))
    return side.run(vars(its) | row.options | {"output_dir": str(out)})


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a row found on `job(folder)`; run once, however many tests look at it."""
    return cache(lambda name: run_here(name, job(folder), tmp_path_factory.mktemp(name)))


def lengths(its: Any) -> list[tuple[int, int, int]]:
    return [(len(p["prompt_ids"]), len(p["chosen_ids"]), len(p["rejected_ids"])) for p in its.pairs]


# ---- the rows themselves ----


@pytest.mark.parametrize("name", ["engine_packed", "engine_shared", "engine_cached"])
def test_the_engine_computes_each_prompt_as_often_as_its_layout_says(name: str, folder: Path, ran: Any) -> None:
    its = job(folder)
    found = ran(name)
    prompts = 2 if name == "engine_packed" else 1
    expected = [
        sum(prompts * p + c - 1 + r - 1 for p, c, r in lengths(its)[step : step + BATCH])
        for step in range(0, PAIRS, BATCH)
    ]
    assert found["step_tokens"] == expected
    assert found["log"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(found["step_seconds"]) == 1
    assert (found["reference_s"] > 0) == (name == "engine_cached")  # before the first step, and otherwise within each


def test_the_forced_layout_pads_and_computes_the_same(folder: Path, ran: Any) -> None:
    its = job(folder)
    padded, shared = ran("engine_operator"), ran("engine_shared")
    assert sum(padded["step_tokens"]) >= sum(2 * p + c - 1 + r - 1 for p, c, r in lengths(its))
    assert [e["loss"] for e in padded["log"]] == pytest.approx([e["loss"] for e in shared["log"]], abs=1e-5)
    assert padded["lines"][0] == "layout: padded (forced by the benchmark)"


def test_a_layout_that_was_not_in_use_is_refused() -> None:
    trees = list(random_pairs(4))
    taken = sum(len(t.prompt_ids) + sum(len(c) - 1 for c in t.completions) for t in trees)
    engine.check_layout(trees, "shared", taken)
    with pytest.raises(watch.Refused, match="was not in use"):
        engine.check_layout(trees, "padded", taken)


def test_the_definition_pads_everything_and_comes_to_the_same(folder: Path, ran: Any) -> None:
    its, naive, shared = job(folder), ran("naive"), ran("engine_shared")
    assert naive["step_tokens"] == rectangles(its, BATCH)
    for key in ("loss", "grad_norm"):
        assert [e[key] for e in naive["log"]] == pytest.approx([e[key] for e in shared["log"]], rel=1e-4)
    for key in ("logps/chosen", "logps/rejected"):
        assert naive["log"][0][key] == pytest.approx(shared["log"][0][key], rel=1e-5)


def rectangles(its: Any, together: int) -> list[int]:
    """Tokens of each step where so many pairs are padded to one width."""
    return [
        sum(
            2 * together * max(p + max(c, r) for p, c, r in lengths(its)[first : first + together])
            for first in range(step, step + BATCH, together)
        )
        for step in range(0, PAIRS, BATCH)
    ]


@needs_trl
def test_trl_gets_the_same_tokens_and_comes_to_the_same_log_probs(folder: Path, ran: Any) -> None:
    its = job(folder)
    found = {name: ran(name) for name, row in rows.ROWS.items() if row.module == rows.TRL}
    assert list(found) == ["trl_default", "trl_best", "trl_accumulated", "trl_compacted"]
    assert found["trl_default"]["step_tokens"] == found["trl_best"]["step_tokens"] == rectangles(its, BATCH)
    assert found["trl_accumulated"]["step_tokens"] == found["trl_compacted"]["step_tokens"] == rectangles(its, 1)
    # What compaction changes is what the head sees, and nothing else.
    assert found["trl_compacted"]["head_rows"] == sum(c + r for _, c, r in lengths(its))
    assert found["trl_accumulated"]["head_rows"] == sum(rectangles(its, 1)) - 2 * PAIRS
    assert (found["trl_default"]["reference_s"] > 0, found["trl_best"]["reference_s"] > 0) == (False, True)
    for key in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
        for name in found:
            assert [e[key] for e in found[name]["log"]] == pytest.approx(
                [e[key] for e in ran("engine_shared")["log"]], rel=1e-4
            ), (name, key)


@needs_trl
def test_tokens_that_trl_would_cut_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(watch.Refused, match="TRL trains on other tokens"):
        run_here("trl_best", job(folder, max_length=12), tmp_path)


def test_one_row_runs_from_end_to_end_in_a_process_of_its_own(folder: Path) -> None:
    record = rows.run_row("engine_shared", job(folder), limit_s=120)
    assert record["status"] == "measured", record
    assert record["pairs_per_s"] > 0 and record["peak_rss_mb"] > 100
    assert record["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    json.dumps(record, allow_nan=False)


def test_a_row_that_takes_too_long_gives_no_figure(folder: Path) -> None:
    begin = time.monotonic()
    late = rows.run_row("engine_shared", job(folder), limit_s=0.5)
    assert late["status"] == "not measured: took more than 0.5 s" and "pairs_per_s" not in late
    assert time.monotonic() - begin < 10


def test_a_row_that_fails_says_what_its_process_said_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_watched(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "python -m benchmarks.steps.trl exited with 1:\nTraceback ...\ntrain_watch.Refused: other tokens"
        )

    monkeypatch.setattr(rows, "run_watched", run_watched)
    record = rows.run_row("engine_shared", job(folder), limit_s=9)
    assert record["status"] == "failed: train_watch.Refused: other tokens" and "Traceback" in record["tail"]


def test_without_trl_its_rows_say_so(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    assert rows.run_row("trl_best", job(folder), 1.0)["status"] == "n/a: trl and datasets not installed"


# ---- the watch ----


def test_only_passes_that_record_gradients_are_counted_and_the_first_step_is_not_timed() -> None:
    embedding, now = torch.nn.Embedding(5, 2), iter([10.0, 10.0, 12.0, 12.0, 15.0, 15.0])
    its = watch.StepWatch(embedding, clock=lambda: next(now))
    for width in (3, 4, 5):
        its.on_step_begin()
        with torch.no_grad():
            embedding(torch.zeros(1, 9, dtype=torch.long))
        embedding(torch.zeros(2, width, dtype=torch.long))
        its.on_step_end(None, state(width - 2))
    assert its.tokens == [6, 8, 10] and its.seconds == [2.0, 3.0]
    assert its.pairs_per_s(4) == pytest.approx(8 / 5)
    its.close()
    embedding(torch.zeros(1, 1, dtype=torch.long))
    assert its._seen == 10


def test_a_step_that_would_end_too_late_is_not_begun() -> None:
    now = [0.0]
    its = watch.StepWatch(torch.nn.Embedding(5, 2), until=10.0, clock=lambda: now[0])
    for end in (1.0, 5.0):
        now[0] = end
        its.on_step_end(None, state(1))
    now[0] = 8.0
    with pytest.raises(watch.OutOfTime, match="3 of 9 steps"):
        its.on_step_end(None, state(3))


def state(step: int) -> Any:
    from transformers import TrainerState

    return TrainerState(global_step=step, max_steps=9)


# ---- what is made of the records ----


def record(row: str, pairs_per_s: float = 1.0, **changes: Any) -> dict[str, Any]:
    settings = {
        "implementation": row, "case": "hh", "round": 0, "title": row, "status": "measured",
        "dtype": "float32", "pairs": 4, "pairs_per_s": pairs_per_s,
        "peak_rss_mb": 1000.0, "reference_s": 2.0, "step_tokens": [100, 100], "first_loss": math.log(2),
        "first_chosen": -110.159, "first_rejected": -120.5, "trainable_parameters": 7,
    }  # fmt: skip
    return settings | changes


def cells(text: str, title: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(title)).removeprefix(title).split()


def test_ratios_are_to_the_faster_of_trls_own_ways_round_by_round() -> None:
    found = [
        record("engine_cached", 6.0, peak_rss_mb=500.0), record("engine_cached", 8.0, peak_rss_mb=700.0, round=1),
        record("trl_best", 1.0), record("trl_best", 1.0, round=1),
        record("trl_accumulated", 2.0, peak_rss_mb=2000.0), record("trl_accumulated", 2.5, peak_rss_mb=2000.0, round=1),
        record("trl_compacted", 9.0), record("trl_compacted", 9.0, round=1),
    ]  # fmt: skip
    text = tables.speed_table(found, train.TITLES)
    assert cells(text, "+ reference known: dpo-engine as it comes")[:4] == ["7.000", "3.10", "600", "0.30"]
    assert cells(text, "TRL, the same, one pair at a time")[:4] == ["2.250", "1.00", "2000", "1.00"]
    assert text.endswith("TRL's best here: TRL, the same, one pair at a time")


def test_a_row_that_others_disturbed_in_every_round_gets_no_ratio() -> None:
    noisy = {"unquotable": "too noisy to tell: others had up to 40% of the cores"}
    found = [
        record("engine_cached", 6.0, **noisy),
        record("engine_cached", 6.0, round=1),
        record("trl_best", 1.0, **noisy),
    ]
    assert "6.00" in cells(
        tables.speed_table(found[1:2] + [record("trl_best", 1.0, round=1)], train.TITLES),
        "+ reference known: dpo-engine as it comes",
    )
    text = tables.speed_table([*found[:1], found[2]], train.TITLES)
    assert cells(text, "+ reference known: dpo-engine as it comes")[:2] == ["6.000", "-"]
    assert "TRL, reference known, no checkpointing: too noisy to tell" in text


def test_rounds_that_differ_too_much_give_no_ratio() -> None:
    found = [record("engine_cached", speed, round=i) for i, speed in enumerate((2.0, 6.0, 4.0))]
    found += [record("trl_best", 1.0, round=i) for i in range(3)]
    assert "too noisy" in tables.unquotable(found)["engine_cached"] and "trl_best" not in tables.unquotable(found)


def test_without_trl_there_is_no_ratio() -> None:
    found = [record("engine_cached", 6.0), {"implementation": "trl_best", "status": "n/a: trl not installed"}]
    text = tables.speed_table(found, train.TITLES)
    assert cells(text, "+ reference known: dpo-engine as it comes")[:2] == ["6.000", "-"]
    assert "TRL, reference known, no checkpointing: n/a: trl not installed" in text


def test_a_row_that_failed_in_one_round_has_no_median() -> None:
    found = [record("trl_best", 5.0), {**record("trl_best"), "status": "not measured: took more than 9 s"}]
    assert tables.medians(found) == {}
    assert "no checkpointing: not measured: took more than 9 s" in tables.speed_table(found, train.TITLES)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"first_loss": 0.70}, "starts at loss"),
        ({"first_chosen": -110.2}, "mean log-prob chosen -110.2"),
        ({"first_rejected": -121.0}, "mean log-prob rejected -121.0"),
        ({"trainable_parameters": 8}, "trains 8 parameters"),
        ({"first_loss": math.nan}, "starts at loss nan"),
    ],
)
def test_rows_that_do_not_agree_are_not_printed(changes: dict[str, Any], says: str, folder: Path) -> None:
    found = [record("engine_shared", 6.0), record("trl_best", 1.25, **changes)]
    assert any(says in line for line in tables.disagreements(found))
    text, agree = train.report(job(folder), found)
    assert not agree and says in text and "1.25" not in text and "6.000" not in text


def test_rows_that_agree_to_rounding_are_printed(folder: Path) -> None:
    found = [record("engine_shared", 6.0), record("trl_best", 1.25, first_chosen=-110.1595, first_loss=0.69316)]
    text, agree = train.report(job(folder), found)
    assert agree and "4.80" in text


def test_the_share_of_tokens_saved_is_of_trls_rectangles() -> None:
    found = [
        record("trl_best", step_tokens=[100, 300]), record("trl_accumulated", step_tokens=[90, 250]),
        record("engine_operator", step_tokens=[80, 220]), record("engine_packed", step_tokens=[70, 210]),
        record("engine_shared", step_tokens=[40, 60]), record("engine_shared", step_tokens=[9, 9], case="dpo"),
    ]  # fmt: skip
    text = tables.token_table(found)
    assert cells(text, "hh") == ["400", "340", "300", "25.0%", "280", "30.0%", "100", "75.0%"]
    assert cells(text, "dpo") == ["-", "-", "-", "-", "-", "-", "18", "-"]


# ---- the command ----


def test_known_data_sets_are_found_in_a_folder_and_files_by_name(tmp_path: Path) -> None:
    for name in ("dpo_en_demo.json", "hh_harmless_test.jsonl.gz", "something_else.json"):
        (tmp_path / name).touch()
    assert list(rows.find_data([str(tmp_path)])) == ["hh_harmless_test", "dpo_en_demo"]
    assert list(rows.find_data([str(tmp_path / "something_else.json")])) == ["something_else"]
    with pytest.raises(ValueError, match="no folder with one of"):
        rows.find_data([str(tmp_path / "empty")])


def test_rows_take_turns_in_an_order_that_turns_round_and_a_failed_one_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    ran: list[str] = []

    def run_row(name: str, its: Any, limit_s: float) -> dict[str, Any]:
        ran.append(name)
        status = "n/a: not here" if name == "trl_best" else "measured"
        return {"implementation": name, "status": status, "trainable_parameters": 1, "pairs_per_s": 2.0}

    monkeypatch.setattr(train, "run_row", run_row)
    found = train.measure(job(folder), ["engine_packed", "trl_best", "engine_shared"], 3, 9.0)
    assert ran == [
        "engine_packed",
        "trl_best",
        "engine_shared",
        "engine_shared",
        "engine_packed",
        "engine_packed",
        "engine_shared",
    ]
    assert [r["round"] for r in found] == [0, 0, 0, 1, 1, 2, 2]
    assert all(r["gemm_gflop_per_s"] > 0.1 and "share_of_gemm_speed" in r for r in found if r["status"] == "measured")
    assert found[0]["steps"] == 2 and found[0]["case"] == "made up"


def test_a_smoke_run_trains_every_row_and_prints_no_ratio(tmp_path: Path, capsys: Any) -> None:
    rows_here = ["naive", "engine_shared", "engine_cached", *(["trl_best"] if HAS_TRL else [])]
    assert train.main(["--smoke", "--threads", "1", "--folder", str(tmp_path), "--only", *rows_here]) == 0
    (path,) = tmp_path.rglob("*-steps.jsonl")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["implementation"] for record in found] == rows_here
    assert all(record["status"] == "measured" and record["case"] == "tiny" for record in found)
    assert cells(capsys.readouterr().out, "+ every prompt once")[1] == "-"


def test_the_published_data_is_known_by_its_digest(folder: Path, tmp_path: Path) -> None:
    assert all(len(known.sha256 or "") in (0, 64) for known in rows.DATA_SETS.values())
    found = train.measure(job(folder, case="hh_harmless_test", sha256="0" * 64), ["trl_best"], 1, 0.1)
    assert found[0]["published_data"] is False


def test_a_single_step_is_refused_since_the_first_is_not_timed(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(SystemExit):
        train.main(["--data", str(tmp_path / "pairs.jsonl"), "--model", str(folder), "--pairs", "4", "--batch", "4"])
    assert "expected at least 2" in capsys.readouterr().err


def test_the_command_refuses_a_place_without_data(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train.main(["--data", str(tmp_path)])
    assert "is no file" in capsys.readouterr().err
