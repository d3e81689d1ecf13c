"""Does the scaling suite see how a cost grows, and would it say so if a claim did not hold?"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.benchmark_scripts import load

harness, fits, cases, run = load("harness"), load("scale.fit"), load("scale.cases"), load("scale.run")
operator, steps, smoke = load("scale.operator"), load("scale.steps"), load("smoke")
Timing = harness.Timing
SIZES = (100, 200, 400, 800, 1600)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grown(power: float, fixed: float = 0.0, rounds: tuple[float, ...] = (1.0, 1.0, 1.0)) -> list[Any]:
    """Times that grow by a power of the size, in rounds that are so many times as slow."""
    return [Timing(tuple(slow * (fixed + 1e-6 * size**power) for slow in rounds)) for size in SIZES]


# ---- the fit ----


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.3, 2.0])
def test_the_slope_of_a_power_is_that_power(power: float) -> None:
    found = fits.fit(SIZES, grown(power))
    assert (found.slope, found.slope_low, found.slope_high, found.slope_last) == pytest.approx((power,) * 4, abs=1e-12)
    assert found.points == 5


def test_a_round_that_is_slow_for_all_sizes_does_not_move_a_slope() -> None:
    found = fits.fit(SIZES, grown(1.0, rounds=(1.0, 7.0, 0.5)))
    assert (found.slope_low, found.slope_high) == pytest.approx((1.0, 1.0))


def test_low_and_high_are_the_slopes_of_single_rounds() -> None:
    straight, steep = grown(1.0, rounds=(1.0,)), grown(1.2, rounds=(1.0,))
    both = [Timing((a.seconds[0], a.seconds[0], b.seconds[0])) for a, b in zip(straight, steep, strict=True)]
    found = fits.fit(SIZES, both)
    assert (found.slope, found.slope_low, found.slope_high) == pytest.approx((1.0, 1.0, 1.2))


def test_a_fixed_cost_lowers_the_slope_and_the_last_slope_least() -> None:
    found = fits.fit(SIZES, grown(1.0, fixed=1e-4))
    assert found.slope < found.slope_last < 1


@pytest.mark.parametrize(("sizes", "values"), [((1,), (1.0,)), ((2, 2), (1.0, 2.0)), ((1, 2), (0.0, 1.0))])
def test_what_has_no_slope_is_refused(sizes: tuple[float, ...], values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        fits.slope(sizes, values)


# ---- claims ----


@pytest.mark.parametrize(
    ("power", "holds"), [(1.0, True), (1.09, True), (0.91, True), (1.12, False), (0.88, False), (2.0, False)]
)
def test_linear_holds_of_what_is_linear_and_of_nothing_else(power: float, holds: bool) -> None:
    assert fits.LINEAR.holds(SIZES, grown(power)) is holds


@pytest.mark.parametrize(("last", "holds"), [(16.0, True), (17.0, True), (18.0, False), (14.0, False)])
def test_the_cost_of_one_is_compared_between_the_two_largest_sizes(last: float, holds: bool) -> None:
    claim = fits.SameEach(text="", bound=0.10)
    seconds = [99.0, 2.0, 4.0, 8.0, last]  # the first, which pays for a start, does not count
    assert claim.holds(SIZES, [Timing((value,)) for value in seconds]) is holds


def test_a_claim_is_not_quoted_where_rounds_contradict_each_other_or_there_is_one() -> None:
    straight, steep = grown(1.0, rounds=(1.0,)), grown(1.25, rounds=(1.0,))
    apart = [Timing((a.seconds[0], b.seconds[0])) for a, b in zip(straight, steep, strict=True)]
    assert fits.LINEAR.untold(SIZES, apart) == "noisy: what is to be 1 reaches from 1.00 to 1.25 in single rounds"
    assert fits.LINEAR.untold(SIZES, grown(1.0, rounds=(1.0, 3.0))) is None
    assert "one round" in fits.LINEAR.untold(SIZES, straight)


def made_up(timings: list[Any], wrong: str | None = None) -> Any:
    points = [
        run.Point(x=size, timing=timing, in_fit=size > 100, wrong=wrong if size == 400 else None)
        for size, timing in zip(SIZES, timings, strict=True)
    ]
    return run.Series(implementation="engine_frozen", points=points)


def test_superlinear_times_make_a_record_that_says_the_claim_does_not_hold() -> None:
    case = cases.CASES["rows"]
    bad, good = (run.fit_record({}, case, made_up(grown(power))) for power in (1.5, 1.0))
    assert (bad["holds"], good["holds"]) == (False, True)
    assert bad["slope"] == pytest.approx(1.5) and bad["claim"] == case.claim.text
    assert (good["x_from"], good["points"]) == (200, 4)  # what is not in the fit is not


def test_a_wrong_answer_makes_every_claim_false_and_its_time_worthless() -> None:
    case, series = cases.CASES["rows"], made_up(grown(1.0), wrong="wrong: a log-prob is off by 12 times the bound")
    record = run.fit_record({}, case, series)
    assert record["holds"] is False and record["unquotable"].startswith("wrong")
    points = [run.point_record({"case": "rows"}, series, point) for point in series.points]
    assert [point["unquotable"] is not None for point in points] == [False, False, True, False, False]


def test_a_far_log_prob_and_a_wrong_gradient_are_seen() -> None:
    fine = {"far": False, "logp_over_bound": 0.2, "d_hidden": 1e-6}
    assert operator._wrong(fine) is None
    assert "12" in operator._wrong({**fine, "far": True, "logp_over_bound": 12.0})
    assert "d_weight" in operator._wrong({**fine, "d_weight": 1e-2})
    assert "d_hidden" in operator._wrong({**fine, "d_hidden": "nan"})


# ---- the cases ----


@pytest.mark.parametrize("name", cases.CASES)
def test_the_sizes_of_a_claim_are_far_enough_apart(name: str) -> None:
    case = cases.CASES[name]
    fitted = [value for value in case.values if value >= case.fitted_from]
    assert list(case.values) == sorted(case.values) and len(case.values) >= 3
    if case.claim is not None:
        assert len(fitted) >= 3 and fitted[-1] >= 16 * fitted[0]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case, for real, at its tiny sizes; the records as they were written."""
    folder = tmp_path_factory.mktemp("results")
    assert run.main(["--smoke", "--threads", "1", "--folder", str(folder)]) == 0
    [path] = folder.rglob("*-scale.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", cases.CASES)
def test_every_case_runs_and_leaves_its_points_and_fits(name: str, ran: list[dict[str, Any]]) -> None:
    case = cases.CASES[name]
    its = [record for record in ran if record["case"] == name]
    for record in its:
        assert record["benchmark"] == "scale" and record["status"] == "measured" and record["threads"] == 1
        assert record["unquotable"]  # nothing of a tiny run is to be quoted
        assert record["rounds"] == 2
    points, rest = [[r for r in its if r["kind"] == kind] for kind in ("point", "fit")]
    for implementation in {record["implementation"] for record in its}:
        assert len([r for r in points if r["implementation"] == implementation]) == len(case.smoke_values)
    assert all(0 < r["p20_s"] <= r["median_s"] <= r["p80_s"] for r in points)
    assert rest and all(r["slope_low"] <= r["slope_high"] for r in rest)
    assert all(("holds" in r) == (case.claim is not None) for r in rest)


def test_steps_are_of_the_tokens_that_were_meant(ran: list[dict[str, Any]]) -> None:
    def tokens(name: str, implementation: str = "engine_shared") -> list[int]:
        return [
            record["step_tokens"]
            for record in ran
            if (record["case"], record["implementation"], record["kind"]) == (name, implementation, "point")
        ]

    assert tokens("length") == [2 * (n // 2 + 2 * (n // 2 - 1)) for n in (8, 16, 32)]
    assert tokens("shared_tokens") == [pairs * (6 + 2 * 3) for pairs in (1, 2, 4)]
    prompts = [1, 6, 18]  # shares of 0, 1/2 and 3/4 beside 6 tokens
    assert tokens("prompt_share") == [2 * (p + 2 * 5) for p in prompts]
    assert tokens("prompt_share", "engine_packed") == [2 * (2 * p + 2 * 5) for p in prompts]


def test_what_sharing_saves_stands_beside_what_its_tokens_are(ran: list[dict[str, Any]]) -> None:
    points = [r for r in ran if r["case"] == "prompt_share" and r["kind"] == "point"]
    shared, packed = ([r for r in points if r["implementation"] == f"engine_{name}"] for name in ("shared", "packed"))
    for mine, its in zip(shared, packed, strict=True):
        assert mine["tokens_over_packed"] == pytest.approx(mine["step_tokens"] / its["step_tokens"])
        assert mine["over_packed"]["p20"] <= mine["over_packed"]["median"] <= mine["over_packed"]["p80"]
    [fitted] = [r for r in ran if r["case"] == "prompt_share" and r["kind"] == "fit"]
    assert fitted["over"] == "tokens_over_packed"


def test_lengths_that_differ_do_so_alike_in_every_step() -> None:
    fixed = {**cases.CASES["pairs"].fixed, "prompt": 96, "completion": 80}
    few, many = (steps._pairs("pairs", n, fixed, steps.random.Random(0)) for n in (4, 16))
    lengths = [[tuple(len(ids) for ids in pair.values()) for pair in pairs] for pairs in (few, many)]
    assert lengths[0] == lengths[1][:4]
    assert len(set(itertools.chain(*lengths[1]))) > 3


def test_a_tiny_run_is_not_kept_unless_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("harness.suite"), "RESULTS", tmp_path)
    args = run.parser().parse_args(["--smoke"])
    machine = harness.describe_machine()
    assert harness.save("scale", [{"case": "rows"}], args, machine) is None
    args = run.parser().parse_args([])
    assert harness.save("scale", [{"case": "rows"}], args, machine) is not None
    args.no_save = True
    assert harness.save("scale", [{"case": "rows"}], args, machine) is None
    assert len(list(tmp_path.rglob("*.jsonl"))) == 1


def test_the_table_says_that_a_claim_failed() -> None:
    common = {"case": "rows", "dtype": "float32", "threads": 1, "rounds": 3}
    series = made_up(grown(1.5))
    points = [run.point_record(common, series, point) for point in series.points]
    text = run.show([*points, run.fit_record(common, cases.CASES["rows"], series)])
    assert "NO" in text and "1.500 (1.500-1.500)" in text and "100 (not in fit)" in text
