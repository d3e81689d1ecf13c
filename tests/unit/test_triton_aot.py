"""Does every Triton kernel compile for the cards it will meet, and fit them?

No GPU is needed: Triton's compiler and NVIDIA's assembler run here. One variant of every kernel for every card by
default, every variant with the marker `slow`. Results are kept in pytest's cache until a kernel, Triton or what is
looked at changes. Run with `-s` to see registers and spills.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from support.aot import SHARED_LIMIT, Compiled

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("under TRITON_INTERPRET kernels are not compiled", allow_module_level=True)

from dpo_engine.kernels.tiles import EXPONENTIAL, FUSED, choose_tiles
from support.kernel_launches import OTHERS, PRODUCTS, Head, all_heads, compile_other, compile_product

CARDS = list(SHARED_LIMIT)
# 86 and 89 have the same tiles, limits and instructions; without a matrix product every card from 80 on compiles much alike.
FAST_PRODUCTS = [pytest.param(card, marks=pytest.mark.slow) if card == 86 else card for card in CARDS]
FAST_OTHERS = [card if card in (80, 90, 120) else pytest.param(card, marks=pytest.mark.slow) for card in CARDS]
MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.fixture
def remembered(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """Where compiled results are kept between runs."""
    cache = getattr(pytestconfig, "cache", None)  # absent with `-p no:cacheprovider`
    return tmp_path if cache is None else cache.mkdir("triton-aot")


def fits(compiled: Compiled, capability: int, name: str) -> None:
    print(f"{name} for sm_{capability}: {compiled}")
    assert compiled.shared <= SHARED_LIMIT[capability], name
    if compiled.registers is not None:
        assert compiled.registers <= 255, name
        assert compiled.product_loop_spills == 0, name


def fits_as_product(compiled: Compiled, capability: int, name: str, head: Head) -> None:
    fits(compiled, capability, f"{name} {head}")
    if compiled.matrix_instructions is not None:
        # For float32 a matrix instruction would be TF32, with 10 bits of mantissa.
        wanted = [] if head.dtype == "fp32" else [MATRIX_INSTRUCTION[capability]]
        assert compiled.matrix_instructions == wanted, f"{name} {head}"


@pytest.mark.parametrize("capability", FAST_PRODUCTS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_matrix_product_uses_matrix_units_without_a_spill(name: str, capability: int, remembered: Path) -> None:
    compiled = compile_product(name, capability, Head(), remembered)
    fits_as_product(compiled, capability, name, Head())
    assert not compiled.spill_loads


@pytest.mark.parametrize("capability", FAST_OTHERS)
@pytest.mark.parametrize("name", OTHERS)
def test_a_kernel_without_a_matrix_product_fits_without_a_spill(name: str, capability: int, remembered: Path) -> None:
    compiled = compile_other(name, capability, remembered)
    fits(compiled, capability, name)
    assert not compiled.spill_loads


@pytest.mark.parametrize("name", ["fold", "exponentials"])
def test_float32_is_multiplied_as_float32(name: str, remembered: Path) -> None:
    head = Head(dtype="fp32")
    fits_as_product(compile_product(name, 90, head, remembered), 90, name, head)


@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_sizes_of_one_which_a_launch_compiles_in_compile(name: str, remembered: Path) -> None:
    if name in PRODUCTS:
        compiled = compile_product(name, 90, Head(loads="ragged"), remembered, ones=True)
    else:
        compiled = compile_other(name, 90, remembered, ones=True)
    fits(compiled, 90, f"{name}, sizes of one")


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_no_variant_of_a_matrix_product_spills_in_its_loop(name: str, capability: int, remembered: Path) -> None:
    for head in all_heads(capability):
        fits_as_product(compile_product(name, capability, head, remembered), capability, name, head)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS)
def test_no_variant_of_a_tile_pass_spills(capability: int, remembered: Path) -> None:
    for bias in (False, True):
        for softcap in (False, True):
            flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
            variants = [("tile_backward", flags)]
            variants += [
                ("tile_pass", {**flags, "HAS_OUT": out, "HAS_MOMENTS": moments})
                for out in (False, True)
                for moments in (False, True)
            ]
            for name, given in variants:
                compiled = compile_other(name, capability, remembered, **given)
                fits(compiled, capability, f"{name} {given}")
                assert not compiled.spill_loads, (name, given)


@pytest.mark.parametrize("table", [FUSED, EXPONENTIAL], ids=["fused", "exponential"])
def test_a_card_without_an_entry_gets_tiles_that_fit_every_card(table: dict) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tiles = choose_tiles(table, (13, 0), dtype, descriptors=True, softcap=True)
        assert not tiles.descriptors
        operands = (tiles.rows + tiles.columns) * tiles.depth * dtype.itemsize * tiles.stages
        assert operands <= min(SHARED_LIMIT.values())
