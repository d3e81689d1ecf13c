"""Does the page of results say what the files say, and nothing else?"""

from __future__ import annotations

import base64
import html
import json
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support import bench_records as made
from support.benchmark_scripts import load

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
run, results, steps = (load(f"report.{name}") for name in ("run", "results", "steps"))
WRONG = "d_hidden is off by 0.5 of its norm"
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every suite, with every kind of thing that is not a plain figure."""
    place = tmp_path_factory.mktemp("results")
    operator = [
        made.of_ops("floor", None),
        made.of_ops("engine tiled", 1.13),
        made.of_ops("naive", 1.48, note="builds <logits> & keeps them"),
        made.of_ops("trl", 0.71, unquotable=WRONG, errors={"far": True, "wrong": WRONG}),
        made.of_ops("chunked", 2.5, unquotable="others had 31% of the cores"),
        {**made.of_ops("liger", None), "status": "n/a: needs CUDA"},
        {**made.of_ops("cce", None), "status": "failed: RuntimeError: <no> kernel"},
        {**made.of_ops("torch.compile", None), "status": "not measured: one call took 130 s"},
    ]
    made.write(place, "ops", operator)
    training = [
        *made.of_steps("engine_cached", [0.8, 0.76]),
        *made.of_steps("trl_best", [0.4, 0.38]),
        *made.of_steps("trl_compacted", [0.5, 0.5], unquotable="others had 40% of the cores"),
    ]
    made.write(place, "steps", training)
    made.write(
        place,
        "memory",
        [
            *made.of_memory("engine tiled", {1000: 12.0, 4000: 12.0}),
            *made.of_memory("naive", {1000: 40.0, 4000: 160.0}),
        ],
    )
    made.write(place, "cache", made.of_cache())
    made.write(place, "scale", made.of_scale(1.02))
    made.write(place, "train", [{"row": "engine"}], day=1)
    return place


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page")
    assert run.main(["--results", str(folder), "--output", str(output)]) == 0
    return output / "index.html"


class Parsed(HTMLParser):
    """The elements of a page, each closed in the order in which it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def row_of(text: str, name: str) -> str:
    """The first table row of that name."""
    escaped = html.escape(name).replace("&#x27;", "&#39;")
    start = text.index(f'<th scope="row">{escaped}</th>')
    return html.unescape(text[start : text.index("</tr>", start)])


def test_the_page_is_well_formed_and_fetches_nothing(page: Path) -> None:
    parsed = Parsed(page.read_text("utf-8"))
    for _, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not parsed.of("script") and not parsed.of("iframe")
    assert parsed.styles and not any("url(" in style or "@import" in style for style in parsed.styles)


def test_every_picture_is_inlined_is_a_png_and_says_its_figures_in_words(page: Path) -> None:
    pictures = Parsed(page.read_text("utf-8")).of("img")
    assert len(pictures) == len(list(page.parent.glob("*.png"))) == 5
    for picture in pictures:
        src = picture["src"] or ""
        assert src.startswith("data:image/png;base64,")
        assert base64.b64decode(src.partition(",")[2]).startswith(b"\x89PNG")
        assert any(digit.isdigit() for digit in picture["alt"] or "")
    alts = " ".join(picture["alt"] or "" for picture in pictures)
    assert "dpo-engine 1.13" in alts and "definition, with logits 1.48" in alts
    assert "0.78  (2.00×)" in alts


def test_what_has_no_figure_stands_with_its_reason(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "n/a: needs CUDA" in row_of(text, "Liger")
    assert "failed: RuntimeError: <no> kernel" in html.unescape(text)
    assert "<no>" not in text and "<logits>" not in text
    assert "not measured: one call took 130 s" in row_of(text, "definition, torch.compile")


def test_a_ratio_that_may_not_be_quoted_is_left_out_and_the_reason_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "1.48" in row_of(text, "definition, with logits")
    row = row_of(text, "definition, in chunks")
    assert "no ratio: others had 31% of the cores" in row and "2.50" not in row
    row = row_of(text, load("report.names").row_title("trl_compacted"))
    assert "no ratio: others had 40% of the cores" in row and "1.32" not in row and "1.25" not in row


def test_a_fast_answer_that_is_wrong_is_marked_and_gets_no_ratio(page: Path) -> None:
    text = page.read_text("utf-8")
    row = row_of(text, "TRL's operator")
    assert "wrong, whatever its time: d_hidden is off by 0.5 of its norm" in row and "0.71" not in row
    assert text.count('<tr class="wrong">') == 1
    alt = next(picture["alt"] for picture in Parsed(text).of("img") if "bare matrix products" in (picture["alt"] or ""))
    assert "TRL's operator: wrong" in (alt or "")


def test_every_figure_names_file_date_commit_command_and_versions(page: Path) -> None:
    text = page.read_text("utf-8")
    figures = text.split("<figure")[1:]
    for figure in figures[:-1]:
        its = figure.partition("</figure>")[0]
        for said in (
            made.FOLDER,
            "24 November 2026",
            made.COMMIT[:10],
            "run.py --suite",
            "torch 2.13.0",
            "Test CPU, 2 cores",
        ):
            assert said in its
    assert "not-installed" not in text  # it was not installed


def test_without_a_gpu_the_page_says_so_and_names_the_command(page: Path) -> None:
    text = html.unescape(page.read_text("utf-8"))
    section = text.partition('<section id="gpu">')[2]
    assert "<strong>Not measured.</strong> Run: <code>make gpu</code>" in section
    assert "measured: not measured on any card yet; run: make gpu PART=memory" in section


def test_a_suite_that_was_not_run_names_its_command(tmp_path: Path) -> None:
    made.write(tmp_path, "scale", made.of_scale(1.0))
    assert run.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert "dpo-engine bench steps</code>" in text and "dpo-engine bench scale</code>" not in text


def test_what_a_card_took_stands_beside_the_plan(tmp_path: Path) -> None:
    rows = [
        {
            "accelerator": "NVIDIA X100",
            "implementation": "engine",
            "length": length,
            "status": "measured",
            "peak_mb": mb,
        }
        | {"tiny": False, "pairs_per_s": 1.0, "tokens_per_s": 3000.0, "planned_mb": mb + 10}
        for length, mb in ((1024, 6200.0), (4096, 8400.0))
    ]
    made.write(tmp_path, "gpu-memory", [{**rows[0], "step": "lengths", "status": "passed"}, *rows])
    made.write(tmp_path, "scale", made.of_scale(1.0))
    assert run.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = html.unescape((tmp_path / "out" / "index.html").read_text("utf-8"))
    section = text.partition('<section id="gpu">')[2]
    assert "Not measured" not in section
    assert "measured on NVIDIA X100 at 4096 tokens: 8.8 GiB" in section
    assert "8,400" in section and "8,410" in section


def test_every_part_of_make_gpu_stands_in_the_section_of_the_card(tmp_path: Path) -> None:
    card = {"accelerator": "NVIDIA X100"}
    ended = {**card, "step": "test_linear_logps_cuda", "status": "failed", "failures": ["test_a"], "tail": ["boom"]}
    made.write(tmp_path, "gpu-correctness", [{**ended, "tests": {"passed": 7, "failed": 1, "skipped": 0}}])
    operator = [made.of_ops("floor", None, device="cuda"), made.of_ops("engine triton", 1.21, device="cuda")]
    late = {**card, "step": "8192,4096,128256", "status": "timed out", "tail": ["round 2"]}
    made.write(tmp_path, "gpu-ops", [late, *({**card, **record} for record in operator)])
    weights = {**card, "weights": "nf4", "lengths": "hh", "max_length": 512, "tiny": False}
    trained = {"implementation": "engine", "status": "measured", "pairs_per_s": 12.5, "peak_mb": 10240.0}
    absent = {"implementation": None, "status": "n/a: bitsandbytes not installed"}
    made.write(tmp_path, "gpu-train", [{**weights, **trained}, {**weights, **absent}])
    made.write(tmp_path, "scale", made.of_scale(1.0))
    assert run.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = html.unescape((tmp_path / "out" / "index.html").read_text("utf-8"))
    section = text.partition('<section id="gpu">')[2]
    for said in (
        "test_a",
        "8192,4096,128256",
        "timed out",
        "round 2",
        "12.50",
        "10.0",
        "n/a: bitsandbytes not installed",
    ):
        assert f">{said}<" in section
    assert "dpo-engine, Triton 1.21" in section and (tmp_path / "out" / "gpu-ops-1.png").exists()


def test_files_of_an_older_form_are_passed_over_and_named(page: Path) -> None:
    text = page.read_text("utf-8")
    assert f"{made.FOLDER}/2026-11-01-train.jsonl: of the benchmark train, which is no suite" in text


def test_the_newest_record_of_a_key_counts_and_others_stay(tmp_path: Path) -> None:
    made.write(tmp_path, "ops", [made.of_ops("engine tiled", 2.0), made.of_ops("naive", 3.0)], day=20)
    made.write(tmp_path, "ops", [made.of_ops("engine tiled", 1.5)], day=21, run=2)
    made.write(tmp_path, "ops", [made.of_ops("engine tiled", 1.2)], day=21, run=10)
    found = results.read_machine(tmp_path, made.FOLDER).suites["ops"]
    assert {of["implementation"]: of["over_floor"]["median"] for of in found} == {"engine tiled": 1.2, "naive": 3.0}
    assert {of["implementation"]: of.source.file.rpartition("/")[2] for of in found} == {
        "engine tiled": "2026-11-21-ops-10.jsonl",
        "naive": "2026-11-20-ops.jsonl",
    }


def test_a_newer_record_that_failed_hides_an_older_figure(tmp_path: Path) -> None:
    made.write(tmp_path, "ops", [made.of_ops("naive", 3.0)], day=20)
    made.write(tmp_path, "ops", [{**made.of_ops("naive", 3.0), "status": "failed: out of memory"}], day=21)
    (of,) = results.read_machine(tmp_path, made.FOLDER).suites["ops"]
    assert of.status == "failed: out of memory" and not of.is_measured


def test_a_multiple_of_trl_is_taken_round_by_round_and_within_one_file(tmp_path: Path) -> None:
    both = [*made.of_steps("engine_cached", [1.0, 2.0, 3.0]), *made.of_steps("trl_best", [0.5, 1.0, 1.5])]
    made.write(tmp_path, "steps", both, day=20)
    found = results.read_machine(tmp_path, made.FOLDER).suites["steps"]
    by_name = {of["implementation"]: of for of in found}
    ours = by_name["engine_cached"]
    assert steps.times(ours, steps.base_of(ours, found)) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    made.write(tmp_path, "steps", made.of_steps("engine_cached", [9.0, 9.0, 9.0]), day=21)
    found = results.read_machine(tmp_path, made.FOLDER).suites["steps"]
    ours = next(of for of in found if of["implementation"] == "engine_cached")
    assert ours.source.file.endswith("21-steps.jsonl") and steps.base_of(ours, found) is None


def test_a_round_in_which_others_were_at_work_counts_for_no_ratio(tmp_path: Path) -> None:
    ours, theirs = made.of_steps("engine_cached", [0.2, 1.0]), made.of_steps("trl_best", [0.5, 0.5])
    ours[0]["unquotable"] = "others had 40% of the cores"
    made.write(tmp_path, "steps", [*ours, *theirs])
    found = results.read_machine(tmp_path, made.FOLDER).suites["steps"]
    of = next(of for of in found if of["implementation"] == "engine_cached")
    assert steps.times(of, steps.base_of(of, found)) == {"median": 2.0, "p20": 2.0, "p80": 2.0}


def test_rounds_that_lie_too_far_apart_give_no_ratio(tmp_path: Path) -> None:
    made.write(tmp_path, "steps", [*made.of_steps("engine_cached", [0.5, 1.0]), *made.of_steps("trl_best", [0.5, 0.5])])
    found = results.read_machine(tmp_path, made.FOLDER).suites["steps"]
    of = next(of for of in found if of["implementation"] == "engine_cached")
    base = steps.base_of(of, found)
    assert steps.times(of, base) is None and "too noisy to tell" in steps.why_no_ratio(of, base)


def test_a_line_that_is_no_record_is_refused_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made.write(tmp_path, "ops", [made.of_ops("naive", 3.0)])
    path.write_text(path.read_text("utf-8") + '{"half": ', encoding="utf-8")
    assert run.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert f"{path}:2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_machine_that_is_not_there_is_refused_with_those_that_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--results", str(folder), "--machine", "other"]) == 2
    assert made.FOLDER in capsys.readouterr().err


# ---- in a browser ----

# Answers in the document's title, which --dump-dom prints. The frame is as wide as a phone; chromium's own window cannot be.
PROBE = """<!DOCTYPE html><html><head><title>waiting</title></head><body>
<iframe id="phone" style="width:390px;height:800px;border:0"></iframe>
<script>
const frame = document.getElementById("phone");
frame.onload = () => {
  const page = frame.contentDocument, all = (name) => Array.from(page.querySelectorAll(name));
  document.title = JSON.stringify({
    widths: all("img").map((picture) => picture.naturalWidth),
    shown: all("img").map((picture) => picture.getBoundingClientRect().width),
    headings: all("h1, h2").map((heading) => heading.textContent),
    rows: all("tbody tr").length,
    wide: page.documentElement.scrollWidth,
    window: frame.contentWindow.innerWidth,
  });
};
frame.srcdoc = atob("PAGE");
</script></body></html>
"""


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What a headless chromium makes of the page in a frame of 390 pixels."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed, so the page is not rendered")
    folder = tmp_path_factory.mktemp("browser")
    # As ASCII, so that atob gives back what the file says.
    text = page.read_text("utf-8").encode("ascii", "xmlcharrefreplace")
    (folder / "probe.html").write_text(PROBE.replace("PAGE", base64.b64encode(text).decode("ascii")), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, (folder / "probe.html").as_uri()], capture_output=True, text=True, timeout=120)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert title.startswith("{"), done.stderr[-2000:]
    yield json.loads(html.unescape(title))


def test_a_browser_shows_headings_tables_and_pictures(seen: dict[str, list[object]]) -> None:
    assert seen["headings"][:3] == ["dpo-engine, measured", "The operator", "Training steps"]
    assert len(seen["widths"]) == 5 and all(width > 100 for width in seen["widths"])
    assert all(width > 300 for width in seen["shown"])
    assert seen["rows"] > 15


def test_on_a_phone_the_page_is_no_wider_than_its_window(seen: dict[str, int]) -> None:
    assert seen["window"] == 390
    assert seen["wide"] <= 390
