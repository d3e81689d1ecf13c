"""Which faults in the Triton kernels must the tests see, by the interpreter or by what is compiled?"""

from __future__ import annotations

from mutation.mutant import Mutant

PRODUCT, SOFTCAP = "kernels/product.py", "kernels/softcap.py"
FUSED, EPILOGUE, PASS = "kernels/lse_forward.py", "kernels/exp_epilogue.py", "kernels/tile_pass.py"

FUSED_CASES = "tests/support/lse_forward_cases.py"
EPILOGUE_CASES = "tests/support/exp_epilogue_cases.py"
PASS_CASES = "tests/support/tile_pass_cases.py"
COMPILED = "tests/unit/test_triton_aot.py -k float32_is_multiplied"

TRITON_MUTANTS = (
    # -- the product that the kernels share --
    Mutant(
        fault="float32 is multiplied as TF32",
        file=PRODUCT,
        old='            z = tl.dot(a, b, z, input_precision="ieee")\n            a_ptrs',
        new='            z = tl.dot(a, b, z, input_precision="tf32")\n            a_ptrs',
        tests=COMPILED,
    ),
    Mutant(
        fault="a block of logits is rounded to float16",
        file=PRODUCT,
        old="    z *= logit_scale\n",
        new="    z = (z * logit_scale).to(tl.float16).to(tl.float32)\n",
        tests=f"{FUSED_CASES} -k 'ragged or transforms'",
    ),
    Mutant(
        fault="the scale is dropped from a block of logits",
        file=PRODUCT,
        old="    z *= logit_scale\n",
        new="",
        tests=f"{FUSED_CASES} -k transforms",
    ),
    Mutant(
        fault="the scale is applied to a block before the bias",
        file=PRODUCT,
        old="    if HAS_BIAS:\n        z +=",
        new="    z *= logit_scale\n    logit_scale = 1.0\n    if HAS_BIAS:\n        z +=",
        tests=f"{FUSED_CASES} -k transforms",
    ),
    Mutant(
        fault="columns of the weight are addressed in 32 bits",
        file=PRODUCT,
        old="    rows_v = offs_v.to(tl.int64)\n",
        new="    rows_v = offs_v\n",
        tests=f"{FUSED_CASES} -k past_two",
    ),
    Mutant(
        fault="rows of the product are addressed in 32 bits",
        file=PRODUCT,
        old="left + offs_n.to(tl.int64)[:, None] * stride_left_r",
        new="left + offs_n[:, None] * stride_left_r",
        tests=f"{FUSED_CASES} {EPILOGUE_CASES} -k past_two",
    ),
    # -- the softcap --
    Mutant(
        fault="the slope of the softcap is a difference that cancels",
        file=SOFTCAP,
        old="return softcap * tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))",
        new="return softcap * tanh, 1.0 - tanh * tanh",
        tests=f"{PASS_CASES} -k 'exponentials_and_sums or backward_tile'",
    ),
    Mutant(
        fault="tanh cancels near zero",
        file=SOFTCAP,
        old="tanh = tl.where(tl.abs(y) < 0.625, near, tl.where(y < 0, -far, far))",
        new="tanh = tl.where(y < 0, -far, far)",
        tests=f"{FUSED_CASES} -k softcap",
    ),
    Mutant(
        fault="the slope of the softcap is not squared in a kernel",
        file=SOFTCAP,
        old="4.0 * e / ((1.0 + e) * (1.0 + e))",
        new="2.0 * tl.exp(-tl.abs(y)) / (1.0 + e)",
        tests=f"{PASS_CASES} -k 'exponentials_and_sums or backward_tile'",
    ),
    # -- log-probs by one kernel --
    Mutant(
        fault="a block past the vocabulary's end counts as logits of zero",
        file=FUSED,
        old='z = tl.where(is_label | (column_mask[None, :] == 0), float("-inf"), z)',
        new='z = tl.where(is_label, float("-inf"), z)',
        tests=f"{FUSED_CASES} -k 'ragged or padding'",
    ),
    Mutant(
        fault="the label's exponential is among the others'",
        file=FUSED,
        old='z = tl.where(is_label | (column_mask[None, :] == 0), float("-inf"), z)',
        new='z = tl.where(column_mask[None, :] == 0, float("-inf"), z)',
        tests=f"{FUSED_CASES} -k 'ragged or sure'",
    ),
    Mutant(
        fault="the label is picked one column to the right",
        file=FUSED,
        old="is_label = offs_v[None, :] == labels[:, None]",
        new="is_label = offs_v[None, :] == labels[:, None] + 1",
        tests=f"{FUSED_CASES} -k 'ragged or edges'",
    ),
    Mutant(
        fault="the online sum is not rescaled",
        file=FUSED,
        old="sums = sums * tl.exp(maxima - shift) + tl.sum(",
        new="sums = sums + tl.sum(",
        tests=f"{FUSED_CASES} -k 'ragged or many_blocks'",
    ),
    Mutant(
        fault="splits are joined without rescaling",
        file=FUSED,
        old="tl.sum(split_sums * tl.exp(split_maxima - shift[None, :]), 0)",
        new="tl.sum(split_sums, 0)",
        tests=f"{FUSED_CASES} -k 'ragged or edges'",
    ),
    Mutant(
        fault="the log-prob of a sure row cancels in the join",
        file=FUSED,
        old="_log1p(tl.exp(-tl.abs(others)))",
        new="tl.log(1.0 + tl.exp(-tl.abs(others)))",
        tests=f"{FUSED_CASES} -k sure",
    ),
    Mutant(
        fault="the number of splits follows the number of rows",
        file=FUSED,
        old="triton.cdiv(triton.cdiv(vocabulary, _MAX_SPLITS), tiles.columns) * tiles.columns",
        new="triton.cdiv(triton.cdiv(vocabulary, 1 + n_rows % _MAX_SPLITS), tiles.columns) * tiles.columns",
        tests=f"{FUSED_CASES} -k beside",
    ),
    # -- the product with exponentials for an epilogue --
    Mutant(
        fault="columns past the slab's end are summed",
        file=EPILOGUE,
        old="left_out = (offs_v[None, :] == label_columns[:, None]) | (column_mask[None, :] == 0)",
        new="left_out = offs_v[None, :] == label_columns[:, None]",
        tests=f"{EPILOGUE_CASES} -k product_and_a_tile_pass",
    ),
    Mutant(
        fault="the label's column is found one to the left",
        file=EPILOGUE,
        old="label_columns = (labels - first_column).to(tl.int32)",
        new="label_columns = (labels - first_column - 1).to(tl.int32)",
        tests=f"{EPILOGUE_CASES} -k product_and_a_tile_pass",
    ),
    Mutant(
        fault="E is rounded before it is summed",
        file=EPILOGUE,
        old="tl.store(partial_sums_ptr + offs_partial, tl.sum(e, 1), mask=wanted)",
        new="tl.store(partial_sums_ptr + offs_partial, tl.sum(e.to(out_ptr.dtype.element_ty).to(tl.float32), 1), mask=wanted)",
        tests=f"{EPILOGUE_CASES} -k before_rounding",
    ),
    Mutant(
        fault="the slope is in the sum of the epilogue too",
        file=EPILOGUE,
        old="tl.store(partial_sums_ptr + offs_partial, tl.sum(e, 1), mask=wanted)",
        new="tl.store(partial_sums_ptr + offs_partial, tl.sum(e * slope, 1), mask=wanted)",
        tests=f"{EPILOGUE_CASES} -k 'before_rounding or product_and_a_tile_pass'",
    ),
    Mutant(
        fault="the slope is missing in the E of the epilogue",
        file=EPILOGUE,
        old="    if HAS_SOFTCAP:\n        e *= slope\n",
        new="",
        tests=f"{EPILOGUE_CASES} -k product_and_a_tile_pass",
    ),
    Mutant(
        fault="rows whose constant stays are done again as well",
        file=EPILOGUE,
        old="row_block, column_block, maxima, moves,",
        new="row_block, column_block, maxima, row_mask,",
        tests=f"{EPILOGUE_CASES} -k 'product_and_a_tile_pass or margin or done_again'",
    ),
    Mutant(
        fault="a program redoes the first of its blocks only",
        file=EPILOGUE,
        old="range(tl.program_id(0) % PROGRAMS, n_column_blocks, PROGRAMS)",
        new="range(tl.program_id(0) % PROGRAMS, PROGRAMS, PROGRAMS)",
        tests=f"{EPILOGUE_CASES} -k 'many_blocks or done_again or product_and_a_tile_pass'",
    ),
    Mutant(
        fault="a sum of the epilogue stays relative to the old constant",
        file=EPILOGUE,
        old="sums * rescale + total",
        new="sums + total",
        tests=f"{EPILOGUE_CASES} -k product_and_a_tile_pass",
    ),
    Mutant(
        fault="E is addressed in 32 bits",
        file=EPILOGUE,
        old="    rows_n = offs_n.to(tl.int64)\n",
        new="    rows_n = offs_n\n",
        tests=f"{EPILOGUE_CASES} -k past_two",
    ),
    # -- what is done to a tile --
    Mutant(
        fault="a tile's columns past its end are summed",
        file=PASS,
        old='tl.where(mask & (offs_c != label_column), z, float("-inf"))',
        new='tl.where(offs_c != label_column, z, float("-inf"))',
        tests=f"{PASS_CASES} -k exponentials_and_sums",
    ),
    Mutant(
        fault="a tile's label is found one column to the right",
        file=PASS,
        old="mask & (offs_c != label_column)",
        new="mask & (offs_c != label_column + 1)",
        tests=f"{PASS_CASES} -k exponentials_and_sums",
    ),
    Mutant(
        fault="a tile's constant never moves",
        file=PASS,
        old="moved = tl.where(maximum - constant > margin, maximum, constant)",
        new="moved = constant",
        tests=f"{PASS_CASES} -k 'exponentials_and_sums or margin'",
    ),
    Mutant(
        fault="a tile's sum stays relative to the old constant",
        file=PASS,
        old="tl.store(sums_ptr + row, sums * rescale + tl.sum(weights, 0))",
        new="tl.store(sums_ptr + row, sums + tl.sum(weights, 0))",
        tests=f"{PASS_CASES} -k exponentials_and_sums",
    ),
    Mutant(
        fault="a tile's sum e (z - c) does not follow the constant",
        file=PASS,
        old="old_leaning = tl.load(moments_ptr + moment_stride) + sums * drift",
        new="old_leaning = tl.load(moments_ptr + moment_stride)",
        tests=f"{PASS_CASES} -k moments",
    ),
    Mutant(
        fault="a tile's squares are rescaled once instead of twice",
        file=PASS,
        old="old_squares * (rescale * rescale)",
        new="old_squares * rescale",
        tests=f"{PASS_CASES} -k moments",
    ),
    Mutant(
        fault="a tile's E lacks the slope",
        file=PASS,
        old="            if HAS_SOFTCAP:\n                e *= slope\n",
        new="",
        tests=f"{PASS_CASES} -k exponentials_and_sums",
    ),
    Mutant(
        fault="small gradients of a tile are filtered out",
        file=PASS,
        old="gradient = tl.where(offs_c == label_column, label_weight, -row_weight * e)",
        new="gradient = tl.where(offs_c == label_column, label_weight, tl.where(e < 0.0002, 0.0, -row_weight * e))",
        tests=f"{PASS_CASES} -k backward_tile",
    ),
    Mutant(
        fault="every row of a tile has the first row's upstream gradient",
        file=PASS,
        old="row_weight = tl.load(row_weights_ptr + row)",
        new="row_weight = tl.load(row_weights_ptr)",
        tests=f"{PASS_CASES} -k backward_tile",
    ),
    Mutant(
        fault="a tile is addressed in 32 bits",
        file=PASS,
        old="    row = tl.program_id(0).to(tl.int64)\n    tile_ptr += row * stride_tile_r\n    out_ptr += row * stride_out_r\n"
        "    label_column = tl.load(labels_ptr + row) - first_column\n    constant = tl.load(constants_ptr + row)\n    if",
        new="    row = tl.program_id(0)\n    tile_ptr += row * stride_tile_r\n    out_ptr += row * stride_out_r\n"
        "    label_column = tl.load(labels_ptr + row) - first_column\n    constant = tl.load(constants_ptr + row)\n    if",
        tests=f"{PASS_CASES} -k past_two",
    ),
)
