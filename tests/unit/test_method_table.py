"""Does the table have every method with what it needs and can be told, and refuse all else?"""

from __future__ import annotations

import ast
import inspect
import logging
import math
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import dpo_engine.losses as losses
from dpo_engine.errors import ConfigError
from dpo_engine.losses import (
    ALIASES,
    LOSSES,
    ListStats,
    Method,
    PairStats,
    UnpairedStats,
    get_method,
    pairwise,
    ranked,
    reference_free,
    table,
    unpaired,
)
from dpo_engine.losses.parameters import Parameter
from dpo_engine.losses.table import parameter_names
from support.loss_formulas import stats_of

NAMES = """dpo dpo_norm cdpo rdpo ipo hinge dpo_nll dpop apo_zero apo_down nca exo sppo bco aot discopop f_dpo ld_dpo r_dpo wpo
    tr_dpo tdpo cpo simpo orpo sft kto plackett_luce""".split()

OWN_VALUES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "dpo_norm": {"beta": 5.0},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "rdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1, "ipo_reduction": "mean"},
    "hinge": {"beta": 0.1},
    "dpo_nll": {"beta": 0.1, "rpo_alpha": 1.0},
    "dpop": {"beta": 0.1, "dpop_lambda": 50.0},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "nca": {"beta": 0.01},
    "exo": {"beta": 0.1, "label_smoothing": 1e-3},
    "sppo": {"beta": 1e-3},
    "bco": {"beta": 0.01},
    "aot": {"beta": 0.01, "label_smoothing": 0.0},
    "discopop": {"beta": 0.05, "discopop_tau": 0.05},
    "f_dpo": {"beta": 0.1, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5},
    "ld_dpo": {"beta": 0.1, "ld_alpha": 0.5},
    "r_dpo": {"beta": 0.1, "r_dpo_alpha": 0.01},
    "wpo": {"beta": 0.01},
    "tr_dpo": {"beta": 0.1, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512},
    "tdpo": {"beta": 0.1, "tdpo_alpha": 0.5},
    "cpo": {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5},
    "orpo": {"beta": 0.1},
    "sft": {},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "plackett_luce": {"beta": 0.1},
}

NEEDS: dict[str, set[str]] = {  # beside pairs and a reference whose log-probs can be known beforehand
    "ld_dpo": {"public_part"},
    "wpo": {"extras"},
    "tdpo": {"token_kl"},
    "tr_dpo": {"moving_reference"},
    "bco": {"whole_step", "baseline"},
    "aot": {"whole_step"},
    "kto": {"mismatched"},
}
NO_REFERENCE = {"cpo", "simpo", "orpo", "sft"}
PER_TOKEN = {"dpo_norm", "simpo", "orpo", "sft"}


@pytest.fixture
def made(tmp_path: Path) -> Any:
    pytest.importorskip("transformers")
    from dpo_engine import DPOConfig

    return lambda **settings: DPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


# ---- names ----


def test_the_table_has_these_methods_under_their_names() -> None:
    assert list(LOSSES) == NAMES and len(NAMES) == 28
    assert all(method.name == name for name, method in LOSSES.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_says_what_it_needs_and_no_more(name: str) -> None:
    method = LOSSES[name]
    assert method.needs is {"kto": UnpairedStats, "plackett_luce": ListStats}.get(name, PairStats)
    assert method.needs_reference == (name not in NO_REFERENCE)
    flags = ("public_part", "token_kl", "extras", "moving_reference", "mismatched", "whole_step", "baseline")
    assert {flag for flag in flags if getattr(method, flag)} == NEEDS.get(name, set())
    assert method.known_beforehand == (name not in NO_REFERENCE | {"tr_dpo", "tdpo"})
    assert method.reward_per_token == (name in PER_TOKEN)
    assert method.parts == ()


@pytest.mark.parametrize(("theirs", "ours"), ALIASES.items())
def test_trls_names_resolve_and_say_what_they_are_here(
    theirs: str, ours: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert theirs not in NAMES
    for look_up in (LOSSES.__getitem__, get_method):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="dpo_engine"):
            assert look_up(theirs) is LOSSES[ours]
        assert caplog.messages == [f"{theirs!r} is TRL's name; here the method is {ours!r}"]


def test_a_name_of_our_own_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert all(get_method(name) is LOSSES[name] for name in NAMES)
    assert not caplog.messages


def test_aliases_are_those_of_the_table_of_trls_losses() -> None:
    pytest.importorskip("transformers")
    from dpo_engine.train.trl_names import LOSS_TYPES

    differ = {name: entry.method for name, entry in LOSS_TYPES.items() if entry.method and entry.method != name}
    assert differ == ALIASES


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("simgoid", "sigmoid"),
        ("dpoo", "dpo"),
        ("simp", "simpo"),
        ("plackett-luce", "plackett_luce"),
        ("sppo_hrd", "sppo_hard"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    for look_up in (LOSSES.__getitem__, get_method):
        with pytest.raises(
            ConfigError, match=rf"method='{name}' is not known; did you mean '{nearest}'\? expected one of"
        ):
            look_up(name)
    assert name not in LOSSES and LOSSES.get(name) is None


def test_a_name_like_no_other_is_refused_with_all() -> None:
    with pytest.raises(ConfigError) as caught:
        get_method("xqzw")
    assert "did you mean" not in str(caught.value) and all(name in str(caught.value) for name in NAMES)


# ---- parameters ----

each_parameter = pytest.mark.parametrize(
    ("name", "parameter"),
    [(name, parameter) for name in NAMES for parameter in LOSSES[name].parameters],
    ids=lambda x: getattr(x, "name", x),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [None, SimpleNamespace(), "Nones"], ids=["no config", "nothing in it", "all None"])
def test_what_is_not_given_is_the_methods_own(name: str, config: Any) -> None:
    if config == "Nones":
        config = SimpleNamespace(**dict.fromkeys(parameter_names()))
    method, stats = LOSSES[name], stats_of(name, hard=False)
    assert method.settings(config) == OWN_VALUES[name] and method.uses == set(OWN_VALUES[name])
    written_out = SimpleNamespace(**OWN_VALUES[name])
    assert torch.equal(method(stats, config), method(stats, written_out))
    method.check(config)


@each_parameter
def test_every_parameter_changes_its_methods_loss(name: str, parameter: Parameter) -> None:
    if parameter.name.startswith("ref_model_"):
        return  # of the reference's moves, not of the loss
    others: dict[str, Any] = {"f_divergence_type": "alpha_divergence"} if parameter.name.startswith("f_alpha") else {}
    value = {"ipo_reduction": "sum", "f_divergence_type": "forward_kl"}.get(parameter.name, 0.37)
    stats = stats_of(name, hard=False)
    before = LOSSES[name](stats, SimpleNamespace(**others))
    after = LOSSES[name](stats, SimpleNamespace(**others, **{parameter.name: value}))
    assert not torch.allclose(before, after)


def out_of_range(parameter: Parameter) -> list[Any]:
    if parameter.choices:
        return ["", "sums", 1, "REVERSE_KL"]
    found: list[Any] = [math.nan, math.inf, -math.inf, True, "0.1", [0.1], *parameter.excludes]
    if math.isfinite(parameter.lowest):
        found += [parameter.lowest - 1e-6, parameter.lowest - 1]
    if math.isfinite(parameter.highest):
        found += [parameter.highest + 1e-6, parameter.highest + 1]
    return found


@each_parameter
def test_a_value_out_of_range_is_refused_with_what_is_expected(name: str, parameter: Parameter) -> None:
    message = f"{parameter.name}={{!r}} is out of range; expected {parameter.expected}"
    for value in out_of_range(parameter):
        with pytest.raises(ConfigError, match=re.escape(message.format(value))):
            LOSSES[name].check(SimpleNamespace(**{parameter.name: value}))
    for value in (*parameter.choices, parameter.default):
        LOSSES[name].check(SimpleNamespace(**{parameter.name: value}))


def test_ranges_are_the_papers() -> None:
    def takes(name: str, parameter: str, value: Any) -> bool:
        try:
            LOSSES[name].check(SimpleNamespace(**{parameter: value}))
        except ConfigError:
            return False
        return True

    for name in NAMES:
        if "beta" in LOSSES[name].uses:
            assert not takes(name, "beta", 0) and not takes(name, "beta", -0.1) and takes(name, "beta", 1e-6)
        if "label_smoothing" in LOSSES[name].uses:
            assert not takes(name, "label_smoothing", 0.5) and takes(name, "label_smoothing", 0.49)
            assert takes(name, "label_smoothing", 0.0) == (name != "exo")  # at 0 its divergence is infinite
    assert not takes("f_dpo", "f_alpha_divergence_coef", 1) and takes("f_dpo", "f_alpha_divergence_coef", -3)
    assert takes("ld_dpo", "ld_alpha", 0) and takes("ld_dpo", "ld_alpha", 1) and not takes("ld_dpo", "ld_alpha", 1.1)
    assert not takes("tr_dpo", "ref_model_mixup_alpha", 0) and takes("tr_dpo", "ref_model_mixup_alpha", 1)
    assert not takes("tr_dpo", "ref_model_sync_steps", 0) and takes("tr_dpo", "ref_model_sync_steps", 1)
    assert not takes("tr_dpo", "ref_model_sync_steps", 1.5)  # steps are whole
    assert not takes("kto", "desirable_weight", 0) and not takes("discopop", "discopop_tau", 0)
    for name, parameter in (
        ("dpo_nll", "rpo_alpha"),
        ("dpop", "dpop_lambda"),
        ("cpo", "cpo_alpha"),
        ("simpo", "gamma_beta_ratio"),
    ):
        assert takes(name, parameter, 0) and not takes(name, parameter, -1)


def test_fields_of_a_configuration_are_the_tables_parameters_each_with_help_that_says_its_value() -> None:
    pytest.importorskip("transformers")
    from dpo_engine.train.method_arguments import PARAMETERS, MethodArguments

    assert set(PARAMETERS) == parameter_names()
    fields = MethodArguments.__dataclass_fields__
    for name in PARAMETERS:
        assert fields[name].default is None and fields[name].metadata["help"].strip(), name
    for method in LOSSES.values():
        for parameter in method.parameters:
            if parameter.name != "beta":
                shown = parameter.default if parameter.choices else f"{parameter.default:g}"
                assert re.search(rf"\b{re.escape(shown)}\b", fields[parameter.name].metadata["help"]), (
                    method.name,
                    parameter.name,
                )
    assert all(field.metadata["help"].strip() for field in fields.values())


SAMPLES: dict[str, Any] = {
    "beta": 0.3, "label_smoothing": 0.2, "ipo_reduction": "sum", "rpo_alpha": 0.3, "dpop_lambda": 5.0, "discopop_tau": 0.3,
    "f_divergence_type": "forward_kl", "f_alpha_divergence_coef": 0.3, "ld_alpha": 0.3, "r_dpo_alpha": 0.3,
    "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 7, "tdpo_alpha": 0.3, "cpo_alpha": 0.3, "gamma_beta_ratio": 0.3,
    "desirable_weight": 1.2, "undesirable_weight": 1.2,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_takes_a_methods_parameters_and_refuses_the_others(name: str, made: Any) -> None:
    from dpo_engine.train.method_arguments import MethodArguments

    assert set(SAMPLES) == parameter_names()
    switches = {"rpo_alpha": "dpo_nll", "ld_alpha": "ld_dpo", "f_divergence_type": "f_dpo"}
    for parameter, value in SAMPLES.items():
        beside = (
            {"f_divergence_type": "alpha_divergence"}
            if (name, parameter) == ("f_dpo", "f_alpha_divergence_coef")
            else {}
        )
        config = MethodArguments(method=name, **beside, **{parameter: value})
        if parameter in LOSSES[name].uses:
            config.settle_method()
            assert config.method == name and config.entry.settings(config)[parameter] == value
        elif name == "dpo" and parameter in switches:
            config.settle_method()
            assert config.method == switches[parameter]
        else:
            with pytest.raises(ConfigError, match=rf"{parameter}={value!r} .*the method {name} does not use it"):
                config.settle_method()
    own = made(method=name)
    assert own.entry.settings(own) == OWN_VALUES[name]
    if "beta" in LOSSES[name].uses:
        assert own.beta == OWN_VALUES[name]["beta"] and made(method=name, beta=0.3).beta == 0.3


def test_a_configuration_refuses_a_value_out_of_a_methods_range(made: Any) -> None:
    for settings in (
        {"beta": 0.0}, {"label_smoothing": 0.5}, {"method": "exo", "label_smoothing": 0.0},
        {"method": "simpo", "gamma_beta_ratio": -0.1}, {"method": "ld_dpo", "ld_alpha": 2.0},
        {"method": "ipo", "ipo_reduction": "x"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="is out of range; expected"):
            made(**settings)


def test_trls_switches_make_dpo_another_method_and_are_refused_elsewhere(made: Any) -> None:
    assert made(use_weighting=True).method == "wpo" and made(sync_ref_model=True).method == "tr_dpo"
    assert made(method="wpo", use_weighting=True).method == "wpo"
    assert made(f_divergence_type="reverse_kl").method == "dpo"
    for switch in ("use_weighting", "sync_ref_model"):
        with pytest.raises(ConfigError, match=f"{switch}=True is out of range; expected false: the method ipo"):
            made(method="ipo", **{switch: True})
    with pytest.raises(ConfigError, match=r"rpo_alpha=0\.3 .*the method ld_dpo does not use it"):
        made(ld_alpha=0.5, rpo_alpha=0.3)


# ---- mixtures ----


def of(name: str, stats: Any, config: Any = None) -> Any:
    return LOSSES[name](stats, config)


def test_a_mixture_is_the_weighted_sum_of_its_parts_each_at_its_own_values() -> None:
    stats = stats_of("dpo", hard=True)
    mixed = get_method("dpo+bco+sft", [0.8, 0.2, 1])
    assert (mixed.name, [weight for weight, _ in mixed.parts]) == ("dpo+bco+sft", [0.8, 0.2, 1.0])
    expected = 0.8 * of("dpo", stats) + 0.2 * of("bco", stats) + of("sft", stats)
    torch.testing.assert_close(mixed(stats, None), expected)
    parts = mixed.part_losses(stats, None)
    assert list(parts) == ["dpo", "bco", "sft"]
    for name, losses_of_part in parts.items():
        assert torch.equal(losses_of_part, of(name, stats))
    # What is given is every part's that has it.
    told = SimpleNamespace(beta=0.3)
    expected = 0.8 * of("dpo", stats, told) + 0.2 * of("bco", stats, told) + of("sft", stats)
    torch.testing.assert_close(mixed(stats, told), expected)
    torch.testing.assert_close(get_method(" dpo + sft ")(stats, None), of("dpo", stats) + of("sft", stats))


def test_a_mixtures_gradient_is_that_of_the_sum_and_its_parts_have_none() -> None:
    from support.loss_formulas import leaves

    stats, fields = leaves(stats_of("dpo", hard=False))
    mixed = get_method("dpo+dpop", [0.3, 2.0])
    found = torch.autograd.grad(mixed(stats, None).sum(), [fields["chosen_logps"]])[0]
    apart = [torch.autograd.grad(of(name, stats).sum(), [fields["chosen_logps"]])[0] for name in ("dpo", "dpop")]
    torch.testing.assert_close(found, 0.3 * apart[0] + 2.0 * apart[1])
    assert not any(part.requires_grad for part in mixed.part_losses(stats, None).values())


def test_a_plain_method_has_no_parts() -> None:
    assert LOSSES["dpo"].part_losses(stats_of("dpo", hard=False), None) == {}


PAIRWISE = [name for name in NAMES if name not in ("kto", "plackett_luce", "tr_dpo")]


@pytest.mark.parametrize("first", PAIRWISE)
def test_a_mixture_needs_what_its_parts_need_together(first: str) -> None:
    for second in set(PAIRWISE) - {first}:
        one, two, mixed = LOSSES[first], LOSSES[second], get_method(f"{first}+{second}")
        for flag in ("needs_reference", "public_part", "token_kl", "moving_reference", "mismatched", "whole_step"):
            assert getattr(mixed, flag) == (getattr(one, flag) or getattr(two, flag)), (second, flag)
        assert set(mixed.extras) == {*one.extras, *two.extras}
        assert mixed.uses == one.uses | two.uses
        assert (mixed.baseline is None) == ("bco" not in (first, second))
        assert mixed.known_beforehand == (mixed.needs_reference and not mixed.token_kl)


def test_a_mixtures_running_mean_is_that_of_the_part_that_has_one() -> None:
    stats, mixed = stats_of("bco", hard=False), get_method("sft+bco")
    assert mixed.baseline is not None and LOSSES["bco"].baseline is not None
    given = SimpleNamespace(beta=0.4)
    expected = LOSSES["bco"].baseline(stats, LOSSES["bco"].settings(given))
    assert torch.equal(mixed.baseline(stats, mixed.settings(given)), expected)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("dpo+kto", None, "mixes methods of different data .*dpo: PairStats, kto: UnpairedStats"),
        ("plackett_luce+sft", None, "mixes methods of different data"),
        ("tr_dpo+dpo", None, "mixes tr_dpo, whose reference moves, with dpo, whose reference does not"),
        ("dpo+dpo", None, "has a method twice"),
        ("sigmoid+dpo", None, "has a method twice"),
        ("dpo+sft", [1.0], "expected 2 finite numbers above 0"),
        ("dpo+sft", [1.0, 2.0, 3.0], "expected 2 finite numbers above 0"),
        ("dpo+sft", [1.0, 0.0], "expected 2 finite numbers above 0"),
        ("dpo+sft", [1.0, -1.0], "expected 2 finite numbers above 0"),
        ("dpo+sft", [1.0, math.nan], "expected 2 finite numbers above 0"),
        ("dpo+sft", [], "expected 2 finite numbers above 0"),
        ("dpo", [2.0], "with the one method 'dpo'; expected none"),
        ("dpo+stf", None, "method='stf' is not known; did you mean 'sft'"),
        ("dpo+", None, "method='' is not known"),
    ],
)
def test_a_mixture_that_is_none_is_refused(name: str, weights: list[float] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_method(name, weights)


def test_a_moving_reference_mixes_with_what_has_none() -> None:
    mixed = get_method("tr_dpo+sft", [1.0, 0.5])
    assert mixed.moving_reference and mixed.needs_reference and not mixed.known_beforehand


def test_a_mixture_checks_each_parts_range() -> None:
    mixed = get_method("dpo+exo")
    mixed.check(SimpleNamespace())
    mixed.check(SimpleNamespace(label_smoothing=0.1))
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.0 is out of range; expected .* above 0 and below 0\.5"):
        mixed.check(SimpleNamespace(label_smoothing=0.0))  # DPO would take it


def test_a_configuration_mixes_and_refuses_what_no_part_uses(made: Any) -> None:
    config = made(method="dpo+sft", loss_weights=[1.0, 0.2], beta=0.3)
    assert (config.method, config.entry.parts[1][0], config.beta) == ("dpo+sft", 0.2, 0.3)
    assert made(method="sigmoid+sft").method == "dpo+sft"
    assert made(method="dpo+nca").beta is None  # each its own
    with pytest.raises(ConfigError, match=r"ld_alpha=0.3 .*the method dpo\+sft does not use it"):
        made(method="dpo+sft", ld_alpha=0.3)
    with pytest.raises(ConfigError, match="loss_weights"):
        made(method="dpo", loss_weights=[2.0])


# ---- sources ----

MODULES: tuple[ModuleType, ...] = (pairwise, reference_free, unpaired, ranked, table)


def documented() -> dict[str, str]:
    """Every function that is a loss, and what it says."""
    found = {}
    for module in MODULES:
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_loss"):
                found[node.name] = ast.get_docstring(node) or ""
    return found


def test_every_loss_names_its_source() -> None:
    found = documented()
    assert len(found) >= 20 and {"dpo_loss", "kto_loss", "plackett_luce_loss", "nll_loss"} <= set(found)
    for name, text in found.items():
        assert re.search(r"arXiv:\d{4}\.\d{5}", text), f"{name}: expected a Source with an arXiv id"
        assert "Source:" in text, name


IDS = {
    "dpo": "2305.18290", "dpo_norm": "2411.15124", "rdpo": "2403.00409", "ipo": "2310.12036", "hinge": "2305.10425",
    "dpo_nll": "2404.19733", "dpop": "2402.13228", "apo_zero": "2408.06266", "nca": "2402.05369", "exo": "2402.00856",
    "sppo": "2405.00675", "bco": "2404.04656", "aot": "2406.05882", "discopop": "2406.08414", "f_dpo": "2309.16240",
    "ld_dpo": "2409.06411", "r_dpo": "2403.19159", "wpo": "2406.11827", "tr_dpo": "2404.09656", "tdpo": "2404.11999",
    "cpo": "2401.08417", "simpo": "2405.14734", "orpo": "2403.07691", "kto": "2402.01306",
}  # fmt: skip


@pytest.mark.parametrize(("name", "arxiv"), IDS.items())
def test_the_source_of_a_method_is_its_paper(name: str, arxiv: str) -> None:
    assert any(f"arXiv:{arxiv}" in inspect.getsource(module) for module in MODULES), name


def test_public_losses_are_those_of_the_package() -> None:
    ours = {name for name in losses.__all__ if name.endswith("_loss")}
    assert ours == {name for name in documented() if not name.startswith("_")}
    assert all(isinstance(method, Method) for method in LOSSES.values())


def test_settings_that_another_setting_switches_off_are_refused(made: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"f_alpha_divergence_coef=0\.3 belongs to f_divergence_type: alpha_divergence"
    ):
        made(method="f_dpo", f_alpha_divergence_coef=0.3)
    for method in ("kto", "plackett_luce"):
        with pytest.raises(ConfigError, match=f"ranked_pairs='adjacent' .*expected all with method {method}"):
            made(method=method, ranked_pairs="adjacent")
    for method in ("bco", "tr_dpo"):
        with pytest.raises(ConfigError, match="load_best_model_at_end=True"):
            made(method=method, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")


def test_nought_is_a_value_that_makes_dpo_another_method(made: Any) -> None:
    assert made(ld_alpha=0.0).method == "ld_dpo" and made(rpo_alpha=0.0).method == "dpo_nll"
