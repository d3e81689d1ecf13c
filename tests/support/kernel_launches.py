"""What is each Triton kernel compiled with, on a given card and for a given head?

The types, multiples of 16 and flags are those that a launch of a large, aligned head gives; the block sizes are those
of the tables in `kernels/tiles.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dpo_engine.kernels import exp_epilogue, lse_forward, tile_pass
from dpo_engine.kernels.tiles import EXPONENTIAL, FUSED, Tiles, choose_tiles
from support.aot import Compiled, compile_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRODUCTS = ["fold", "exponentials", "redo"]
OTHERS = ["join", "settle", "tile_pass", "tile_backward"]
_MAY_BE_ONE = [
    *["vocabulary", "depth", "n_splits", "n_columns", "n_column_blocks"],
    *["stride_hidden_n", "stride_weight_v", "stride_left_r", "stride_right_c", "stride_out_r", "stride_tile_r"],
]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What decides which variant of a kernel is compiled."""

    dtype: str = "bf16"
    bias: bool = False
    softcap: bool = False
    loads: str = "descriptors"
    """"descriptors" where the card has them, "pointers" for strides that forbid them, or "ragged" for those and a depth
    that no block divides."""


def product_tiles(name: str, capability: int, head: Head) -> Tiles:
    """The table's entry for one of `PRODUCTS`."""
    return choose_tiles(
        FUSED if name == "fold" else EXPONENTIAL,
        divmod(capability, 10),
        DTYPES[head.dtype],
        descriptors=head.loads == "descriptors",
        softcap=head.softcap,
    )


def compile_product(name: str, capability: int, head: Head, folder: Path, *, ones: bool = False) -> Compiled:
    """Compile `fold`, `exponentials` or `redo` as it would be launched; `ones` for a head of one row and one column."""
    tiles = product_tiles(name, capability, head)
    rows = exp_epilogue.rows_to_redo(tiles) if name == "redo" else tiles.rows
    operands = [
        f"tensordesc<{head.dtype}[{block}, {tiles.depth}]>" if tiles.descriptors else f"*{head.dtype}:16"
        for block in (rows, tiles.columns)
    ]
    arguments: dict[str, Any] = {
        "bias_ptr": f"*{head.dtype}:16",
        "labels_ptr": "*i64:16",
        **dict.fromkeys(["logit_scale", "softcap"], "fp32"),
        **{"HAS_BIAS": head.bias, "HAS_SOFTCAP": head.softcap, "EVEN_D": head.loads != "ragged", "UPCAST": False},
        **{"DESCRIPTORS": tiles.descriptors, "BLOCK_N": rows, "BLOCK_V": tiles.columns, "BLOCK_D": tiles.depth},
        "n_rows": "i32",
        "depth": "i32" if head.loads == "ragged" else "i32:16",
        "stride_bias": 1,
    }
    if name == "fold":
        kernel = lse_forward._fold_kernel
        arguments |= {
            **dict(zip(["hidden", "weight"], operands, strict=True)),
            **dict.fromkeys(["maxima_ptr", "sums_ptr", "label_logits_ptr"], "*fp32:16"),
            **dict.fromkeys(["vocabulary", "split_columns", "stride_hidden_n", "stride_weight_v"], "i32:16"),
            **dict.fromkeys(["n_splits", "partials_stride"], "i32"),
            **dict.fromkeys(["stride_hidden_d", "stride_weight_d"], 1),
            "GROUP_ROWS": 16,
        }
    else:
        kernel = getattr(exp_epilogue, f"_{name}_kernel")
        arguments |= {
            **dict(zip(["left", "right"], operands, strict=True)),
            **dict.fromkeys(["constants_ptr", "maxima_ptr", "partial_sums_ptr"], "*fp32:16"),
            "out_ptr": f"*{head.dtype}:16",
            "first_column": "i32",
            **dict.fromkeys(["n_columns", "stride_left_r", "stride_right_c", "stride_out_r"], "i32:16"),
            **dict.fromkeys(["stride_left_d", "stride_right_d", "stride_out_c"], 1),
        }
        redo = {"margin": "fp32", "PROGRAMS": exp_epilogue._REDO_PROGRAMS, "CHUNK": exp_epilogue._CHUNK}
        arguments |= redo if name == "redo" else {"GROUP_ROWS": 16}
    if ones:
        arguments |= _compiled_in(arguments)
    return compile_kernel(kernel, arguments, capability, warps=tiles.warps, stages=tiles.stages, folder=folder)


def compile_other(name: str, capability: int, folder: Path, *, ones: bool = False, **flags: bool) -> Compiled:
    """Compile one of `OTHERS`; the tile passes with every flag, but for those that `flags` says otherwise."""
    arguments: dict[str, Any]
    if name == "join":
        kernel, warps = lse_forward._join_kernel, 4
        arguments = {
            **dict.fromkeys(["maxima_ptr", "sums_ptr", "label_logits_ptr", "logps_ptr"], "*fp32:16"),
            **dict.fromkeys(["n_rows", "n_splits", "partials_stride"], "i32"),
            **{"BLOCK_N": lse_forward._JOIN_ROWS, "BLOCK_SPLITS": 1 if ones else lse_forward._MAX_SPLITS},
        }
    elif name == "settle":
        kernel, warps = exp_epilogue._settle_kernel, 4
        arguments = {
            **dict.fromkeys(["maxima_ptr", "partial_sums_ptr", "constants_ptr", "sums_ptr"], "*fp32:16"),
            **{"rescale_ptr": "*fp32:16", "n_rows": "i32", "n_column_blocks": "i32", "margin": "fp32"},
            **{"BLOCK_N": exp_epilogue._SETTLE_ROWS, "CHUNK": exp_epilogue._CHUNK},
        }
    else:
        kernel, warps = getattr(tile_pass, f"_{name}_kernel"), tile_pass._WARPS
        own = (
            ["sums_ptr", "rescale_ptr", "moments_ptr"]
            if name == "tile_pass"
            else ["row_weights_ptr", "label_weights_ptr"]
        )
        arguments = {
            **dict.fromkeys(["tile_ptr", "constants_ptr", *own], "*fp32:16"),
            **dict.fromkeys(["bias_ptr", "out_ptr"], "*bf16:16"),
            "labels_ptr": "*i64:16",
            **dict.fromkeys(["n_columns", "stride_tile_r", "stride_out_r"], "i32:16"),
            "first_column": "i32",
            **dict.fromkeys(["stride_tile_c", "stride_out_c", "stride_bias"], 1),
            **dict.fromkeys(["logit_scale", "softcap"], "fp32"),
            **{"HAS_BIAS": True, "HAS_SOFTCAP": True, "BLOCK_C": tile_pass._BLOCK_COLUMNS},
        }
        if name == "tile_pass":
            arguments |= {"margin": "fp32", "HAS_OUT": True, "HAS_MOMENTS": True}
    if ones:
        arguments |= _compiled_in(arguments)
    return compile_kernel(kernel, {**arguments, **flags}, capability, warps=warps, folder=folder)


def _compiled_in(arguments: dict[str, Any]) -> dict[str, int]:
    """A launch compiles a size or a stride of 1 in as a constant, which has another type inside the kernel."""
    return {name: 1 for name in arguments if name in _MAY_BE_ONE}


def all_heads(capability: int) -> Iterator[Head]:
    """Every variant of a product kernel on a card: float16, which differs from bfloat16 in one instruction, only twice."""
    flags = list(product([False, True], repeat=2))
    loads = ["descriptors", "pointers", "ragged"] if capability >= 90 else ["pointers", "ragged"]
    for way in loads:
        for bias, softcap in flags:
            yield Head(bias=bias, softcap=softcap, loads=way)
    for bias, softcap in flags:
        for way in ("pointers", "ragged"):
            yield Head(dtype="fp32", bias=bias, softcap=softcap, loads=way)
    yield Head(dtype="fp16", loads=loads[0])
    yield Head(dtype="fp16", bias=True, softcap=True, loads="ragged")
