"""Is what was measured kept, found again, and never a reason for a training run to stop?"""

from __future__ import annotations

import json
import multiprocessing
import timeit
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_engine.ops import backends, choice
from dpo_engine.ops.choice import Choice, choose_backend, read_choices, record, shape_class

CPU = torch.device("cpu")
MEASURED = Choice(
    backend="triton",
    shape=(64, 4096, 128256),
    floor_seconds=1.0,
    seconds={"tiled": 2.0, "triton": 1.5},
    ratios={"tiled": 2.0, "triton": 1.5},
    left_out={"triton_epilogue": "it is wrong"},
    date="2026-11-21",
)


@pytest.fixture(autouse=True)
def own_cache_and_every_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of this test's own, on a machine where every backend can run."""
    monkeypatch.setenv("DPO_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "possible_backends", lambda device, dtype: dict.fromkeys(backends.NAMES))
    choice.forget_stored()
    yield
    choice.forget_stored()


def chosen(hidden_size: int = 4096, vocabulary: int = 128256, task: str = "frozen", dtype=torch.bfloat16) -> str:  # type: ignore[no-untyped-def]
    return choose_backend(CPU, dtype, hidden_size, vocabulary, task)


def test_without_a_measurement_it_is_tiled() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "tiled"


def test_what_was_measured_is_chosen_for_its_class_and_no_other() -> None:
    record(CPU, torch.bfloat16, "frozen", MEASURED)
    assert chosen() == "triton"
    assert chosen(3584, 152064) == "triton"  # the same powers of two are nearest
    assert chosen(task="trainable") == chosen(dtype=torch.float16) == chosen(2304) == chosen(4096, 50000) == "tiled"


@pytest.mark.parametrize("name", ["OPERATOR_VERSION", "cpu_model", "torch", "triton"])
def test_another_device_or_version_is_not_measured_yet(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record(CPU, torch.bfloat16, "frozen", MEASURED)
    if name == "OPERATOR_VERSION":
        monkeypatch.setattr(choice, name, backends.OPERATOR_VERSION + 1)
    elif name == "cpu_model":
        monkeypatch.setattr(choice, name, lambda: "another CPU")
    elif name == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    else:
        monkeypatch.setattr(choice.metadata, "version", lambda package: "99.0")
    choice.forget_stored()
    assert chosen() == "tiled"


def test_a_backend_that_cannot_run_any_more_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    record(CPU, torch.bfloat16, "frozen", MEASURED)
    impossible = {**dict.fromkeys(backends.NAMES), "triton": "it is gone"}
    monkeypatch.setattr(choice, "possible_backends", lambda device, dtype: impossible)
    choice.forget_stored()
    assert chosen() == "tiled"


@pytest.mark.parametrize("name", ["reference", "auto", "rm -rf"])
def test_a_file_cannot_choose_what_is_no_candidate(name: str) -> None:
    record(CPU, torch.bfloat16, "frozen", replace(MEASURED, backend=name))
    assert chosen() == "tiled"


def test_a_call_costs_microseconds() -> None:
    record(CPU, torch.bfloat16, "frozen", MEASURED)
    chosen()
    assert min(timeit.repeat(chosen, number=1000, repeat=5)) / 1000 < 20e-6


def test_a_running_process_keeps_its_choice_whatever_others_store() -> None:
    record(CPU, torch.bfloat16, "frozen", MEASURED)
    assert chosen() == "triton"
    path = choice.choices_file()
    path.write_text(path.read_text().replace('"backend": "triton"', '"backend": "tiled"'))
    assert chosen() == chosen(4000, 120000) == "triton"  # another key, the same class


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"schema": 1}',
        '{"schema": 2, "machines": {}}',
        '{"schema": 1, "machines": []}',
        '{"schema": 1, "machines": {"a": {"b": {}}}}',
        '{"schema": 1, "machines": {"a": {"b": 3}}}',
        "\udcff",
    ],
)
def test_a_broken_or_foreign_file_is_one_warning_and_the_next_measurement_replaces_it(text: str) -> None:
    path = choice.choices_file()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=r"backends\.json is .*run `dpo-engine doctor`") as caught:
        assert chosen() == chosen(task="trainable") == "tiled"
    assert len(caught) == 1
    problem = record(CPU, torch.bfloat16, "frozen", MEASURED)
    assert problem and "backends.json" in problem
    assert path.with_name("backends.json.broken").exists()
    assert chosen() == "triton"


def test_an_entry_that_is_broken_does_not_stop_training() -> None:
    record(CPU, torch.bfloat16, "frozen", MEASURED)
    path = choice.choices_file()
    stored = json.loads(path.read_text())
    next(iter(next(iter(stored["machines"].values())).values()))["shape"] = "much"
    path.write_text(json.dumps(stored))
    choice.forget_stored()
    with pytest.warns(UserWarning, match="is broken"):
        assert chosen() == "tiled"


def test_a_file_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    choice.choices_file().mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert chosen() == "tiled"


def test_what_is_stored_comes_back_whole() -> None:
    assert record(CPU, torch.bfloat16, "frozen", MEASURED) is None
    machines, problem = read_choices()
    assert problem is None
    assert machines == {choice.machine_name(CPU): {shape_class(torch.bfloat16, 4096, 128256, "frozen"): MEASURED}}
    assert choice.measured(CPU, torch.bfloat16, 4096, 128256, "frozen") == MEASURED


def test_fields_of_later_versions_do_no_harm() -> None:
    record(CPU, torch.bfloat16, "frozen", MEASURED)
    path = choice.choices_file()
    stored = json.loads(path.read_text())
    next(iter(next(iter(stored["machines"].values())).values()))["watts"] = 300
    path.write_text(json.dumps(stored | {"more": 1}))
    choice.forget_stored()
    assert chosen() == "triton"


def test_a_failed_write_leaves_the_old_file_and_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record(CPU, torch.bfloat16, "frozen", MEASURED)
    before = choice.choices_file().read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choice.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        record(CPU, torch.bfloat16, "trainable", MEASURED)
    assert choice.choices_file().read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".backends.json.lock", "backends.json"]


def record_many(first: int) -> None:
    for size in range(first, first + 6):
        record(CPU, torch.float32, "frozen", replace(MEASURED, shape=(1, 2**size, 2)))


def test_several_processes_that_measure_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=record_many, args=(first,)) for first in (0, 6, 12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(worker.exitcode == 0 for worker in workers)
    assert len(read_choices()[0][choice.machine_name(CPU)]) == 18


def test_a_task_that_is_not_one_is_refused() -> None:
    with pytest.raises(ValueError, match="task='train'; expected one of no_gradient, frozen, trainable"):
        chosen(task="train")


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        (torch.float64, {}, "takes no float64"),
        (torch.bfloat16, {}, "needs a CUDA device"),
        (torch.bfloat16, {"hip": "7.0"}, "ROCm 7.0, which is refused"),
        (torch.bfloat16, {"platform": "win32"}, "Windows is refused"),
        (torch.bfloat16, {"triton": None}, "triton is not installed; run: pip install triton"),
    ],
)
def test_why_triton_cannot_run_is_said(
    dtype: torch.dtype, changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "interprets", lambda: False)
    if "hip" in changes:
        monkeypatch.setattr(torch.version, "hip", changes["hip"])
    if "platform" in changes:
        monkeypatch.setattr(backends.sys, "platform", changes["platform"])
    if "triton" in changes:
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    found = backends.possible_backends(CPU, dtype)
    assert found["reference"] is None and found["tiled"] is None
    assert message in str(found["triton"]) and message in str(found["triton_epilogue"])


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 1), True)])
def test_cards_before_8_0_are_refused(capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = backends.possible_backends(torch.device("cuda", 0), torch.bfloat16)["triton"]
    assert (reason is None) == runs
    assert runs or "compute capability 7.5" in str(reason)


def test_a_driver_that_is_too_old_is_said_in_torchs_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    reason = backends.why_no_cuda()
    assert reason and "CUDA 13.0" in reason and "driver on your system is too old" in reason and "\n" not in reason


def test_the_table_of_cards_names_every_architecture_once() -> None:
    lines = backends.card_lines()
    for capability in ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"):
        assert len([line for line in lines if line.startswith(f"compute capability {capability} ")]) == 1
    assert any(line.startswith("ROCm") for line in lines) and any(line.startswith("Windows") for line in lines)
    assert backends.card_of((7, 0)) is backends.CARDS[0] and backends.card_of((8, 7)) is None
