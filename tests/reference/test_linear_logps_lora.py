"""Is `linear_logps(lora=...)` the head `[W, B]` on `[hidden, lora_hidden]`, in value, gradients and cost?

In float64 a head with LoRA is a plain head on features put side by side. So a case of `support.head_distributions` is cut
in two: its last features play LoRA, and the truth is that of the whole case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_logps, plan
from support.call_cost import Products
from support.head_distributions import DISTRIBUTIONS, normal, randn, with_bias
from support.oracle import (
    Answer,
    Case,
    assert_gradients_within_bound,
    assert_logps_within_bound,
    plain,
    truth,
)

BF16 = torch.bfloat16
DTYPES = {"float32": torch.float32, "bfloat16": BF16, "float16": torch.float16}
# The two of 65537 and 256001 words differ from those of many tiles in time only.
NAMES = [name for name in DISTRIBUTIONS if not name.startswith(("vocabulary of 65537", "vocabulary of 256001"))]
HALF_NAMES = ["randn", "bias, scale and softcap", "confident", "logp below -130", "rising", "a block of -inf"]


@dataclass(frozen=True)
class Halves:
    """A case cut in two: which features are the head's and which are LoRA's."""

    base: Case
    lora: Case

    @classmethod
    def of(cls, case: Case, rank: int) -> Halves:
        split = case.hidden.shape[1] - rank
        parts = [
            replace(case, hidden=case.hidden[:, part], weight=case.weight[:, part])
            for part in (slice(0, split), slice(split, None))
        ]
        return cls(*parts)


def ranked(case: Case) -> int:
    return min(3, case.hidden.shape[1] - 1)


def computed_in_halves(
    halves: Halves, *, trains: str, backend: str = "tiled", autocast: bool = False
) -> tuple[Answer, Answer]:
    """`linear_logps` and its backward as `(answer of the head, answer of LoRA)`.

    Args:
        trains: letters of what takes a gradient: h hidden, l lora_hidden, w weight, b bias, B lora_weight.
    """
    base, lora = halves.base, halves.lora
    given = {"h": base.hidden, "w": base.weight, "b": base.bias, "l": lora.hidden, "B": lora.weight}
    leaf = {name: None if t is None else t.detach().requires_grad_(name in trains) for name, t in given.items()}
    with torch.autocast("cpu", BF16, enabled=autocast):
        logps = linear_logps(
            leaf["h"], leaf["w"], base.labels, lora=(leaf["l"], leaf["B"]), backend=backend, **{**base.head, "bias": leaf["b"]}
        )  # fmt: skip
    if trains:
        logps.backward(base.upstream.to(logps.dtype))
    grads = {name: None if t is None else t.grad for name, t in leaf.items()}
    for name, gradient in grads.items():
        assert gradient is None or (name in trains and gradient.dtype == given[name].dtype)
    logps = logps.detach()
    return (
        Answer(logps=logps, d_hidden=grads["h"], d_weight=grads["w"], d_bias=grads["b"]),
        Answer(logps=logps, d_hidden=grads["l"], d_weight=grads["B"]),
    )


def features(answer: Answer, part: slice) -> Answer:
    """The answer of some features only; the bias stays with those of the head."""
    return replace(answer, d_hidden=answer.d_hidden[:, part], d_weight=answer.d_weight[:, part])


def assert_both_right(ours: tuple[Answer, Answer], case: Case, *, rank: int, rounds_logits: bool = False) -> None:
    exact, unfused, bound = truth(case), plain(case), case.bound()
    assert_logps_within_bound(ours[0].logps, exact.logps, bound, unfused.logps if rounds_logits else None)
    split = case.hidden.shape[1] - rank
    halves = Halves.of(case, rank)
    for answer, half, part in zip(ours, (halves.base, halves.lora), (slice(0, split), slice(split, None)), strict=True):
        assert_gradients_within_bound(answer, features(exact, part), features(unfused, part), half, bound)
        if answer.d_hidden is not None:
            assert bool((answer.d_hidden[case.upstream == 0] == 0).all()), "a row without upstream gradient got one"


@pytest.mark.parametrize("trains", ["hlB", "hlwbB"], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", NAMES)
def test_lora_agrees_with_float64(name: str, trains: str) -> None:
    case = DISTRIBUTIONS[name]()
    rank = ranked(case)
    ours = computed_in_halves(Halves.of(case, rank), trains=trains)
    assert ours[0].d_hidden is not None and ours[1].d_weight is not None
    assert (ours[0].d_weight is not None) == ("w" in trains)
    assert_both_right(ours, case, rank=rank)


@pytest.mark.parametrize("trains", ["hlB", "hlwbB"], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", HALF_NAMES)
def test_lora_in_half_precision_agrees_with_float64(name: str, dtype: str, trains: str) -> None:
    case = DISTRIBUTIONS[name]().to(DTYPES[dtype])
    ours = computed_in_halves(Halves.of(case, 3), trains=trains)
    rounds = dtype == "bfloat16" and plan.cpu_multiplies_bfloat16()
    assert_both_right(ours, case, rank=3, rounds_logits=rounds)


@pytest.mark.parametrize("trains", ["", "hlB", "hlwbB"], ids=["no gradient", "frozen", "trainable"])
@pytest.mark.parametrize("name", [*HALF_NAMES, "transposed hidden, strided weight"])
def test_lora_over_many_tiles_agrees_with_float64(name: str, trains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 96)
    case = DISTRIBUTIONS[name]()
    assert_both_right(computed_in_halves(Halves.of(case, 3), trains=trains), case, rank=3)


@pytest.mark.parametrize("trains", ["hlB", "hlwbB"], ids=["frozen", "trainable"])
def test_bfloat16_products_cost_no_more_than_plain_torchs_error(trains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for a CPU with bfloat16 instructions, on any CPU."""
    monkeypatch.setattr(plan, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 64)
    case = with_bias(logit_scale=1.75, softcap=4.0).to(BF16)
    ours = computed_in_halves(Halves.of(case, 3), trains=trains)
    assert_both_right(ours, case, rank=3, rounds_logits=True)


@pytest.mark.parametrize("trains", ["hlB", "hlwbB"], ids=["frozen", "trainable"])
def test_under_autocast_lora_is_the_definition_on_rounded_inputs(trains: str) -> None:
    case = with_bias(v=150, logit_scale=1.5)
    ours = computed_in_halves(Halves.of(case, 3), trains=trains, autocast=True)
    assert_both_right(ours, case.to(BF16), rank=3, rounds_logits=plan.cpu_multiplies_bfloat16())


def test_under_autocast_the_definition_is_what_ordinary_layers_would_do() -> None:
    case = with_bias(v=150)
    halves = Halves.of(case, 3)
    ours, _ = computed_in_halves(halves, trains="hlB", backend="reference", autocast=True)
    with torch.autocast("cpu", BF16):
        z = torch.nn.functional.linear(halves.base.hidden, halves.base.weight, case.bias)
        z = z + torch.nn.functional.linear(halves.lora.hidden, halves.lora.weight)
    assert z.dtype == BF16
    torch.testing.assert_close(ours.logps, z.float().log_softmax(-1).gather(-1, case.labels[:, None]).squeeze(-1))


@pytest.mark.parametrize("trains", ["hlB", "hlwbB"], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", ["randn", "bias, scale and softcap", "confident", "a block of -inf"])
def test_the_definition_knows_lora(name: str, trains: str) -> None:
    case = DISTRIBUTIONS[name]()
    assert_both_right(computed_in_halves(Halves.of(case, 3), trains=trains, backend="reference"), case, rank=3)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_any_rank_stays_float64(rank: int, backend: str) -> None:
    case = with_bias(logit_scale=-0.5, softcap=3.0, temperature=1.5).to(torch.float64)
    exact = truth(case)
    for trains in ("hlB", "hlwbB"):
        base, lora = computed_in_halves(Halves.of(case, rank), trains=trains, backend=backend)
        torch.testing.assert_close(base.logps, exact.logps, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(torch.cat([base.d_hidden, lora.d_hidden], 1), exact.d_hidden, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lora.d_weight, exact.d_weight[:, -rank:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("trains", ["hlB", "hlwbB"], ids=["frozen", "trainable"])
def test_rank_zero_is_no_lora(trains: str, backend: str) -> None:
    case = with_bias(v=90)
    ours, lora = computed_in_halves(Halves.of(case, 0), trains=trains, backend=backend)
    without = linear_logps(case.hidden, case.weight, case.labels, backend=backend, **case.head)
    assert torch.equal(ours.logps, without)
    assert lora.d_hidden is not None and lora.d_hidden.shape == (len(case.labels), 0)
    assert lora.d_weight is not None and lora.d_weight.shape == (90, 0)
    exact = truth(case)
    assert_gradients_within_bound(ours, exact, plain(case), case, case.bound())


@pytest.mark.parametrize("head", [{}, {"logit_scale": -1.5, "softcap": 3.0, "temperature": 0.7}])
def test_gradients_are_those_of_finite_differences(head: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.TILE_ROWS, "cpu", 16)
    monkeypatch.setitem(plan.TILE_COLUMNS, "cpu", 8)
    case = randn(n=17, d=4, v=11, **head).to(torch.float64)
    halves = Halves.of(case, 2)
    labels = case.labels.clone()
    labels[3] = -100

    def logps(hidden: Tensor, lora_hidden: Tensor, lora_weight: Tensor, weight: Tensor = halves.base.weight) -> Tensor:
        return linear_logps(hidden, weight, labels, lora=(lora_hidden, lora_weight), backend="tiled", **case.head)

    inputs = (halves.base.hidden, halves.lora.hidden, halves.lora.weight, halves.base.weight)
    leaves = [t.clone().contiguous().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(logps, leaves)
    assert torch.autograd.gradcheck(logps, leaves[:3])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("trains", ["hlB", "hlwbB", "B", "l"])
def test_ignored_rows_are_zero_even_if_they_hold_nan(trains: str, backend: str) -> None:
    case = with_bias(v=80)
    ignored = torch.arange(len(case.labels)) % 3 == 0
    dirty = replace(
        case,
        labels=case.labels.masked_fill(ignored, -100),
        hidden=case.hidden.masked_fill(ignored[:, None], float("nan")),
        upstream=normal(len(case.labels), seed=8),
    )
    ours = computed_in_halves(Halves.of(dirty, 3), trains=trains, backend=backend)
    scored = replace(dirty.rows(~ignored), labels=case.labels[~ignored])
    want = computed_in_halves(Halves.of(scored, 3), trains=trains, backend=backend)
    for answer, alone in zip(ours, want, strict=True):
        assert bool((answer.logps[ignored] == 0).all()) and torch.equal(answer.logps[~ignored], alone.logps)
        if answer.d_hidden is not None:
            assert bool((answer.d_hidden[ignored] == 0).all()) and torch.equal(
                answer.d_hidden[~ignored], alone.d_hidden
            )
        for field in ("d_weight", "d_bias"):
            assert (getattr(answer, field) is None) == (getattr(alone, field) is None)
            if getattr(answer, field) is not None:
                assert torch.equal(getattr(answer, field), getattr(alone, field))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_score_is_zero_in_value_and_gradient(rows: int, backend: str) -> None:
    hidden, lora_hidden = (torch.full((rows, d), float("nan"), requires_grad=True) for d in (5, 2))
    weight, lora_weight = normal(7, 5, seed=1), normal(7, 2, seed=2).requires_grad_()
    labels = torch.full((rows,), -100)
    logps = linear_logps(hidden, weight, labels, lora=(lora_hidden, lora_weight), backend=backend)
    assert torch.equal(logps, torch.zeros(rows)) and logps.requires_grad
    logps.sum().backward()
    for tensor in (hidden, lora_hidden, lora_weight):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("wanted", ["h", "l", "B", "hl", "lB", "hB", "w", "wl", "bB"])
def test_each_gradient_is_the_same_whichever_others_are_asked_for(wanted: str) -> None:
    case = with_bias(logit_scale=0.5, softcap=3.0)
    halves = Halves.of(case, 3)
    frozen, trainable = (computed_in_halves(halves, trains=trains) for trains in ("hlB", "hlwbB"))
    ours = computed_in_halves(halves, trains=wanted)
    # With a frozen head the gradients of rows are made in forward, with one that trains in backward: other last bits.
    rows_from = trainable if set(wanted) & set("wb") else frozen
    want = {
        "h": rows_from[0].d_hidden,
        "l": rows_from[1].d_hidden,
        "w": trainable[0].d_weight,
        "b": trainable[0].d_bias,
    }
    want["B"] = trainable[1].d_weight
    given = {"h": ours[0].d_hidden, "l": ours[1].d_hidden, "w": ours[0].d_weight, "b": ours[0].d_bias}
    given["B"] = ours[1].d_weight
    for name, gradient in given.items():
        assert (gradient is not None) == (name in wanted)
        assert gradient is None or torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2), (0, 4)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    case = randn(n=12)
    flat = case.rows(slice(0, int(torch.tensor(shape).prod())))
    halves = Halves.of(flat, 3)
    hidden, lora_hidden = (half.hidden.reshape(*shape, half.hidden.shape[1]) for half in (halves.base, halves.lora))
    logps = linear_logps(
        hidden, halves.base.weight, flat.labels.view(shape), lora=(lora_hidden, halves.lora.weight), backend="tiled"
    )
    assert logps.shape == shape
    torch.testing.assert_close(logps.flatten().double(), truth(flat).logps, rtol=1e-5, atol=1e-5)


def test_a_gradient_reaches_a_through_dropout_and_scaling() -> None:
    """As PEFT does it: `lora_hidden = scaling * dropout(hidden) @ A.T`, of which the operator knows nothing."""
    case = with_bias(softcap=6.0).to(torch.float64)
    depth, rank, scaling = case.hidden.shape[1], 4, 2.0
    kept = (normal(*case.hidden.shape, seed=21) > -1.0).double() / 0.84

    def gradients(through_operator: bool) -> list[Tensor]:
        hidden = case.hidden.clone().requires_grad_()
        a = normal(rank, depth, seed=22, scale=depth**-0.5).double().requires_grad_()
        b = normal(len(case.weight), rank, seed=23).double().requires_grad_()
        lora_hidden = scaling * (hidden * kept) @ a.T
        if through_operator:
            logps = linear_logps(hidden, case.weight, case.labels, lora=(lora_hidden, b), backend="tiled", **case.head)
        else:
            z = hidden @ case.weight.T + lora_hidden @ b.T + case.bias
            z = 6.0 * torch.tanh(z / 6.0)
            logps = z.log_softmax(-1).gather(-1, case.labels[:, None]).squeeze(-1)
        logps.backward(case.upstream.double())
        return [hidden.grad, a.grad, b.grad]

    for given, want in zip(gradients(True), gradients(False), strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(given, want, rtol=1e-10, atol=1e-12)


def test_a_head_adapter_of_peft_gives_the_same_numbers() -> None:
    """B starts at zero, so it is filled first; otherwise A would get no gradient at all."""
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(24, 130, bias=False)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.lm_head(hidden)

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head"], lora_dropout=0.0)
    model = peft.get_peft_model(Model(), config).double()
    layer = model.base_model.model.lm_head
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    case = randn(n=20, d=24, v=130).to(torch.float64)

    def gradients(logps: Tensor) -> list[Tensor]:
        model.zero_grad()
        logps.backward(case.upstream.double())
        return [a.grad.clone(), b.grad.clone()]

    want_logps = model(case.hidden).log_softmax(-1).gather(-1, case.labels[:, None]).squeeze(-1)
    want = gradients(want_logps)
    lora_hidden = layer.scaling["default"] * case.hidden @ a.T
    logps = linear_logps(case.hidden, layer.base_layer.weight, case.labels, lora=(lora_hidden, b), backend="tiled")
    torch.testing.assert_close(logps, want_logps, rtol=1e-11, atol=1e-12)
    for given, expected in zip(gradients(logps), want, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)


N, D, V, R = 1040, 16, 9000, 8
GEMM = 2 * N * D * V


@pytest.mark.parametrize(
    "trains,forward,backward",
    [
        ("", 1, 0),
        ("hlB", 2, 1),  # a frozen head: both in forward; the tile again, for B
        ("hl", 2, 0),
        ("l", 2, 0),
        ("B", 1, 1),  # hidden states without a gradient: nothing to multiply a second time in forward
        ("hlwB", 1, 3),
        ("hlw", 1, 3),
    ],
)
def test_gemms_are_as_many_as_promised(trains: str, forward: int, backward: int) -> None:
    """The large ones; those of LoRA are r / D as large, and are counted beside."""
    given = {"h": (N, D), "w": (V, D), "l": (N, R), "B": (V, R)}
    leaf = {name: normal(*shape, seed=len(name)).requires_grad_(name in trains) for name, shape in given.items()}
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    small = R / D
    with Products() as seen:
        logps = linear_logps(leaf["h"], leaf["w"], labels, lora=(leaf["l"], leaf["B"]), backend="tiled")
    assert forward * (1 + small) <= seen.flops / GEMM < forward * (1 + small) + 0.01
    assert logps.requires_grad == bool(trains)
    if not trains:
        return
    with Products() as seen:
        logps.backward(normal(N, seed=3))
    # Each of the three products of a backward with all gradients has its small one; B alone needs two of those.
    again = ("B" in trains) or ("w" in trains)
    products = again * small
    products += small * (("w" in trains) and "l" in trains) + small * ("B" in trains)
    assert backward + products <= seen.flops / GEMM < backward + products + 0.01
