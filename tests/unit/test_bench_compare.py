"""Does a comparison of two runs find what differs, and only that?"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support import bench_records as made
from support.benchmark_scripts import load

compare = load("report.compare")


def run(tmp_path: Path, name: str, benchmark: str, records: list[made.Record]) -> str:
    return str(made.write(tmp_path / name, benchmark, records))


def two(tmp_path: Path, benchmark: str, a: list[made.Record], b: list[made.Record], *more: str) -> int:
    return int(compare.main([run(tmp_path, "a", benchmark, a), run(tmp_path, "b", benchmark, b), *more]))


def test_two_runs_alike_pass_whatever_their_times(tmp_path: Path) -> None:
    a, b = made.of_ops("engine tiled", 1.10), made.of_ops("engine tiled", 1.15, median_ms=9999.0)
    assert two(tmp_path, "ops", [a], [b]) == 0


def test_a_ratio_beyond_the_tolerance_fails_and_stands_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = [made.of_ops("engine tiled", 1.10), made.of_ops("naive", 1.5)]
    b = [made.of_ops("engine tiled", 1.11), made.of_ops("naive", 1.8)]
    assert two(tmp_path, "ops", a, b) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "definition, with logits" in lines[2] and "+20.0%" in lines[2] and lines[2].rstrip().endswith("over")
    assert lines[-1] == "1 of 4 figures differ by more than 0.15"
    assert two(tmp_path, "ops", a, b, "--tolerance", "0.25") == 0


def test_a_few_mib_are_chance_and_a_doubling_is_not(tmp_path: Path) -> None:
    def extra(name: str, mb: float) -> list[made.Record]:
        return [made.of_ops(name, 1.1, memory={"extra_mb": mb})]

    assert two(tmp_path, "ops", extra("engine tiled", 0.5), extra("engine tiled", 4.0)) == 0
    assert two(tmp_path, "ops", extra("engine tiled", 14.0), extra("engine tiled", 28.0)) == 1
    assert two(tmp_path, "ops", extra("naive", 1000.0), extra("naive", 1200.0)) == 1


def test_multiples_of_trl_are_compared_and_not_pairs_a_second(tmp_path: Path) -> None:
    a = [*made.of_steps("engine_cached", [0.8]), *made.of_steps("trl_best", [0.4])]
    twice_as_fast = [*made.of_steps("engine_cached", [1.6]), *made.of_steps("trl_best", [0.8])]
    slower = [*made.of_steps("engine_cached", [0.6]), *made.of_steps("trl_best", [0.4])]
    assert two(tmp_path, "steps", a, twice_as_fast) == 0
    assert two(tmp_path, "steps", a, slower) == 1


def test_slopes_are_compared_by_their_difference(tmp_path: Path) -> None:
    assert two(tmp_path, "scale", made.of_scale(0.10), made.of_scale(0.22)) == 0  # more than twice, and next to nothing
    assert two(tmp_path, "scale", made.of_scale(1.0), made.of_scale(1.2)) == 1


def test_memory_by_vocabulary_is_compared(tmp_path: Path) -> None:
    a, b = made.of_memory("naive", {1000: 100.0, 4000: 400.0}), made.of_memory("naive", {1000: 100.0, 4000: 500.0})
    assert two(tmp_path, "memory", a, a) == 0
    assert two(tmp_path, "memory", a, b) == 1


def test_what_may_not_be_quoted_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = [made.of_ops("engine tiled", 1.1), made.of_ops("naive", 1.5)]
    b = [made.of_ops("engine tiled", 1.1), made.of_ops("naive", 3.0, unquotable="others had 31% of the cores")]
    assert two(tmp_path, "ops", a, b) == 0
    said = capsys.readouterr().out
    assert "only in A:" in said and "definition, with logits" in said.partition("figure")[0]


def test_what_only_one_side_has_is_said_and_does_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = [made.of_ops("engine tiled", 1.1)]
    assert two(tmp_path, "ops", a, [*a, made.of_ops("chunked", 2.5)]) == 0
    said = capsys.readouterr().out
    assert "only in B:" in said and "only in A:" not in said
    assert "definition, in chunks; N=64, D=32, V=1000, float32, cpu, 2 threads; × floor: 2.5" in said


def test_nothing_in_common_is_no_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert two(tmp_path, "ops", [made.of_ops("naive", 1.1)], [made.of_ops("chunked", 1.1)]) == 2
    assert "nothing is in both" in capsys.readouterr().err


def test_a_file_without_records_of_a_suite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, old = run(tmp_path, "a", "ops", [made.of_ops("naive", 1.1)]), run(tmp_path, "b", "train", [{"row": "engine"}])
    assert compare.main([good, old]) == 2
    assert "train, which is no suite; expected records of ops, steps" in capsys.readouterr().err
    assert compare.main([good, str(tmp_path / "missing.jsonl")]) == 2


def test_folders_are_compared_by_their_newest_records(tmp_path: Path) -> None:
    for name, newest in (("a", 1.1), ("b", 1.2)):
        made.write(tmp_path / name, "ops", [made.of_ops("naive", 9.0 if name == "a" else 1.1)], day=20)
        made.write(tmp_path / name, "ops", [made.of_ops("naive", newest)], day=21)
    assert compare.main([str(tmp_path / name / made.FOLDER) for name in "ab"]) == 0


def test_what_was_measured_here_is_held_against_what_git_tracks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    arguments = ["--published", "--results", str(tmp_path / "results")]
    path = made.write(tmp_path / "results", "ops", [made.of_ops("naive", 1.1)], day=20)
    subprocess.run(["git", "-C", str(tmp_path), "add", str(path)], check=True)
    assert compare.main(arguments) == 2
    assert "holds no new results; expected both" in capsys.readouterr().err
    made.write(tmp_path / "results", "ops", [made.of_ops("naive", 1.2)], day=21)
    assert compare.main(arguments) == 0
    made.write(tmp_path / "results", "ops", [made.of_ops("naive", 2.2)], day=22)
    assert compare.main(arguments) == 1
