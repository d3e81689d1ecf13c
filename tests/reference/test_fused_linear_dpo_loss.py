"""Does `FusedLinearDPOLoss` give what Liger's class gives, and what its formula gives in float64, in value and gradient?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_engine import FusedLinearDPOLoss
from dpo_engine.errors import ConfigError
from dpo_engine.losses import LOSSES, PairStats
from support.head_distributions import normal, random_labels
from support.loss_formulas import FORMULAS

PAIRS, T, D, V, RANK = 3, 7, 16, 61, 4
NAMES = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logits_mean",
    "rejected_logits_mean",
    "nll_loss",
    "chosen_rewards",
    "rejected_rewards",
)


def case(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Hidden states, heads and labels of the policy and a reference; prompts and padding are ignored."""
    target = random_labels(2 * PAIRS * T, V).view(2 * PAIRS, T)
    target[:, :2] = -100
    for row, length in enumerate((5, 7, 4, 7, 3, 6)):
        target[row, length:] = -100
    tensors = {
        "lin_weight": normal(V, D, seed=1),
        "_input": normal(2 * PAIRS, T, D, seed=2),
        "bias": normal(V, seed=3),
        "ref_input": normal(2 * PAIRS, T, D, seed=4),
        "ref_weight": normal(V, D, seed=5),
        "ref_bias": normal(V, seed=6),
    }
    return {"target": target, **{name: tensor.to(dtype) for name, tensor in tensors.items()}}


def outcome(loss_function: Any, given: dict[str, Tensor], **more: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`(loss and metrics, gradients)` under an upstream gradient of 1.7."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("lin_weight", "_input", "bias") if name in given}
    loss, metrics = loss_function(**{**given, **leaves}, **more)
    (1.7 * loss).backward()
    values = {"loss": loss.detach(), **dict(zip(NAMES, metrics, strict=True))}
    return values, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def by_definition(
    given: dict[str, Tensor], *, beta: float, smoothing: float = 0.0, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """(conservative) DPO from full logits."""

    def sums(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = scale * (hidden @ weight.T + bias)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        scored = given["target"] != -100
        labels = given["target"].clamp_min(0)[..., None]
        return (logits.log_softmax(-1).gather(-1, labels).squeeze(-1) * scored).sum(-1)

    policy = sums(given["_input"], given["lin_weight"], given["bias"])
    reference = sums(given["ref_input"], given["ref_weight"], given["ref_bias"]).detach()
    ratio = policy - reference
    margin = beta * (ratio[:PAIRS] - ratio[PAIRS:])
    return (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.5, "use_ref_model": False},
        {"average_log_prob": True, "beta": 2.0},
        {"compute_nll_loss": True, "alpha": 0.3, "chunk_size": 2},
        {"loss_type": "bco_pair", "beta": 0.05},
    ],
    ids=["defaults", "no reference", "means", "with nll", "bco_pair"],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_metrics_and_gradients_are_those_of_ligers_class(settings: dict[str, Any], with_bias: bool) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    given = {name: value for name, value in case().items() if with_bias or "bias" not in name}
    theirs = outcome(LigerFusedLinearDPOLoss(**settings, compiled=False), given)
    if settings.get("use_ref_model") is False:
        given = {name: value for name, value in given.items() if not name.startswith("ref_")}
    ours = outcome(FusedLinearDPOLoss(**settings, compiled=False), given)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name].shape == value.shape, name
            torch.testing.assert_close(mine[name], value, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert set(ours[1]) == {"lin_weight", "_input", *(["bias"] if with_bias else [])}


def test_ligers_arguments_and_defaults_are_ours() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    import inspect

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    for name in ("__init__", "forward"):
        theirs = list(inspect.signature(getattr(LigerFusedLinearDPOLoss, name)).parameters.values())
        ours = list(inspect.signature(getattr(FusedLinearDPOLoss, name)).parameters.values())[: len(theirs)]
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({}, {}),
        ({"label_smoothing": 0.2}, {"smoothing": 0.2}),
        ({"logit_scale": 0.4, "softcap": 3.0}, {"scale": 0.4, "cap": 3.0}),
    ],
    ids=["plain", "label smoothing", "softcap"],
)
def test_value_and_gradients_are_those_of_the_formula_in_float64(
    settings: dict[str, Any], formula: dict[str, Any]
) -> None:
    given = case(torch.float64)
    found, gradients = outcome(FusedLinearDPOLoss(beta=0.3, **settings), given)
    leaves = {name: given[name].clone().requires_grad_() for name in gradients}
    expected = by_definition({**given, **leaves}, beta=0.3, **formula)
    (1.7 * expected).backward()
    torch.testing.assert_close(found["loss"], expected.detach())
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name], leaf.grad)


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_reference_may_be_given_as_log_probs(per_token: bool, means: bool) -> None:
    given = case()
    function = FusedLinearDPOLoss(average_log_prob=means)
    expected, gradients = outcome(function, given)
    policy = {name: value for name, value in given.items() if not name.startswith("ref_")}
    tokens = torch.log_softmax(given["ref_input"] @ given["ref_weight"].T + given["ref_bias"], -1)
    tokens = tokens.gather(-1, given["target"].clamp_min(0)[..., None]).squeeze(-1)
    scored = given["target"] != -100
    sums = (tokens * scored).sum(-1) / (scored.sum(-1) if means else 1)
    # What stands at ignored tokens does not matter.
    reference = tokens.masked_fill(~scored, float("nan")) if per_token else sums
    found, same = outcome(function, policy, ref_chosen_logps=reference[:PAIRS], ref_rejected_logps=reference[PAIRS:])
    for mine, other in ((found, expected), (same, gradients)):
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-5)


def test_a_reference_that_trains_takes_no_gradient() -> None:
    given = case()
    given["ref_weight"].requires_grad_()
    outcome(FusedLinearDPOLoss(), given)
    assert given["ref_weight"].grad is None


def test_lora_on_the_head_is_a_weight_that_was_merged() -> None:
    given = case(torch.float64)
    a, b = normal(RANK, D, seed=7).double(), normal(V, RANK, seed=8).double()
    merged = {**given, "lin_weight": given["lin_weight"] + b @ a}
    expected, gradients = outcome(FusedLinearDPOLoss(compute_nll_loss=True), merged)
    adapter = a.clone().requires_grad_(), b.clone().requires_grad_()
    inner = given["_input"] @ adapter[0].T
    loss, metrics = FusedLinearDPOLoss(compute_nll_loss=True)(**given, lora=(inner, adapter[1]))
    (1.7 * loss).backward()
    torch.testing.assert_close(loss.detach(), expected["loss"])
    for name, value in zip(NAMES, metrics, strict=True):
        torch.testing.assert_close(value, expected[name])
    torch.testing.assert_close(adapter[1].grad, gradients["lin_weight"] @ a.T)
    torch.testing.assert_close(adapter[0].grad, b.T @ gradients["lin_weight"])


def test_ipo_divides_by_lengths_once_whether_given_sums_or_means() -> None:
    given = case()
    sums, _ = outcome(FusedLinearDPOLoss(loss_type="ipo", beta=0.2), given)
    means, _ = outcome(FusedLinearDPOLoss(loss_type="ipo", beta=0.2, average_log_prob=True), given)
    torch.testing.assert_close(sums["loss"], means["loss"])
    plain, _ = outcome(FusedLinearDPOLoss(loss_type="ipo", beta=0.2, ipo_reduction="sum"), given)
    assert not torch.isclose(plain["loss"], sums["loss"])


def test_ld_dpo_weighs_the_tokens_beyond_the_shorter_completion() -> None:
    given = case(torch.float64)
    scored = given["target"] != -100
    shorter = torch.minimum(*scored.sum(-1).chunk(2)).repeat(2)
    weights = torch.where(scored.cumsum(-1) - 1 < shorter[:, None], 1.0, 0.25) * scored
    labels = given["target"].clamp_min(0)[..., None]

    def sums(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ((hidden @ weight.T + bias).log_softmax(-1).gather(-1, labels).squeeze(-1) * weights).sum(-1)

    ratio = sums(given["_input"], given["lin_weight"], given["bias"])
    ratio = ratio - sums(given["ref_input"], given["ref_weight"], given["ref_bias"])
    found, _ = outcome(FusedLinearDPOLoss(loss_type="ld_dpo", ld_alpha=0.25), given)
    torch.testing.assert_close(found["loss"], -logsigmoid(0.1 * (ratio[:PAIRS] - ratio[PAIRS:])).mean())
    with pytest.raises(ValueError, match="expected reference log-probs of tokens"):
        policy = {name: value for name, value in given.items() if not name.startswith("ref_")}
        sums_of_three = torch.zeros(PAIRS)
        outcome(
            FusedLinearDPOLoss(loss_type="ld_dpo", ld_alpha=0.25),
            policy,
            ref_chosen_logps=sums_of_three,
            ref_rejected_logps=sums_of_three,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ipoo"}, "loss_type='ipoo' is not built; did you mean 'ipo'"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 is no parameter of loss_type='ipo'"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0\.5 is out of range; expected .* of at least 0 and below 0\.5"),
        ({"beta": 0.0}, r"beta=0\.0 is out of range; expected a finite number above 0"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 is no parameter of loss_type='sigmoid'"),
        ({"ld_alpha": 0.1}, "ld_alpha=0.1 is no parameter of loss_type='sigmoid'"),
        ({"loss_type": "ld_dpo", "ld_alpha": 1.5}, r"ld_alpha=1\.5 is out of range; expected .* of at most 1"),
        ({"loss_type": "kto"}, "loss_type='kto' is no loss of pairs; expected one of"),
        ({"loss_type": "plackett_luce"}, "loss_type='plackett_luce' is no loss of pairs; expected one of"),
        ({"loss_type": "tdpo"}, "loss_type='tdpo' needs whole distributions; expected one of"),
    ],
)
def test_a_setting_that_would_be_ignored_or_is_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FusedLinearDPOLoss(**settings)


@pytest.mark.parametrize(
    ("settings", "dropped", "message"),
    [
        ({"use_ref_model": False}, (), "ref_input, ref_weight, ref_bias came to a loss without a reference"),
        ({}, ("ref_input", "ref_weight", "ref_bias"), "the reference is missing"),
        ({}, ("ref_weight", "ref_bias"), "the reference is ref_input; expected ref_input and ref_weight"),
    ],
)
def test_half_a_reference_or_one_too_many_is_refused(
    settings: dict[str, Any], dropped: tuple[str, ...], message: str
) -> None:
    given = {name: value for name, value in case().items() if name not in dropped}
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss(**settings)(**given)


def stats_by_definition(given: dict[str, Tensor], *, with_reference: bool) -> PairStats:
    """What a loss reads of these pairs, from full logits; without a reference it is 0."""
    scored = given["target"] != -100
    labels = given["target"].clamp_min(0)[..., None]
    lengths = scored.sum(-1)
    public = scored & (scored.cumsum(-1) <= torch.minimum(*lengths.chunk(2)).repeat(2)[:, None])
    fields: dict[str, Tensor] = {}
    for owner, under in (("", ""), ("reference_", "ref_")):
        hidden = given["ref_input" if under else "_input"]
        weight, bias = given["ref_weight" if under else "lin_weight"], given["ref_bias" if under else "bias"]
        logps = (hidden @ weight.T + bias).log_softmax(-1)
        tokens = logps.gather(-1, labels).squeeze(-1) * (with_reference or not under)
        confidence = tokens - logps.mul(2).exp().sum(-1).log()
        for side, half in (("chosen", slice(None, PAIRS)), ("rejected", slice(PAIRS, None))):
            fields[f"{owner}{side}_logps"] = (tokens * scored).sum(-1)[half]
            fields[f"{owner}{side}_public_logps"] = (tokens * public).sum(-1)[half]
            if not under:
                fields[f"{side}_lengths"] = lengths[half].double()
                fields[f"{side}_confidence"] = ((confidence * scored).sum(-1) / lengths)[half].detach()
    return PairStats(**fields)


FUSED = sorted(name for name, method in LOSSES.items() if method.needs is PairStats and not method.token_kl)


@pytest.mark.parametrize("use_reference", [True, False], ids=["a reference", "none"])
@pytest.mark.parametrize("name", FUSED)
def test_every_method_of_pairs_is_its_formula_of_full_logits(name: str, use_reference: bool) -> None:
    given, method = case(torch.float64), LOSSES[name]
    with_reference = use_reference and method.needs_reference
    beta = method.settings(None).get("beta", 0.1)
    passed = given if with_reference else {key: value for key, value in given.items() if not key.startswith("ref_")}
    found, gradients = outcome(FusedLinearDPOLoss(loss_type=name, beta=beta, use_ref_model=use_reference), passed)
    leaves = {key: given[key].clone().requires_grad_() for key in gradients}
    stats = stats_by_definition({**given, **leaves}, with_reference=with_reference)
    expected = FORMULAS[name](stats, **({"beta": beta} if "beta" in method.uses else {})).mean()
    torch.testing.assert_close(found["loss"], expected.detach())
    (1.7 * expected).backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(gradients[key], leaf.grad)


@pytest.mark.parametrize("name", FUSED)
def test_what_is_not_given_is_the_methods_own_value(name: str) -> None:
    given, method = case(torch.float64), LOSSES[name]
    if not method.needs_reference:
        given = {key: value for key, value in given.items() if not key.startswith("ref_")}
    own = {key: value for key, value in method.settings(None).items() if key != "beta"}
    plain, _ = outcome(FusedLinearDPOLoss(loss_type=name), given)
    written_out, _ = outcome(FusedLinearDPOLoss(loss_type=name, **own), given)
    assert torch.equal(plain["loss"], written_out["loss"])
    assert "ld_alpha" not in own or own["ld_alpha"] == 0.5
