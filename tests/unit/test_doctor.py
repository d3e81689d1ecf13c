"""Does `dpo-engine doctor` say what there is, what is missing and what to do, and keep what it measured?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from dpo_engine.cli import doctor, machine
from dpo_engine.cli.main import main
from dpo_engine.errors import BackendError
from dpo_engine.ops import choice
from dpo_engine.ops.backends import CARDS
from dpo_engine.ops.choice import Choice, read_choices
from support.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_ENGINE_CACHE", str(tmp_path / "cache"))
    choice.forget_stored()
    return tmp_path / "cache"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `dpo-engine doctor ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["dpo-engine", "doctor", *arguments])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_a_shape_is_measured_printed_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    code, out, err = run(monkeypatch, capsys, "--shape", "32,16,200", "--dtype", "float32", "--json")
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert len(out.splitlines()) == 1
    assert report["schema"] == 1 and report["not_measured"] == []
    assert [entry["class"] for entry in report["measured"]] == [
        f"float32 D~16 V~256 {task}" for task in ("frozen", "no_gradient", "trainable")
    ]
    for entry in report["measured"]:
        assert entry["ratios"]["tiled"] > 0 and entry["shape"] == [32, 16, 200]
        assert entry["backend"] in entry["seconds"]
    for task in ("no_gradient", "frozen", "trainable"):
        assert f"{task}, float32, N=32 D=16 V=200: tiled " in err
    assert str(own_cache / "backends.json") in err and (own_cache / "backends.json").exists()
    assert choice.measured(torch.device(report_device()), torch.float32, 16, 200, "frozen") is not None


def report_device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def test_the_report_names_versions_devices_and_cards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, "--quick", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (
        report["versions"]["torch"] == torch.__version__.split("+")[0]
        or report["versions"]["torch"] == torch.__version__
    )
    assert set(report["versions"]) >= {
        "python",
        "triton",
        "transformers",
        "peft",
        "trl",
        "bitsandbytes",
        "liger-kernel",
    }
    assert report["cpu"]["cores"] >= 1 and isinstance(report["cpu"]["bfloat16_instructions"], bool)
    assert len(report["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert report["backends"]["tiled"] == "can run"
    assert len(report["cards"]) == len(CARDS) and "never measured" in err and "refused" in err
    assert 'nothing was measured on this machine yet: backend "auto" means "tiled"' in err


def test_quick_measures_nothing_and_shows_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, capsys, "--shape", "32,16,200", "--dtype", "float32")[0] == 0
    stored = read_choices()
    code, out, _ = run(monkeypatch, capsys, "--quick")
    assert code == 0 and "frozen, float32, N=32 D=16 V=200: tiled " in out
    assert read_choices() == stored


def test_a_model_is_measured_by_the_shape_of_its_head(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_model("Llama").save_pretrained(tmp_path / "model")
    code, out, err = run(monkeypatch, capsys, "--model", str(tmp_path / "model"), "--dtype", "float32")
    assert code == 0, err
    assert "D=32 V=97" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3,4"], "expected three numbers above 0, N,D,V"),
        (["--shape", "3,0,4"], "expected three numbers above 0, N,D,V"),
        (["--shape", "3,4,5", "--model", "m"], "both --model and --shape"),
        (["--model", "./nowhere"], "no such folder"),
        (["--dtype", "float8"], "dtype 'float8' is unknown"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and out == "" and message in err and err.startswith("error: ")


def test_a_broken_file_of_choices_is_reported_and_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    own_cache.mkdir()
    (own_cache / "backends.json").write_text("{half")
    code, out, _ = run(monkeypatch, capsys, "--quick")
    assert code == 0 and "backends.json is broken" in out
    code, out, _ = run(monkeypatch, capsys, "--shape", "32,16,200", "--dtype", "float32")
    assert code == 0 and "moved aside" in out and "3 measurements" in out
    assert (own_cache / "backends.json.broken").read_text() == "{half"


def test_a_cache_folder_that_cannot_be_written_is_said_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPO_ENGINE_CACHE", "/proc/version/cache")
    code, out, err = run(monkeypatch, capsys, "--shape", "32,16,200", "--dtype", "float32")
    assert code == 0, err
    assert "cannot be written" in out and "not measured" in out and "Traceback" not in err


def measured_by(problem: Exception) -> Any:
    def measure(*_: Any, **__: Any) -> Choice:
        raise problem

    return measure


@pytest.mark.parametrize(
    ("problem", "code"),
    [(BackendError("tiled is wrong: off by 3"), 1), (torch.OutOfMemoryError("needs 40 GiB"), 0)],
)
def test_a_measurement_that_fails_does_not_end_the_report(
    problem: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = doctor.doctor_command(
        model=None, shape="8,8,8", dtype="float32", quick=False, as_json=True, measure=measured_by(problem)
    )
    report = json.loads(capsys.readouterr().out)
    assert found == code
    assert [str(problem)] * 3 == [entry["why"] for entry in report["not_measured"]]


def test_shapes_that_nobody_named_are_given_up_when_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[Any] = []

    def measure(device: Any, dtype: Any, shape: Any, task: str, **_: Any) -> Choice:
        begun.append(task)
        return Choice(
            backend="tiled",
            shape=shape,
            floor_seconds=1.0,
            seconds={"tiled": 1.0},
            ratios={"tiled": 1.0},
            left_out={},
            date="2026-11-21",
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "CPU_SHAPES", ((8, 8, 8),))
    monkeypatch.setattr(doctor.time, "perf_counter", iter(range(0, 1000, 20)).__next__)
    code = doctor.doctor_command(model=None, shape=None, dtype="float32", quick=False, as_json=False, measure=measure)
    assert code == 0 and begun == ["no_gradient"]
    assert "30 s have passed; name it to measure it: --shape 8,8,8" in capsys.readouterr().out


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for load, said in ((99.0, True), (0.0, False)):
        monkeypatch.setattr(doctor.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        _, out, _ = run(monkeypatch, capsys, "--shape", "8,8,8", "--dtype", "float32")
        assert ("this machine is busy (load 99.0" in out) == said


def test_what_is_missing_comes_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "_version", lambda package: None if package in ("triton", "gguf") else "1.0")
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: False)
    _, out, _ = run(monkeypatch, capsys, "--quick")
    assert "note: triton is not installed: " in out and "run: pip install triton" in out
    assert "note: gguf is not installed: " in out and "pip install 'dpo-engine[demo]'" in out
    assert torch.cuda.is_available() or "this CPU has no bfloat16 instructions: dtype auto means float32" in out


def test_doctor_is_a_verb_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    for name in ("--model", "--shape", "--dtype", "--quick", "--json"):
        assert name in shown


@pytest.mark.parametrize(
    ("capability", "state"),
    [((7, 5), "Triton backends refused: "), ((9, 0), "supported"), ((8, 7), "nothing is known about them")],
)
def test_a_gpu_is_described_with_what_is_known_about_its_kind(
    capability: tuple[int, int], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name="Some GPU", major=capability[0], minor=capability[1], total_memory=24_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = machine._gpu(0)
    assert found["name"] == "Some GPU" and found["memory_gb"] == 24.0
    assert found["capability"] == f"{capability[0]}.{capability[1]}" and state in found["state"]


def test_the_drivers_version_is_read_from_its_kernel_module(tmp_path: Path) -> None:
    text = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version:  gcc 12.2.0\n"
    )
    (tmp_path / "version").write_text(text)
    assert machine._driver(tmp_path / "version") == "580.95.05"
