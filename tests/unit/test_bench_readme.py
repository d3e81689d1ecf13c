"""Are the figures of README and docs those of the result files?"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support import bench_records as made
from support.benchmark_scripts import load
from support.imports import ROOT

readme = load("report.readme")
harness = load("harness")
BLOCK = "before\n<!-- bench:{0} -->\n<!-- /bench:{0} -->\nafter\n"


def written(tmp_path: Path, name: str = "ops") -> Path:
    """A page with one block, filled in."""
    page = tmp_path / "page.md"
    page.write_text(BLOCK.format(name), encoding="utf-8")
    assert readme.main(["--results", str(tmp_path / "results"), str(page)]) == 0
    return page


def check(tmp_path: Path, page: Path) -> int:
    return int(readme.main(["--check", "--results", str(tmp_path / "results"), str(page)]))


def results(tmp_path: Path, over: float = 1.13, **more: object) -> Path:
    records = [made.of_ops("floor", None), made.of_ops("engine tiled", over), made.of_ops("trl", 3.7, **more)]
    return made.write(tmp_path / "results", "ops", records)


def test_every_block_of_readme_and_docs_is_as_the_results_have_it() -> None:
    figures = readme.published()
    for page in readme.pages():
        text = page.read_text("utf-8")
        assert readme.with_figures(text, page.name, figures.block) == text, "run: dpo-engine bench readme"


def test_the_page_on_benchmarks_has_every_block() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert all(text.count(f"\n<!-- bench:{name} -->\n") == 1 for name in readme.NAMES)


def test_a_block_holds_the_figures_and_ends_with_where_they_are_from(tmp_path: Path) -> None:
    results(tmp_path)
    text = written(tmp_path).read_text("utf-8")
    lines = text.splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and lines[-2] == "<!-- /bench:ops -->"
    assert any(line.startswith("| dpo-engine | 1.13 | 5.1e-06 | 20 |") for line in lines)
    assert lines[-3] == (
        f"(`benchmarks/results/{made.FOLDER}/2026-11-24-ops.jsonl`, 24 November 2026, Test CPU, 2 cores, avx2, "
        f"commit {made.COMMIT[:10]})"
    )


def test_a_figure_that_was_changed_by_hand_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results(tmp_path)
    page = written(tmp_path)
    assert check(tmp_path, page) == 0
    page.write_text(page.read_text("utf-8").replace("| 1.13 |", "| 1.03 |"), encoding="utf-8")
    capsys.readouterr()
    assert check(tmp_path, page) == 1
    said = capsys.readouterr().out
    assert "\n-| dpo-engine | 1.03 |" in said and "\n+| dpo-engine | 1.13 |" in said
    assert "1.03" in page.read_text("utf-8")  # a check writes nothing


def test_newer_results_put_a_page_out_of_date_and_writing_mends_it(tmp_path: Path) -> None:
    results(tmp_path)
    page = written(tmp_path)
    made.write(tmp_path / "results", "ops", [made.of_ops("engine tiled", 1.08)], day=25)
    assert check(tmp_path, page) == 1
    assert readme.main(["--results", str(tmp_path / "results"), str(page)]) == 0
    assert check(tmp_path, page) == 0
    text = page.read_text("utf-8")
    assert "| dpo-engine | 1.08 |" in text and "| TRL's operator | 3.70 |" in text
    assert "2026-11-25-ops.jsonl" in text and "2026-11-24-ops.jsonl" in text


def test_what_is_written_by_hand_stays(tmp_path: Path) -> None:
    results(tmp_path)
    page = written(tmp_path)
    page.write_text(page.read_text("utf-8").replace("after", "after, by `<!-- bench:ops -->`"), encoding="utf-8")
    assert check(tmp_path, page) == 0


def test_a_suite_without_results_reads_not_measured(tmp_path: Path) -> None:
    results(tmp_path)
    assert "Not measured. Run: `dpo-engine bench steps`" in written(tmp_path, "steps").read_text("utf-8")
    assert "On a GPU: not measured. Run: `make gpu`" in written(tmp_path, "gpu").read_text("utf-8")


def test_what_a_card_took_is_the_block_of_the_gpu(tmp_path: Path) -> None:
    record = {"accelerator": "NVIDIA X100", "row": "engine", "implementation": "engine", "length": 4096, "tiny": False}
    record |= {"status": "measured", "peak_mb": 8400.0, "pairs_per_s": 0.75, "tokens_per_s": 5400.0}
    made.write(tmp_path / "results", "gpu-memory", [record])
    text = written(tmp_path, "gpu").read_text("utf-8")
    assert "| 8.2 | 5400 | 0.75 |" in text and "24 November 2026, NVIDIA X100, commit" in text


def test_a_ratio_that_may_not_be_quoted_is_in_no_block(tmp_path: Path) -> None:
    results(tmp_path, unquotable="others had 31% of the cores")
    text = written(tmp_path).read_text("utf-8")
    assert "3.70" not in text and "| TRL's operator | not quoted |" in text
    assert "TRL's operator, frozen head: no ratio: others had 31% of the cores." in text


def test_every_suite_has_a_block(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    made.write(folder, "steps", [*made.of_steps("engine_cached", [0.8]), *made.of_steps("trl_best", [0.4])])
    made.write(folder, "memory", made.of_memory("naive", {1000: 40.0, 4000: 160.0}))
    made.write(folder, "scale", made.of_scale(1.02))
    made.write(folder, "cache", made.of_cache())
    for name, figure in (
        ("steps", "| 0.80 | 2.00 | 2.0 GiB | 105 |"),
        ("memory", "| 40 | 160 |"),
        ("cache", "| 0.988 |"),
    ):
        assert figure in written(tmp_path, name).read_text("utf-8")
    assert "| 1–4 | 1.02 (1.01–1.03) | linear: slope within 0.10 of 1 | yes |" in written(tmp_path, "scale").read_text(
        "utf-8"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- bench:ops -->\nfigures\n", "page:1: bench:ops is not closed"),
        ("<!-- bench:ops -->\n<!-- bench:steps -->\n", "page:2: bench:ops of line 1 is still open"),
        ("x\n<!-- /bench:ops -->\n", "page:2: .* closes what is not open"),
        ("<!-- bench:ops -->\n<!-- /bench:steps -->\n", "page:2: .* closes what is not open"),
        ("<!-- bench:opps -->\n<!-- /bench:opps -->\n", "page:1: no block 'opps'; expected one of steps"),
        ("<!--bench:ops-->\n<!-- /bench:ops -->\n", "page:1: .* alone on its line"),
        ("<!-- bench:ops --> here\n<!-- /bench:ops -->\n", "page:1: .* alone on its line"),
        ("<!-- bench: ops -->\n<!-- /bench:ops -->\n", "page:1: .* alone on its line"),
    ],
)
def test_a_marker_that_is_no_marker_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        readme.with_figures(text, "page", lambda name, machine: "figures")


def test_a_refused_page_is_not_written_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:ops -->\n", encoding="utf-8")
    assert readme.main(["--results", str(tmp_path), str(page)]) == 2
    assert "page.md:1: bench:ops is not closed" in capsys.readouterr().err
    assert page.read_text("utf-8") == "<!-- bench:ops -->\n"


def test_the_machine_measured_last_counts_unless_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    made.write(folder, "ops", [made.of_ops("engine tiled", 1.5)], day=20).parent.rename(folder / "older")
    made.write(folder, "ops", [made.of_ops("engine tiled", 1.1)], day=21)
    figures = readme.Figures(folder)
    assert "| 1.10 |" in figures.block("ops")
    assert "| 1.50 |" in figures.block("ops", "older")
    with pytest.raises(ValueError, match="machine=none; expected one of older, test-cpu"):
        figures.block("ops", "none")


def test_a_file_that_git_does_not_track_changes_no_page(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "results"
    path = made.write(folder, "ops", [made.of_ops("engine tiled", 1.5)], day=20)
    assert "| 1.50 |" in readme.published(folder).block("ops")  # outside a checkout, all files count
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert "Not measured" in readme.published(folder).block("ops")
    subprocess.run(["git", "-C", str(tmp_path), "add", str(path)], check=True)
    made.write(folder, "ops", [made.of_ops("engine tiled", 1.1)], day=21)
    assert "| 1.50 |" in readme.published(folder).block("ops")


def test_readme_names_source_and_digest_of_each_file_of_pairs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    known = {name: data for name, data in load("steps.rows").DATA_SETS.items() if data.sha256}
    assert len(known) == 3
    for name, data in known.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{name}."))
        assert f"`{data.sha256}`" in line and data.source.split(",")[0] in line
