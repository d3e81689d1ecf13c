"""Which faults in what is done to a tile, or said of a row, must the tests see? Plain torch."""

from __future__ import annotations

from mutation.mutant import Mutant

PASS = "dpo_engine/ops/tile_pass.py"
TILED = "dpo_engine/ops/tiled.py"
HEAD = "dpo_engine/ops/head.py"
STATISTICS = "dpo_engine/ops/statistics.py"
FROZEN = "tests/reference/test_linear_logps.py -k '(tiled_agrees and frozen and float32) or own_digits'"
TRAINABLE = "tests/reference/test_linear_logps.py -k 'tiled_agrees and trainable and float32'"
SMALL_TILES = "tests/reference/test_linear_logps.py -k many_small_tiles"
BFLOAT16_PRODUCTS = "tests/reference/test_linear_logps.py -k bfloat16_products"
PROPERTIES = "tests/property/test_linear_logps_properties.py"
LORA = "tests/reference/test_linear_logps_lora.py -k 'float64 or finite'"
EXTRAS = "tests/reference/test_linear_logps_extras.py"

TORCH_MUTANTS = (
    # -- what is done to a tile --
    Mutant(
        fault="the label's own column is summed with the others",
        file=PASS,
        old='    put_at_labels(x, labels, first_column, float("-inf"))\n',
        new="",
        tests=FROZEN,
    ),
    Mutant(
        fault="the label is looked up one column to the left",
        file=PASS,
        old="    columns = (labels - first_column).clamp(0, tile.shape[1] - 1)[:, None]\n    # where()",
        new="    columns = (labels - first_column - 1).clamp(0, tile.shape[1] - 1)[:, None]\n    # where()",
        tests=FROZEN,
    ),
    Mutant(
        fault="the scale is applied before the bias",
        file=PASS,
        old="    if bias is not None:\n        tile += bias\n    if logit_scale != 1.0:\n        tile *= logit_scale\n",
        new="    if logit_scale != 1.0:\n        tile *= logit_scale\n    if bias is not None:\n        tile += bias\n",
        tests=FROZEN,
    ),
    Mutant(
        fault="the softcap's slope is missing in E",
        file=PASS,
        old="        if slope is not None:\n            weights.mul_(slope)\n        if out",
        new="        if out",
        tests=FROZEN,
    ),
    Mutant(
        fault="the softcap's slope is in the sum too",
        file=PASS,
        old="    sums.mul_(rescale).add_(weights.sum(-1))\n",
        new="    sums.mul_(rescale).add_((weights if slope is None else weights * slope).sum(-1))\n",
        tests=FROZEN,
    ),
    Mutant(
        fault="E is rounded to bfloat16 before it is summed",
        file=PASS,
        old="    sums.mul_(rescale).add_(",
        new="    weights.copy_(weights.bfloat16())\n    sums.mul_(rescale).add_(",
        tests=FROZEN,
    ),
    Mutant(
        fault="the softmax is rounded to bfloat16 in backward",
        file=PASS,
        old="    weights.mul_(-row_weights[:, None])\n",
        new="    weights.mul_(-row_weights[:, None])\n    weights.copy_(weights.bfloat16())\n",
        tests=TRAINABLE,
    ),
    Mutant(
        fault="small gradients are filtered out",
        file=PASS,
        old="    weights.mul_(-row_weights[:, None])\n",
        new="    weights.mul_(-row_weights[:, None])\n    weights[weights.abs() < 2**-12] = 0\n",
        tests=TRAINABLE,
    ),
    Mutant(
        fault="small exponentials are filtered out",
        file=PASS,
        old="    sums.mul_(rescale).add_(",
        new="    weights[weights < 2**-12 * weights.amax(-1, keepdim=True)] = 0\n    sums.mul_(rescale).add_(",
        tests=FROZEN,
    ),
    Mutant(
        fault="a sum stays relative to the old constant",
        file=PASS,
        old="sums.mul_(rescale).add_(",
        new="sums.add_(",
        tests=SMALL_TILES,
    ),
    Mutant(
        fault="the constant never moves",
        file=PASS,
        old="moved = torch.where(maxima - constants > margin, maxima, constants)",
        new="moved = torch.where(maxima - constants > 1e30, maxima, constants)",
        tests=FROZEN,
    ),
    Mutant(
        fault="a column of padding counts as a logit of zero",
        file=PASS,
        old="    sums.mul_(rescale).add_(weights.sum(-1))\n",
        new='    zero = torch.exp(-torch.where(moved == float("-inf"), 0.0, moved))\n'
        "    sums.mul_(rescale).add_(weights.sum(-1) + zero * (-tile.shape[1] % 2))\n",
        tests=FROZEN,
    ),
    Mutant(
        fault="sum e (z - c) stays relative to the old constant",
        file=PASS,
        old="    moments[1] = rescale * (moments[1] + sums * by)\n",
        new="    moments[1] *= rescale\n",
        tests=EXTRAS,
    ),
    Mutant(
        fault="squares are rescaled once instead of twice",
        file=PASS,
        old="    moments[2] *= rescale * rescale\n",
        new="    moments[2] *= rescale\n",
        tests=EXTRAS,
    ),
    Mutant(
        fault="an impossible word adds 0 * -inf to the entropy",
        file=PASS,
        old=".masked_fill_(impossible, 0.0)",
        new="",
        tests=EXTRAS,
    ),
    # -- what is said of a row --
    Mutant(
        fault="the log-prob of a sure row cancels",
        file=STATISTICS,
        old="torch.where(divisible, -(self.sums / t).log1p(), direct)",
        new="direct",
        tests=FROZEN,
    ),
    Mutant(
        fault="the entropy of a sure row cancels",
        file=STATISTICS,
        old="torch.where(leads, stats.sums.log1p(), total.log())",
        new="total.log()",
        tests=EXTRAS,
    ),
    Mutant(
        fault="a tie for the largest logit is no top",
        file=STATISTICS,
        old="(label_logits >= largest)",
        new="(label_logits > largest)",
        tests=EXTRAS,
    ),
    Mutant(
        fault="squares overflow: the constant may lag as far as without extras",
        file=TILED,
        old="margin = min(plan.margin, _MARGIN_OF_SQUARES) if with_extras else plan.margin",
        new="margin = plan.margin",
        tests=EXTRAS,
    ),
    Mutant(
        fault="the softcap's slope is not squared",
        file=HEAD,
        old="e = (x / softcap).abs_().mul_(2.0).exp_()",
        new="e = (x / softcap).abs_().exp_()",
        tests=FROZEN,
    ),
    Mutant(
        fault="the softcap's slope depends on where a number stands",
        file=HEAD,
        old="    e = (x / softcap).abs_().mul_(2.0).exp_()\n",
        new="    return (x / softcap).cosh_().reciprocal_().square_()\n    e = x\n",
        tests=PROPERTIES,
    ),
    # -- the loops over tiles --
    Mutant(
        fault="the scale is dropped in a frozen head's gradient",
        file=TILED,
        old="unit[span].copy_(at_label.mul_(own).sub_(weighted.div_(others)).mul_(head.logit_scale)[:kept])",
        new="unit[span].copy_(at_label.mul_(own).sub_(weighted.div_(others))[:kept])",
        tests=FROZEN,
    ),
    Mutant(
        fault="the scale is dropped in LoRA's gradient",
        file=TILED,
        old="            lora_at_label.mul_(own).sub_(lora_weighted.div_(others)).mul_(head.logit_scale)\n",
        new="            lora_at_label.mul_(own).sub_(lora_weighted.div_(others))\n",
        tests=LORA,
    ),
    Mutant(
        fault="the scale is dropped in a trainable head's gradients",
        file=TILED,
        old="scaled = grad.to(plan.accumulate) * head.logit_scale / stats.totals",
        new="scaled = grad.to(plan.accumulate) / stats.totals",
        tests=TRAINABLE,
    ),
    Mutant(
        fault="the slope at the label is missing where the head is frozen",
        file=TILED,
        old="(stats.sums * stats.label_slopes / stats.totals)[:, None]",
        new="(stats.sums / stats.totals)[:, None]",
        tests=FROZEN,
    ),
    Mutant(
        fault="the slope at the label is missing where the head trains",
        file=TILED,
        old="at_label = scaled * stats.sums * stats.label_slopes",
        new="at_label = scaled * stats.sums",
        tests=TRAINABLE,
    ),
    Mutant(
        fault="the softmax is rounded before it is subtracted from one",
        file=TILED,
        old="(stats.sums * stats.label_slopes / stats.totals)[:, None]",
        new="((1 - stats.label_weights / stats.totals) * stats.label_slopes)[:, None]",
        tests=FROZEN,
    ),
    Mutant(
        fault="every row has the mean upstream gradient, trainable head",
        file=TILED,
        old="scaled = grad.to(plan.accumulate) *",
        new="scaled = grad.to(plan.accumulate).mean() *",
        tests=TRAINABLE,
    ),
    Mutant(
        fault="the accumulator of the last row tile is used again",
        file=TILED,
        old="weighted = accumulator[: tile.count].zero_()",
        new="weighted = accumulator[: tile.count] if span.start else accumulator[: tile.count].zero_()",
        tests=SMALL_TILES,
    ),
    Mutant(
        fault="what was accumulated is not rescaled",
        file=TILED,
        old="            if not is_one_everywhere(rescale):\n                    accumulator *= rescale[:, None]\n",
        new="            pass\n",
        tests=SMALL_TILES,
    ),
    Mutant(
        fault="only the head's accumulator is rescaled, not LoRA's",
        file=TILED,
        old="                if not is_one_everywhere(rescale):",
        new="                if accumulator is weighted and not is_one_everywhere(rescale):",
        tests=LORA,
    ),
    Mutant(
        fault="labels are looked up as if every slab were the first, backward",
        file=TILED,
        old="stats.constants[span], scaled[span], at_label[span], slab.first,",
        new="stats.constants[span], scaled[span], at_label[span], 0,",
        tests=SMALL_TILES,
    ),
    Mutant(
        fault="dW and LoRA's dB keep the last row tile only",
        file=TILED,
        old="put = plan.set_product if self._is_first_tile else plan.add_product",
        new="put = plan.set_product",
        tests=SMALL_TILES,
    ),
    Mutant(
        fault="the bias takes no gradient from labels",
        file=TILED,
        old='self._slab_sums["bias"], gradient.sum(0, dtype=plan.accumulate)',
        new='self._slab_sums["bias"], gradient.clamp(max=0).sum(0, dtype=plan.accumulate)',
        tests=TRAINABLE,
    ),
    Mutant(
        fault="d_bias keeps the last row tile only",
        file=TILED,
        old="total.copy_(by_word if self._is_first_tile else total + by_word)",
        new="total.copy_(by_word)",
        tests=SMALL_TILES,
    ),
    Mutant(
        fault="rows of padding keep what an earlier tile left there",
        file=TILED,
        old="            out[kept.stop :] = 0  # padding rows\n",
        new="",
        tests=BFLOAT16_PRODUCTS,
    ),
    Mutant(
        fault="a short row tile is multiplied at its own height in backward",
        file=TILED,
        old="        if kept == gradient.shape[0]:\n            self.plan.add_product(accumulator, gradient, weight)\n",
        new="        if True:\n            self.plan.add_product(accumulator, gradient[:kept], weight)\n",
        tests=PROPERTIES,
    ),
)
