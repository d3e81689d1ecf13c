"""`dpo-engine bench`: which suites run, with which options, and where no benchmarks are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("typer")

from dpo_engine.cli.bench import bench_command, checkout
from dpo_engine.errors import ConfigError
from support.benchmark_scripts import load
from support.imports import ROOT

bench = load("bench")
SUITES = load("suites").SUITES


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would be run; none is."""
    commands: list[list[str]] = []

    def run(command: list[str], **settings: Any) -> Any:
        assert settings["cwd"] == ROOT
        commands.append(command[2:])
        return SimpleNamespace(returncode=3 if command[2] == "benchmarks.cache" else 0)

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.delenv("DATA_DIR", raising=False)
    return commands


def test_without_names_every_suite_runs_and_the_first_failure_is_the_exit_status(started: list[list[str]]) -> None:
    assert bench.main(["--threads", "1", "--rounds", "2"]) == 3
    assert started == [[suite.module, "--threads", "1", "--rounds", "2"] for suite in SUITES.values()]


def test_a_smoke_run_stays_in_one_process(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(bench, "_main_of", lambda name: lambda words: ran.append((name, words)) or len(ran) // 5)
    assert bench.main(["--smoke"]) == 1 and not started
    assert ran == [(suite.module, ["--smoke"]) for suite in SUITES.values()]


def test_only_the_suites_that_were_named_run_and_one_takes_its_own_options(started: list[list[str]]) -> None:
    assert bench.main(["ops", "scale"]) == 0
    assert bench.main(["ops", "--shapes", "2048,576,49152", "--only", "naive"]) == 0
    assert [command[0] for command in started] == ["benchmarks.ops", "benchmarks.scale", "benchmarks.ops"]
    assert started[2][1:] == ["--shapes", "2048,576,49152", "--only", "naive"]


@pytest.mark.parametrize("how", ["option", "equals", "environment"])
def test_the_folder_of_data_goes_to_the_suite_that_takes_it(
    how: str, started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    words = {"option": ["--data_dir", "data"], "equals": ["--data_dir=data"], "environment": []}[how]
    if how == "environment":
        monkeypatch.setenv("DATA_DIR", "data")
    bench.main(["ops", "steps", *words])
    assert started == [["benchmarks.ops"], ["benchmarks.steps", "--data_dir", str(tmp_path / "data")]]


def test_an_option_of_one_suite_is_not_handed_to_all(started: list[list[str]], capsys: Any) -> None:
    assert bench.main(["--shapes", "1,1,1"]) == 2
    assert "--shapes belongs to one suite" in capsys.readouterr().err and not started


def test_an_unknown_name_lists_the_known_ones(started: list[list[str]], capsys: Any) -> None:
    assert bench.main(["opps"]) == 2
    said = capsys.readouterr().err
    assert "bench opps" in said and "ops, memory, cache, scale, steps, list, report, readme, compare" in said
    assert not started


def test_the_list_names_every_case_and_implementation() -> None:
    listing = bench.listing()
    for name, suite in SUITES.items():
        cases, implementations = suite.entries()
        assert cases and implementations
        assert all(word in listing for word in (name, *cases, *implementations))


def test_without_a_checkout_the_command_says_where_the_benchmarks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout() == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"has no benchmarks/; they come with the source"):
        checkout(tmp_path / "site-packages" / "dpo_engine")
    monkeypatch.chdir(ROOT)
    assert checkout(tmp_path / "site-packages" / "dpo_engine") == ROOT


def test_the_command_hands_its_words_on(capsys: Any) -> None:
    assert bench_command(["--help"]) == 0
    assert "dpo-engine bench --smoke" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "dpo_engine.cli.main", "bench", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "bench nothing" in done.stderr


@pytest.mark.slow
def test_a_smoke_run_of_everything_takes_less_than_a_minute() -> None:
    import time

    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--smoke"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.perf_counter() - begin < 60
