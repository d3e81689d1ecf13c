"""Is a head that bitsandbytes quantised scored as its dequantised twin would be, slab by slab?

The twin is a plain weight that bitsandbytes' own function dequantised whole, so in float32 the two must agree to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_logps, plan, weights
from support.head_distributions import normal, randn, upstream, with_bias
from support.oracle import (
    Answer,
    Case,
    assert_gradients_within_bound,
    assert_logps_within_bound,
    plain,
    truth,
)

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

D, V = 64, 600
FOUR_BITS = [
    pytest.param({"quant_type": "nf4", "blocksize": 64, "compress_statistics": False}, id="nf4"),
    pytest.param({"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}, id="nf4-nested"),
    pytest.param({"quant_type": "fp4", "blocksize": 64, "compress_statistics": True}, id="fp4-nested"),
    pytest.param({"quant_type": "nf4", "blocksize": 32, "compress_statistics": True}, id="nf4-32-nested"),
    pytest.param({"quant_type": "fp4", "blocksize": 32, "compress_statistics": False}, id="fp4-32"),
]


def four_bits(weight: Tensor, **layout: Any) -> Any:
    """What `Linear4bit` holds once it was moved to its device."""
    return bnb.nn.Params4bit(weight.clone(), requires_grad=False, **layout).to("cpu")


def eight_bits(weight: Tensor) -> Any:
    return bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to("cpu")


def quantised(weight: Tensor, layout: dict[str, Any] | None) -> Any:
    """In 8 bits where `layout` is None."""
    return eight_bits(weight) if layout is None else four_bits(weight, **layout)


def dequantised(weight: Any) -> Tensor:
    """The whole weight, by bitsandbytes."""
    if weight.dtype == torch.int8:
        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


LAYOUTS = [*FOUR_BITS, pytest.param(None, id="int8")]


def case_of(v: int = V, **head: Any) -> Case:
    return with_bias(n=21, d=D, v=v, **head) if "bias" not in head else randn(n=21, d=D, v=v, **head)


def computed_with(case: Case, weight: Tensor, *, backend: str = "tiled", **changed: Any) -> Answer:
    """A frozen head in the place of the case's weight."""
    hidden = case.hidden.detach().requires_grad_()
    logps = linear_logps(hidden, weight, case.labels, backend=backend, **{**case.head, **changed})
    logps.backward(case.upstream.to(logps.dtype))
    return Answer(logps=logps.detach(), d_hidden=hidden.grad)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantised_head_is_its_dequantised_twin_to_the_bit(layout: dict[str, Any] | None, backend: str) -> None:
    case = case_of(logit_scale=1.5, softcap=6.0)
    weight = quantised(case.weight, layout)
    twin = dequantised(weight)
    assert twin.dtype == torch.float32 and 0 < (twin - case.weight).abs().max() < 1.0
    with pytest.MonkeyPatch.context() as patch:
        # A quantised weight is cut into slabs of at most this many rows; the twin is cut alike.
        patch.setitem(plan.TILE_COLUMNS, "cpu", 256)
        ours, want = (computed_with(case, w, backend=backend) for w in (weight, twin))
    assert torch.equal(ours.logps, want.logps) and torch.equal(ours.d_hidden, want.d_hidden)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_agrees_with_float64_of_the_dequantised_weight(layout: dict[str, Any] | None) -> None:
    case = case_of()
    weight = quantised(case.weight, layout)
    case = replace(case, weight=dequantised(weight))
    exact, bound, ours = truth(case), case.bound(), computed_with(case, weight)
    assert_logps_within_bound(ours.logps, exact.logps, bound)
    assert_gradients_within_bound(ours, exact, plain(case), case, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_hidden_states_agree_with_float64(layout: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """As QLoRA runs: the weight was in this dtype when it was quantised, and is dequantised to it."""
    if dtype == torch.bfloat16 and plan.cpu_multiplies_bfloat16():
        pytest.skip("this CPU's bfloat16 GEMM rounds logits")
    case = case_of().to(dtype)
    weight = quantised(case.weight, layout)
    case = replace(case, weight=dequantised(weight).to(dtype))
    exact, bound, ours = truth(case), case.bound(), computed_with(case, weight)
    assert ours.d_hidden.dtype == dtype
    assert_logps_within_bound(ours.logps, exact.logps, bound)
    assert_gradients_within_bound(ours, exact, plain(case), case, bound)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_rounds_what_was_dequantised(layout: dict[str, Any] | None) -> None:
    case = case_of()
    weight = quantised(case.weight, layout)
    twin = dequantised(weight)
    with torch.autocast("cpu", torch.bfloat16):
        ours, want = (
            linear_logps(case.hidden, w, case.labels, bias=case.bias, backend="tiled") for w in (weight, twin)
        )
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_at_slab_edges_find_their_row(layout: dict[str, Any] | None) -> None:
    """A slab starts at a block of scales, and the label's own row is dequantised by itself."""
    v = 1000
    weight = quantised(normal(v, D, seed=2), layout)
    labels = torch.tensor([0, 1, 255, 256, 257, 511, 512, 767, 768, 998, 999])
    case = Case(
        hidden=normal(11, D, seed=1, scale=D**-0.5), weight=dequantised(weight), labels=labels, upstream=upstream(11)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.TILE_COLUMNS, "cpu", 256)
        ours, want = (computed_with(case, w) for w in (weight, case.weight))
    assert torch.equal(ours.logps, want.logps) and torch.equal(ours.d_hidden, want.d_hidden)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_never_dequantised_whole(layout: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    v, rows = 5000, []
    weight = quantised(normal(v, D, seed=2), layout)
    for name in ("dequantize_4bit", "int8_vectorwise_dequant"):
        original = getattr(bnb.functional, name)

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Tensor:
            result = original(*args, **kwargs)
            rows.append(result.numel() // D)
            return result

        monkeypatch.setattr(bnb.functional, name, counted)
    monkeypatch.setattr(plan, "SLAB_BYTES", 512 * D * 4)
    hidden = normal(16, D, seed=1).requires_grad_()
    linear_logps(hidden, weight, torch.arange(16), backend="tiled").sum().backward()
    slabs = [count for count in rows if count != 16]  # the others are the labels' own rows
    assert max(slabs) == 512 and sum(slabs) == v


def test_a_slab_starts_at_a_block_of_scales_of_scales() -> None:
    """256 rows hold a whole number of blocks whatever D is, and the scales' own blocks are looked up one by one."""
    assert weights.SLAB_MULTIPLE % 256 == 0
    weight = four_bits(normal(1500, D, seed=4), quant_type="nf4", blocksize=64, compress_statistics=True)
    parts = weights.quantised_weight(weight)
    whole = dequantised(weight)
    for first, last in ((0, 256), (256, 1500), (1280, 1500), (512, 513), (3, 4), (257, 700)):
        assert torch.equal(parts.slab(first, last), whole[first:last]), (first, last)
    index = torch.tensor([1499, 0, 7, 7, 1024])
    assert torch.equal(parts.rows(index), whole[index])
    assert parts.rows(index[:0]).shape == (0, D)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_survives_the_way_through_a_registered_operator(layout: dict[str, Any] | None) -> None:
    parts = weights.quantised_weight(quantised(normal(V, D, seed=2), layout))
    again = weights.weight_from_parts(parts.packed, parts.parts(), parts.layout())
    assert again.shape == parts.shape == (V, D)
    assert torch.equal(again.slab(256, 400), parts.slab(256, 400))


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_the_weight_of_a_layer_is_taken_as_it_is(kind: str) -> None:
    if kind == "4 bits":
        layer = bnb.nn.Linear4bit(D, V, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(D, V, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": normal(V, D, seed=3)})
    weight = layer.to("cpu").weight
    assert weights.is_quantised(weight)
    case = case_of(bias=None)
    ours, want = (computed_with(case, w) for w in (weight, dequantised(weight)))
    torch.testing.assert_close(ours.logps, want.logps, rtol=1e-6, atol=1e-5)
    assert weight.grad is None and bool((ours.d_hidden != 0).any())


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("layout", [FOUR_BITS[1], pytest.param(None, id="int8")])
def test_lora_extras_and_ignored_rows_go_with_it(layout: dict[str, Any] | None, backend: str) -> None:
    case = case_of(softcap=5.0, temperature=0.8)
    weight = quantised(case.weight, layout)
    labels = case.labels.masked_fill(torch.arange(21) % 4 == 2, -100)

    def gradients(w: Tensor) -> list[Tensor]:
        leaf = [t.requires_grad_() for t in (case.hidden.clone(), normal(21, 3, seed=5), normal(V, 3, seed=6))]
        logps, extras = linear_logps(
            leaf[0], w, labels, lora=(leaf[1], leaf[2]), extras=("entropy", "is_top1"), backend=backend, **case.head
        )
        logps.backward(case.upstream)
        return [logps.detach(), extras.entropy, extras.is_top1, *(t.grad for t in leaf)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.TILE_COLUMNS, "cpu", 256)
        for ours, want in zip(gradients(weight), gradients(dequantised(weight)), strict=True):
            assert torch.equal(ours, want)


@pytest.mark.parametrize("layout", [FOUR_BITS[0], pytest.param(None, id="int8")])
def test_shapes_that_do_not_fit_are_named_by_the_weights_own(layout: dict[str, Any] | None) -> None:
    """Not by the shape of its packed bytes."""
    weight = quantised(normal(V, D, seed=2), layout)
    with pytest.raises(ValueError, match=rf"hidden \(2, 32\), weight \({V}, {D}\), labels \(2,\) do not fit"):
        linear_logps(torch.ones(2, 32), weight, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=rf"label {V} is outside \[0, {V}\)"):
        linear_logps(torch.ones(2, D), weight, torch.tensor([0, V]))


def test_a_depth_that_no_block_divides_is_refused() -> None:
    weight = four_bits(normal(40, 96, seed=2), quant_type="nf4", blocksize=64)
    with pytest.raises(ValueError, match=r"shape \(40, 96\) in blocks of 64; expected .* D a multiple of the block"):
        linear_logps(torch.ones(2, 96), weight, torch.tensor([0, 1]))


def test_a_weight_that_was_repacked_for_inference_is_refused() -> None:
    weight = four_bits(normal(V, D, seed=2), quant_type="nf4", blocksize=64)
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"repacked for inference on this CPU; expected .* load the model anew"):
        linear_logps(torch.ones(2, D), weight, torch.tensor([0, 1]))
