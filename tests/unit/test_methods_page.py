"""Does docs/methods.md say what the code computes? Its equations and start values are evaluated, and the losses beside them."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dpo_engine.losses import LOSSES, ListStats, PairStats, UnpairedStats
from dpo_engine.losses.pairwise import F_DIVERGENCES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text("utf-8")
SECTIONS = {found[1]: found[0] for found in re.finditer(r"(?ms)^### `(\w+)`\n.*?(?=^##)", PAGE)}


def test_every_method_has_one_section_with_its_source_trap_and_config() -> None:
    assert sorted(SECTIONS) == sorted(LOSSES) and PAGE.count("\n### `") == len(LOSSES)
    for name, section in SECTIONS.items():
        for part in ("- Starts at: ", "- Parameters: ", "- Source: ", "- Trap: "):
            assert section.count(f"\n{part}") == 1, (name, part)
        assert f"\n- Config: [examples/methods/{name}.yaml](../examples/methods/{name}.yaml)\n" in section


def test_every_link_leads_to_a_file_or_a_heading() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"(?m)^#+ (.*)$", PAGE)
    }
    for to in re.findall(r"\]\((?!http)([^)]*)\)", PAGE):
        path, _, heading = to.partition("#")
        assert (ROOT / "docs" / path).exists() if path else heading in headings, to


@pytest.mark.parametrize("name", LOSSES)
def test_the_equation_is_what_the_method_computes(name: str) -> None:
    stats = _stats(LOSSES[name].needs)
    wanted = LOSSES[name](stats, object())
    assert len(wanted) == 1 or wanted.std() > 0
    torch.testing.assert_close(_evaluated(_equation(name), name, stats), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_start_value_is_the_loss_where_policy_and_reference_agree(name: str) -> None:
    stats, said = _at_the_start(_stats(LOSSES[name].needs)), re.search(r"- Starts at: `(.*)`", SECTIONS[name])
    if said is None:
        assert not LOSSES[name].needs_reference
        return
    found = torch.as_tensor(_evaluated(said[1], name, stats), dtype=torch.float64)
    wanted = LOSSES[name](stats, object())
    torch.testing.assert_close(found.expand_as(wanted), wanted, rtol=1e-12, atol=1e-12)


def test_the_slopes_of_f_dpo_are_those_of_the_table() -> None:
    stats, rows = _stats(PairStats), re.findall(r"(?m)^\| `(\w+)` \| `(.*)` \|$", SECTIONS["f_dpo"])
    assert [divergence for divergence, _ in rows[1:]] == list(F_DIVERGENCES)
    for divergence, slope in rows[1:]:
        config = type("Config", (), {"f_divergence_type": divergence})()
        given = {"slope": lambda u, slope=slope: eval(slope, _names("f_dpo", stats) | {"u": u})}
        wanted = LOSSES["f_dpo"](stats, config)
        torch.testing.assert_close(
            _evaluated(_equation("f_dpo"), "f_dpo", stats, given), wanted, rtol=1e-12, atol=1e-12
        )


def test_ipos_other_reduction_is_as_the_page_says() -> None:
    stats, said = _stats(PairStats), re.search(r"`ipo_reduction: sum`: `(.*?)`", SECTIONS["ipo"])
    assert said
    config = type("Config", (), {"ipo_reduction": "sum"})()
    torch.testing.assert_close(_evaluated(said[1], "ipo", stats), LOSSES["ipo"](stats, config), rtol=1e-12, atol=1e-12)


def test_discopop_pushes_margins_down_where_the_page_says_so() -> None:
    z = torch.tensor([-0.13, -0.11, 0.0, 0.07, 0.075], dtype=torch.float64)
    slopes = {tau: _slope_of_discopop(z, tau) for tau in (0.05, 0.102, 0.103)}
    assert (slopes[0.05] > 0).tolist() == [False, True, True, True, False]
    assert (
        slopes[0.05][2].item()
        == pytest.approx((1 - math.log(2)) / (4 * 0.05) - 0.75)
        == pytest.approx(0.7843, abs=1e-4)
    )
    assert slopes[0.102][2] > 0 > slopes[0.103][2]
    assert "+0.78 " in SECTIONS["discopop"] and "1.44 nats" in SECTIONS["discopop"]


def _slope_of_discopop(z: Tensor, tau: float) -> Tensor:
    """The slope in `z` with beta 0.05, by central differences."""
    config = type("Config", (), {"discopop_tau": tau})()
    step, zero = 1e-6, torch.zeros_like(z)
    ends = [
        LOSSES["discopop"](
            replace(_at_the_start(_pairs(len(z))), chosen_logps=(z + d) / 0.05, reference_chosen_logps=zero), config
        )
        for d in (step, -step)
    ]
    return (ends[0] - ends[1]) / (2 * step)


# ---- what the equations are evaluated with ----


def _equation(name: str) -> str:
    found = re.search(r"(?s)```python\n(.*?)\n```", SECTIONS[name])
    assert found, name
    return found[1]


def _evaluated(code: str, name: str, stats: Any, also: dict[str, Any] | None = None) -> Any:
    """Lines of code, the last of which is an expression."""
    names = _names(name, stats) | (also or {})
    *lines, last = code.splitlines()
    exec("\n".join(lines), names)
    value = eval(last, names)
    return value.reshape(-1) if isinstance(stats, ListStats) and isinstance(value, Tensor) else value


def _names(name: str, stats: Any) -> dict[str, Any]:
    """The words of the page."""
    known: dict[str, Any] = {field.name: getattr(stats, field.name) for field in fields(stats)}
    known |= LOSSES[name].settings(object())
    known |= {
        "logsigmoid": logsigmoid,
        "relu": relu,
        "sigmoid": torch.sigmoid,
        "where": torch.where,
        "logsumexp": torch.logsumexp,
    }
    known |= {"exp": torch.exp, "log": _log, "factorial": math.factorial}
    if isinstance(stats, PairStats):
        a, b = stats.chosen_logps - stats.reference_chosen_logps, stats.rejected_logps - stats.reference_rejected_logps
        chosen_public = stats.chosen_public_logps - stats.reference_chosen_public_logps
        rejected_public = stats.rejected_public_logps - stats.reference_rejected_public_logps
        known |= {"a": a, "b": b, "h": a - b, "public_h": chosen_public - rejected_public, "delta": stats.baseline}
        known |= {"nll": -stats.chosen_logps / stats.chosen_lengths, "slope": _log}
    elif isinstance(stats, UnpairedStats):
        known["z0"] = stats.baseline
    else:
        known["s"] = known["beta"] * (stats.logps - stats.reference_logps)
    return known


def _log(value: Any) -> Any:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _stats(kind: type) -> Any:
    torch.manual_seed(0)
    if kind is PairStats:
        return _pairs(6)
    if kind is UnpairedStats:
        logps = -30 * torch.rand(6, dtype=torch.float64)
        return UnpairedStats(
            logps=logps,
            reference_logps=logps + torch.randn(6, dtype=torch.float64),
            lengths=torch.full((6,), 9.0, dtype=torch.float64),
            desirable=torch.tensor([True, False, True, True, False, False]),
            baseline=torch.tensor(0.7, dtype=torch.float64),
        )
    logps = -30 * torch.rand(4, dtype=torch.float64)
    return ListStats(
        logps=logps,
        reference_logps=logps + 5 * torch.randn(4, dtype=torch.float64),
        lengths=torch.full((4,), 9.0, dtype=torch.float64),
        list_ids=torch.zeros(4, dtype=torch.int64),
        ranks=torch.arange(4),
        lists=1,
    )


def _pairs(count: int) -> PairStats:
    """Pairs of which everything is known, on both sides of every kink."""

    def some(scale: float, like: Tensor | None = None) -> Tensor:
        noise = scale * torch.randn(count, dtype=torch.float64)
        return -noise.abs() - 5 if like is None else like + noise

    chosen, rejected, public = some(20), some(20), [some(10), some(10)]
    return PairStats(
        chosen_logps=chosen,
        rejected_logps=rejected,
        reference_chosen_logps=some(3, chosen),
        reference_rejected_logps=some(3, rejected),
        chosen_lengths=torch.randint(1, 20, (count,)).double(),
        rejected_lengths=torch.randint(1, 20, (count,)).double(),
        chosen_public_logps=public[0],
        rejected_public_logps=public[1],
        reference_chosen_public_logps=some(2, public[0]),
        reference_rejected_public_logps=some(2, public[1]),
        chosen_confidence=0.5 * torch.randn(count, dtype=torch.float64),
        rejected_confidence=0.5 * torch.randn(count, dtype=torch.float64),
        chosen_kl=torch.rand(count, dtype=torch.float64),
        rejected_kl=torch.rand(count, dtype=torch.float64),
        baseline=torch.tensor(0.3, dtype=torch.float64),
    )


def _at_the_start(stats: Any) -> Any:
    """The same where policy and reference agree."""
    if not isinstance(stats, PairStats):
        zero = {"baseline": torch.zeros((), dtype=torch.float64)} if isinstance(stats, UnpairedStats) else {}
        return replace(stats, reference_logps=stats.logps, **zero)
    return replace(
        stats,
        reference_chosen_logps=stats.chosen_logps,
        reference_rejected_logps=stats.rejected_logps,
        reference_chosen_public_logps=stats.chosen_public_logps,
        reference_rejected_public_logps=stats.rejected_public_logps,
        chosen_kl=torch.zeros_like(stats.chosen_logps),
        rejected_kl=torch.zeros_like(stats.chosen_logps),
        baseline=torch.zeros((), dtype=torch.float64),
    )
