"""Does every Triton kernel compile for the cards it will meet, and fit them?

No GPU is needed: Triton's compiler and NVIDIA's assembler run here. Run with `-s` to see registers and spills.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from support.aot import SHARED_LIMIT, Compiled, compile_kernel

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("under TRITON_INTERPRET kernels are not compiled", allow_module_level=True)

from dpo_engine.kernels import lse_forward, tile_pass

HOPPER, ADA = 90, 89
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compile_fold(capability: int, dtype: str, folder: Path, **flags: Any) -> Compiled:
    """The matrix-product kernel of the fused forward, with the tiles that this card and dtype get."""
    tiles = lse_forward.choose_tiles(divmod(capability, 10), DTYPES[dtype])
    arguments = {
        **dict.fromkeys(["hidden_ptr", "weight_ptr", "bias_ptr"], f"*{dtype}:16"),
        **dict.fromkeys(["maxima_ptr", "sums_ptr", "label_logits_ptr"], "*fp32:16"),
        "labels_ptr": "*i64:16",
        **dict.fromkeys(["vocabulary", "depth", "split_columns", "stride_hidden_n", "stride_weight_v"], "i32:16"),
        **dict.fromkeys(["n_rows", "n_splits", "partials_stride"], "i32"),
        **dict.fromkeys(["stride_hidden_d", "stride_weight_d", "stride_bias"], 1),
        **dict.fromkeys(["logit_scale", "softcap"], "fp32"),
        **{"HAS_BIAS": False, "HAS_SOFTCAP": False, "EVEN_D": True, "UPCAST": False, **flags},
        "BLOCK_N": tiles.rows, "BLOCK_V": tiles.columns, "BLOCK_D": tiles.depth, "GROUP_ROWS": 16,
    }  # fmt: skip
    return compile_kernel(
        lse_forward._fold_kernel, arguments, capability, warps=tiles.warps, stages=tiles.stages, folder=folder
    )


def fits(compiled: Compiled, capability: int, name: str) -> None:
    print(f"{name} for sm_{capability}: {compiled}")
    assert compiled.cubin.startswith(b"\x7fELF")
    assert compiled.shared <= SHARED_LIMIT[capability]
    if compiled.registers is not None:
        assert compiled.registers <= 255
        assert compiled.product_loop_spills == 0


@pytest.mark.parametrize("capability", [HOPPER, ADA])
def test_the_fused_forward_multiplies_by_matrix_units_without_a_spill(capability: int, tmp_path: Path) -> None:
    compiled = compile_fold(capability, "bf16", tmp_path)
    fits(compiled, capability, "fused forward, bf16")
    if compiled.matrix_instructions is not None:
        assert compiled.matrix_instructions == {"HGMMA" if capability == HOPPER else "HMMA"}
        assert compiled.spill_stores == 0


@pytest.mark.parametrize("capability", [HOPPER, ADA])
def test_the_fused_forward_with_every_flag_does_not_spill_in_its_product_loop(capability: int, tmp_path: Path) -> None:
    compiled = compile_fold(capability, "bf16", tmp_path, HAS_BIAS=True, HAS_SOFTCAP=True, EVEN_D=False)
    fits(compiled, capability, "fused forward, bf16, bias and softcap")


@pytest.mark.parametrize("capability", [HOPPER, ADA])
def test_float32_is_multiplied_as_float32(capability: int, tmp_path: Path) -> None:
    """A matrix instruction here would be TF32, with 10 bits of mantissa."""
    compiled = compile_fold(capability, "fp32", tmp_path)
    fits(compiled, capability, "fused forward, fp32")
    if compiled.matrix_instructions is not None:
        assert compiled.matrix_instructions == frozenset()
        assert compiled.spill_stores == 0


@pytest.mark.parametrize("capability", [HOPPER, ADA])
def test_the_kernel_that_joins_the_splits_fits(capability: int, tmp_path: Path) -> None:
    arguments = {
        **dict.fromkeys(["maxima_ptr", "sums_ptr", "label_logits_ptr", "logps_ptr"], "*fp32:16"),
        **dict.fromkeys(["n_rows", "n_splits", "partials_stride"], "i32"),
        **{"BLOCK_N": lse_forward._JOIN_ROWS, "BLOCK_SPLITS": lse_forward._MAX_SPLITS},
    }
    compiled = compile_kernel(lse_forward._join_kernel, arguments, capability, warps=4, folder=tmp_path)
    fits(compiled, capability, "join")
    assert not compiled.spill_stores


@pytest.mark.parametrize("capability", [HOPPER, ADA])
@pytest.mark.parametrize("name", ["tile_pass", "tile_backward"])
def test_the_tile_passes_fit_without_a_spill(name: str, capability: int, tmp_path: Path) -> None:
    per_row = {
        "tile_pass": ["constants_ptr", "sums_ptr", "rescale_ptr"],
        "tile_backward": ["constants_ptr", "row_weights_ptr", "label_weights_ptr"],
    }
    arguments = {
        **dict.fromkeys(["tile_ptr", *per_row[name]], "*fp32:16"),
        **dict.fromkeys(["bias_ptr", "out_ptr"], "*bf16:16"),
        "labels_ptr": "*i64:16",
        **dict.fromkeys(["n_columns", "stride_tile_r", "stride_out_r"], "i32:16"),
        "first_column": "i32",
        **dict.fromkeys(["stride_tile_c", "stride_out_c", "stride_bias"], 1),
        **dict.fromkeys(["logit_scale", "softcap"], "fp32"),
        **{"HAS_BIAS": True, "HAS_SOFTCAP": True, "BLOCK_C": tile_pass._BLOCK_COLUMNS},
    }
    if name == "tile_pass":
        arguments |= {"margin": "fp32", "HAS_OUT": True}
    kernel = getattr(tile_pass, f"_{name}_kernel")
    compiled = compile_kernel(kernel, arguments, capability, warps=tile_pass._WARPS, folder=tmp_path)
    fits(compiled, capability, name)
    assert not compiled.spill_stores


def test_every_card_of_the_table_has_tiles_that_fit_its_shared_memory() -> None:
    """Two operands for every stage but the one in flight in registers; the compiler's own figure is asserted above."""
    for capability, limit in SHARED_LIMIT.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            tiles = lse_forward.choose_tiles(divmod(capability, 10), dtype)
            assert (tiles.rows + tiles.columns) * tiles.depth * dtype.itemsize * tiles.stages <= limit, (
                capability,
                dtype,
            )
