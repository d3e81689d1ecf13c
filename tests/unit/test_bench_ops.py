"""Does the operator's benchmark compare like with like, and would it see a wrong result?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.benchmark_scripts import load
from support.call_cost import PeakBytes, Products

op_cases, op_errors, op_implementations = load("ops.cases"), load("ops.errors"), load("ops.implementations")
op_memory, ops, roofline = load("ops.memory"), load("ops.run"), load("ops.roofline")
CASES, IMPLEMENTATIONS = op_cases.CASES, op_implementations.IMPLEMENTATIONS

SHAPE = op_cases.Shape(rows=26, hidden=16, vocabulary=300, dtype="float32", device="cpu")
GEMM = 2 * 26 * 16 * 300
GEMMS = {"no_gradient": 1, "frozen": 2, "trainable": 4, "preference_loss": 3}
TRITON = ("engine triton", "engine triton_epilogue")
HERE = [n for n, entry in IMPLEMENTATIONS.items() if not entry.cuda_only and not entry.compiles and n not in TRITON]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(shape: Any = SHAPE) -> Any:
    return op_cases.make_problems(shape, 1)[0]


def score_of(name: str, case: str) -> Any:
    try:
        return IMPLEMENTATIONS[name].score(CASES[case], SHAPE)
    except op_implementations.NotAvailable as why:
        pytest.skip(str(why))


# ---- the floor ----


@pytest.mark.parametrize("case", CASES)
def test_the_floor_is_the_products_and_nothing_else(case: str) -> None:
    run = op_cases.bare_gemms(CASES[case], [problem()], torch.float32)
    with Products() as seen, PeakBytes() as taken:
        run(0)
    assert seen.flops == GEMMS[case] * GEMM
    assert taken.peak == 0


def test_no_input_is_zero_and_sets_differ() -> None:
    one, other = op_cases.make_problems(SHAPE, 2)
    assert not torch.equal(one.hidden, other.hidden) and not torch.equal(one.labels, other.labels)
    for tensor in (one.hidden, one.weight, one.reference_chosen):
        assert bool((tensor != 0).all())
    assert 0 < int((one.upstream == 0).sum()) < len(one.upstream) / 2


@pytest.mark.parametrize("rows", [2, 3, 16, 17, 512, 1024, 2048, 8192, 16384])
def test_completions_come_in_pairs_and_take_every_row(rows: int) -> None:
    lengths = op_cases.pair_lengths(rows)
    assert len(lengths) % 2 == 0 and sum(lengths) == rows and min(lengths) >= 1
    assert rows < 16 or len(set(lengths)) > 1


def test_no_pairs_loss_is_saturated() -> None:
    given = problem(replace(SHAPE, rows=512, vocabulary=4000))
    logps = op_errors.truth(given).logps.requires_grad_()
    (upstream,) = torch.autograd.grad(op_cases.pair_loss(logps, given), logps)
    assert float((upstream.abs() / 0.1 * len(given.reference_chosen)).min()) > 1e-3


# ---- the truth ----


def exact(given: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (t.double().requires_grad_() for t in (given.hidden, given.weight))
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, given.labels[:, None]).squeeze(-1)
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), given.upstream.double())


def test_the_truth_is_the_definition_in_float64() -> None:
    given = problem()
    found = op_errors.truth(given, sample=12)
    logps, d_hidden, d_weight = exact(given)
    torch.testing.assert_close(found.logps, logps)
    torch.testing.assert_close(given.upstream[found.rows, None] * found.unit, d_hidden[found.rows])
    mine = (given.upstream.double()[:, None] * found.slope).T @ given.hidden.double()
    torch.testing.assert_close(mine, d_weight[found.words])
    assert len(found.rows) == 12 and len(found.words) >= 10


def found_errors(case: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    given = problem()
    logps, d_hidden, d_weight = exact(given)
    wants = CASES[case].gradients
    answer = op_cases.Answer(
        out=logps,
        d_hidden=d_hidden if "hidden" in wants else None,
        d_weight=d_weight if "weight" in wants else None,
    )
    return op_errors.errors(CASES[case], change(answer), given, given, op_errors.truth(given))


def test_a_right_answer_has_no_error() -> None:
    found = found_errors("trainable", lambda answer: answer)
    assert found["logp_max"] < 1e-12 and found["far"] is False
    assert found["d_hidden"] < 1e-12 and found["d_weight"] < 1e-12


def test_a_log_prob_beyond_ten_times_its_bound_is_marked() -> None:
    bound = op_errors.truth(problem()).bound
    inside = found_errors("no_gradient", lambda answer: replace(answer, out=answer.out + 9 * bound))
    outside = found_errors("no_gradient", lambda answer: replace(answer, out=answer.out - 11 * bound))
    assert (inside["far"], outside["far"]) == (False, True)
    assert outside["logp_over_bound"] == pytest.approx(11)


def test_a_result_that_is_not_a_number_is_marked_and_can_be_written() -> None:
    found = found_errors("no_gradient", lambda answer: replace(answer, out=answer.out * float("nan")))
    assert found["far"] is True and found["logp_max"] == "nan"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", ["d_hidden", "d_weight"])
def test_a_gradient_that_ignores_its_rows_upstream_gradient_is_seen(name: str) -> None:
    wrong = exact(replace(problem(), upstream=torch.ones(26)))
    found = found_errors("trainable", lambda answer: replace(answer, d_hidden=wrong[1], d_weight=wrong[2]))
    assert found[name] > 0.1


# ---- implementations ----


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", HERE)
def test_what_runs_on_a_cpu_computes_the_same(name: str, case: str) -> None:
    given = problem()
    score, asked = score_of(name, case), IMPLEMENTATIONS[name].adapt(given)
    answer = op_cases.call(CASES[case], score, asked)
    found = op_errors.errors(CASES[case], answer, asked, given, op_errors.truth(given))
    assert {"d_hidden", "d_weight"} & set(found) == {f"d_{wanted}" for wanted in CASES[case].gradients}
    assert not found.pop("far", False), found
    found.pop("logp_over_bound", None)
    assert all(value < 1e-4 for value in found.values()), found


@pytest.mark.parametrize("name", TRITON)
def test_a_backend_that_cannot_run_here_says_why(name: str) -> None:
    with pytest.raises(op_implementations.NotAvailable, match="triton"):
        IMPLEMENTATIONS[name].score(CASES["frozen"], SHAPE)


def test_pairs_padded_for_liger_hold_the_same_rows() -> None:
    given = problem()
    padded = op_implementations.padded(given)
    pairs, longest = len(given.lengths) // 2, max(given.lengths)
    assert padded.hidden.shape == (2 * pairs, longest, 16) and padded.labels.shape == (2 * pairs, longest)
    assert torch.equal(padded.hidden.flatten(0, 1)[padded.scored], given.hidden)
    assert torch.equal(padded.labels.flatten()[padded.scored], given.labels)
    assert int((padded.labels == -100).sum()) == 2 * pairs * longest - 26
    # All chosen come first.
    assert torch.equal(padded.hidden[0, : given.lengths[0]], given.hidden[: given.lengths[0]])
    assert torch.equal(padded.labels[pairs, : given.lengths[1]], given.labels[given.lengths[0] :][: given.lengths[1]])


# ---- measuring ----


class Clock:
    """Time passes when an implementation says so, and a millisecond whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def settings(clock: Clock, *only: str, **changed: Any) -> Any:
    common: dict[str, Any] = {"cases": ("no_gradient",), "rounds": 2, "sets": 2, "threads": 1, "limit_s": 60.0}
    common |= {"until": float("inf"), "with_errors": True, "with_memory": False, "clock": clock}
    return ops.Settings(only=only, **{**common, **changed})


def invented(name: str, token_logps: Any, **fields: Any) -> Any:
    build = fields.pop("build", lambda case, shape: op_implementations.per_token(token_logps, case))
    return op_implementations.Implementation(name=name, build=build, **fields)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock, and implementations that fail in every way there is."""
    wound = Clock()
    definition = op_implementations.definition

    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this card")

    def slow(*given: Tensor) -> Tensor:
        wound.now += 130
        return definition(*given)

    def quick(*given: Tensor) -> Tensor:
        wound.now += 1
        return definition(*given)

    def no_import(case: Any, shape: Any) -> Any:
        raise ImportError("cannot import name 'kernel'")

    for entry in (
        invented("broken", broken),
        invented("slow", slow),
        invented("quick", quick),
        invented("wrong", lambda *given: definition(*given) + 1.0, note="off by one"),
        invented("absent", definition, packages=("no_such_package",)),
        invented("elsewhere", definition, cuda_only=True),
        invented("other", definition, cannot={"no_gradient": "does something else"}),
        invented("renamed", None, build=no_import),
        invented("native", quick, multiplies_given_dtype=False),
    ):
        monkeypatch.setitem(IMPLEMENTATIONS, entry.name, entry)
    return wound


def statuses(records: list[dict[str, Any]]) -> dict[str, str]:
    return {record["implementation"]: record["status"] for record in records}


def test_every_implementation_has_a_record_that_says_what_became_of_it(clock: Clock) -> None:
    names = ("broken", "slow", "quick", "wrong", "absent", "elsewhere", "other", "renamed")
    records = list(ops.measure_shape(SHAPE, settings(clock, *names), emulated=False, slow=True))
    assert statuses(records) == {
        "floor": "measured",
        "broken": "failed: RuntimeError: no kernel for this card",
        "slow": "not measured: one call took 130 s",
        "quick": "measured",
        "wrong": "measured",
        "absent": "n/a: no_such_package is not installed",
        "elsewhere": "n/a: its kernels run on CUDA only",
        "other": "n/a: does something else",
        "renamed": "failed: ImportError: cannot import name 'kernel'",
    }
    by_name = {record["implementation"]: record for record in records}
    assert by_name["quick"]["median_ms"] == pytest.approx(1001) and by_name["quick"]["rounds"] == 2
    assert by_name["wrong"]["errors"]["far"] and not by_name["quick"]["errors"]["far"]
    assert all("median_ms" not in record for record in records if record["status"] != "measured")
    text = ops.show(records)
    assert all(name in text for name in statuses(records))
    assert "one call took 130 s" in text and " WRONG" in text and "wrong: off by one" in text
    # A fast wrong answer: its time stands there, and no ratio.
    assert by_name["wrong"]["unquotable"].startswith("log-probs are") and by_name["quick"]["unquotable"] is None
    assert "no ratio for wrong: log-probs are" in text
    line = next(line.split() for line in text.splitlines() if line.startswith("wrong "))
    assert line[3] == "-" and float(next(row.split()[3] for row in text.splitlines() if row.startswith("quick ")))
    json.dumps(records, allow_nan=False)


@pytest.mark.parametrize("case", ["frozen", "trainable", "preference_loss"])
def test_what_no_rounding_explains_is_wrong_and_what_rounding_explains_is_not(case: str) -> None:
    shape = replace(SHAPE, dtype="bfloat16")
    given, right = problem(shape), op_implementations.IMPLEMENTATIONS["naive"]
    exact = op_errors.truth(given)
    answer = op_cases.call(CASES[case], right.score(CASES[case], shape), given)
    assert "wrong" not in op_errors.errors(CASES[case], answer, given, given, exact)  # naive, bfloat16
    off = replace(answer, out=answer.out + 1.0)
    assert "off" in op_errors.errors(CASES[case], off, given, given, exact)["wrong"]
    turned = replace(answer, d_hidden=-answer.d_hidden)
    assert "d_hidden is off by 2" in op_errors.errors(CASES[case], turned, given, given, exact)["wrong"]
    if answer.d_weight is not None:
        scaled = replace(answer, d_weight=1.2 * answer.d_weight)
        assert "d_weight is off" in op_errors.errors(CASES[case], scaled, given, given, exact)["wrong"]
    lost = replace(answer, out=answer.out * math.nan)
    assert "wrong" in op_errors.errors(CASES[case], lost, given, given, exact)


def test_the_chunked_definition_and_the_one_in_float32_are_the_definition() -> None:
    shape = replace(SHAPE, rows=1100, dtype="bfloat16")
    given = problem(shape)
    wanted = op_implementations.definition(given.hidden, given.weight, given.labels)
    assert torch.equal(op_implementations.in_chunks(given.hidden, given.weight, given.labels), wanted)
    exact = op_errors.truth(given)
    case = CASES["frozen"]
    answer = op_cases.call(case, IMPLEMENTATIONS["naive float32"].score(case, shape), given)
    assert not op_errors.errors(case, answer, given, given, exact)["far"]
    with pytest.raises(op_implementations.NotAvailable, match="the same as naive"):
        IMPLEMENTATIONS["naive float32"].score(case, SHAPE)


def test_a_smoke_run_measures_every_case(tmp_path: Path) -> None:
    arguments = ["--smoke", "--threads", "1", "--folder", str(tmp_path), "--only", "engine tiled", "naive"]
    assert ops.main(arguments) == 0
    (path,) = tmp_path.rglob("*-ops.jsonl")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {(r["case"], r["implementation"]) for r in found} == {
        (case, name) for case in CASES for name in ("floor", "engine tiled", "naive")
    }
    assert all(r["status"] == "measured" and "unquotable" in r for r in found if r["implementation"] != "floor")


def test_a_case_that_finds_no_time_is_not_measured(clock: Clock) -> None:
    late = settings(clock, "quick", cases=("no_gradient", "frozen"), until=2.5, rounds=50)
    records = list(ops.measure_shape(SHAPE, late, emulated=False, slow=True))
    assert [(r["case"], r["status"][:12]) for r in records if r["implementation"] == "quick"] == [
        ("no_gradient", "measured"),
        ("frozen", "measured"),
    ]
    # 2.5 s: the first case ends its rounds at half of it, the second at the end; one round each is always done.
    assert [r["rounds"] for r in records if r["implementation"] == "quick"] == [1, 1]
    clock.now = 100.0
    records = list(ops.measure_shape(SHAPE, late, emulated=False, slow=True))
    assert set(statuses(records).values()) == {"not measured: the time that was given is used up"}
    assert len(records) == 4


def test_a_dtype_that_is_emulated_is_left_to_those_that_look_for_another(clock: Clock) -> None:
    shape = replace(SHAPE, dtype="bfloat16")
    asked = settings(clock, "quick", "native", "absent")
    quickly = statuses(list(ops.measure_shape(shape, asked, emulated=True, slow=False)))
    assert quickly == {
        "float32 floor": "measured",
        "quick": "not measured: multiplies in bfloat16, which this CPU emulates",
        "native": "measured",
        "absent": "n/a: no_such_package is not installed",
    }
    all_of_them = list(ops.measure_shape(shape, asked, emulated=True, slow=True))
    assert {name for name, status in statuses(all_of_them).items() if status == "measured"} == {
        "floor", "float32 floor", "quick", "native",
    }  # fmt: skip
    native = next(record for record in all_of_them if record["implementation"] == "native")
    assert {"over_floor", "over_float32_floor"} <= set(native)


def test_memory_is_what_a_call_takes_beyond_its_results() -> None:
    """Logits of 512 rows by 20000 words are 39 MiB; a tile is 8."""
    shape = replace(SHAPE, rows=512, vocabulary=20000)
    logits = 512 * 20000 * 4 / 2**20
    naive = op_memory.in_fresh_process("naive", CASES["frozen"], shape, threads=1)
    ours = op_memory.in_fresh_process("engine tiled", CASES["frozen"], shape, threads=1)
    assert naive["extra_mb"] > 1.9 * logits
    assert ours["extra_mb"] < 0.7 * logits
    assert naive["results_mb"] == ours["results_mb"] == round((512 * 16 + 512) * 4 / 2**20, 1)


# ---- the roofline ----


def test_what_bounds_a_call_on_a_known_card_is_arithmetic() -> None:
    shape = op_cases.Shape(rows=8192, hidden=4096, vocabulary=128256, dtype="bfloat16", device="cuda")
    found = roofline.roofline(CASES["frozen"], shape, roofline.card_of("NVIDIA H200"))
    assert found["matrix_ms"] == pytest.approx(2 * 2 * 8192 * 4096 * 128256 / 989.4e12 * 1e3, rel=1e-3)
    assert found["memory_ms"] == pytest.approx(2 * (128256 * 4096 + 2 * 8192 * 4096) / 4.8e12 * 1e3, rel=1e-3)
    assert found["exp_ms"] == pytest.approx(8192 * 128256 / (132 * 16 * 1.98e9) * 1e3, rel=1e-3)
    assert found["bound"] == "matrix"
    few = roofline.roofline(CASES["no_gradient"], replace(shape, rows=16), roofline.card_of("NVIDIA H100 80GB HBM3"))
    assert few["bound"] == "memory"


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "", None])
def test_nothing_is_guessed_for_a_card_that_is_not_known(name: str | None) -> None:
    assert roofline.card_of(name) is None


def test_cards_are_told_apart() -> None:
    assert roofline.card_of("NVIDIA H100 PCIe").memory_tb_per_s == 2.0
    assert roofline.card_of("NVIDIA H100 80GB HBM3").memory_tb_per_s == 3.35
    assert roofline.card_of("NVIDIA A100-SXM4-40GB").memory_tb_per_s == 1.555
    assert roofline.card_of("NVIDIA GeForce RTX 4090").sms == 128
