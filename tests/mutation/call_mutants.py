"""Which faults around the tiles must the tests see: how a call is cut, registered, quantised?"""

from __future__ import annotations

from mutation.mutant import Mutant

PLAN = "dpo_engine/ops/plan.py"
REGISTERED = "dpo_engine/ops/registered.py"
CALL = "dpo_engine/ops/linear_logps.py"
WEIGHTS = "dpo_engine/ops/weights.py"
LOSS = "dpo_engine/ops/preference_loss.py"
KL = "dpo_engine/ops/kl.py"
FROZEN = "tests/reference/test_linear_logps.py -k '(tiled_agrees and frozen and float32) or own_digits'"
SMALL_TILES = "tests/reference/test_linear_logps.py -k many_small_tiles"
LEANS = "tests/reference/test_linear_logps.py -k leans"
CALLS = "tests/reference/test_linear_logps_calls.py"
COST = "tests/reference/test_linear_logps_cost.py"
PROPERTIES = "tests/property/test_linear_logps_properties.py"
LORA = "tests/reference/test_linear_logps_lora.py -k 'float64 or finite'"
TEMPERATURE = "tests/reference/test_linear_logps_temperature.py"
QUANTISED = "tests/reference/test_linear_logps_quantised.py"
IN_TORCH = "tests/reference/test_linear_logps_in_torch.py -m 'not slow'"

CALL_MUTANTS = (
    # -- how a call is cut --
    Mutant(
        fault="the last word of the vocabulary is left out",
        file=PLAN,
        old="last = min(first + self.columns, vocabulary)",
        new="last = min(first + self.columns, vocabulary - (first > 0))",
        tests=SMALL_TILES,
    ),
    Mutant(
        fault="rows are not padded",
        file=PLAN,
        old="missing = -tile.count % ROW_MULTIPLE",
        new="missing = 0",
        tests=PROPERTIES,
    ),
    Mutant(
        fault="rows keep their strides",
        file=PLAN,
        old="rows = self.cast(rows).contiguous()",
        new="rows = self.cast(rows)",
        tests=PROPERTIES,
    ),
    Mutant(
        fault="the weight is not rounded under autocast",
        file=PLAN,
        old="weight=self.cast(head.weight.slab(first, last)),",
        new="weight=head.weight.slab(first, last).to(self.multiply),",
        tests=CALLS,
    ),
    Mutant(
        fault="LoRA's B is not rounded under autocast",
        file=PLAN,
        old="else self.cast(head.lora_weight[first:last]),",
        new="else head.lora_weight[first:last].to(self.multiply),",
        tests="tests/reference/test_linear_logps_lora.py -k autocast",
    ),
    Mutant(
        fault="the label's logit misses the bias",
        file=PLAN,
        old="            None if head.bias is None else exact(head.bias.index_select(0, labels)),\n",
        new="            None,\n",
        tests=FROZEN,
    ),
    Mutant(
        fault="the label's logit misses LoRA",
        file=PLAN,
        old="            None if head.lora_weight is None else exact(head.lora_weight.index_select(0, labels)),\n",
        new="            None,\n",
        tests=LORA,
    ),
    Mutant(
        fault="logits are rounded to bfloat16",
        file=PLAN,
        old="            tile = torch.mm(rows.hidden, slab.weight.t(), out=out)\n",
        new="            tile = torch.mm(rows.hidden, slab.weight.t(), out=out)\n            tile.copy_(tile.bfloat16())\n",
        tests=FROZEN,
    ),
    Mutant(
        fault="gradients are accumulated in bfloat16",
        file=PLAN,
        old="            accumulator.addmm_(left, right)\n",
        new="            accumulator.addmm_(left, right).copy_(accumulator.bfloat16())\n",
        tests=FROZEN,
    ),
    Mutant(
        fault="a slab is the whole vocabulary",
        file=PLAN,
        old="    columns = max(1, min(columns, vocabulary))\n",
        new="    columns = max(1, vocabulary)\n",
        tests=COST,
    ),
    Mutant(
        fault="a copy of a slab may be as large as it likes",
        file=PLAN,
        old="    if multiply != head.weight.dtype:  # slabs are copies\n",
        new="    if False:\n",
        tests=f"{COST} {QUANTISED}",
    ),
    # -- the registered operators --
    Mutant(
        fault="every row has the mean upstream gradient, frozen head",
        file=REGISTERED,
        old="torch.mul(value, grad[:, None]).to(value.dtype)",
        new="torch.mul(value, grad.mean()).to(value.dtype)",
        tests=FROZEN,
    ),
    Mutant(
        fault="a gradient is cut off instead of rounded",
        file=REGISTERED,
        old="torch.mul(value, grad[:, None]).to(value.dtype)",
        new="(torch.mul(value, grad[:, None]).view(torch.int32) & -65536).view(torch.float32).to(value.dtype)",
        tests=LEANS,
    ),
    Mutant(
        fault="rows come back in another order where some are ignored",
        file=REGISTERED,
        old="index_copy_(0, index, rows)",
        new="index_copy_(0, index.flip(0), rows)",
        tests=CALLS,
    ),
    Mutant(
        fault="ignored rows take what comes from upstream",
        file=REGISTERED,
        old="            grad = grad.masked_fill(labels == ignore_index, 0.0)  # whatever came from upstream for them\n",
        new="            pass\n",
        tests=CALLS,
    ),
    Mutant(
        fault="a gradient may be differentiated again, as a constant",
        file=REGISTERED,
        old="        found = {name: _Once.apply(value, *sources) for name, value in found.items()}\n",
        new="        pass\n",
        tests=CALLS,
    ),
    Mutant(
        fault="a compiler is told another shape than comes",
        file=REGISTERED,
        old='    kept = n if call.keep == "unit" else 0\n',
        new="    kept = n\n",
        tests=IN_TORCH,
    ),
    Mutant(
        fault="vmap is not refused",
        file=REGISTERED,
        old="    _op.register_vmap(_refuse_vmap)\n",
        new="    pass\n",
        tests=f"{IN_TORCH} -k vmap",
    ),
    # -- the call --
    Mutant(
        fault="a frozen head is treated as one that trains",
        file=CALL,
        old='        return "unit"\n',
        new='        return "statistics"\n',
        tests=COST,
    ),
    Mutant(
        fault="a bias that trains alone is forgotten",
        file=CALL,
        old="    if trains(weight) or trains(bias):\n",
        new="    if trains(weight):\n",
        tests=CALLS,
    ),
    Mutant(
        fault="the temperature divides before the softcap",
        file=CALL,
        old="    scale, cap = logit_scale / temperature, None if softcap is None else softcap / temperature\n    dtype",
        new="    scale, cap = logit_scale / temperature, softcap\n    dtype",
        tests=TEMPERATURE,
    ),
    Mutant(
        fault="a sharded weight's gradient is summed over ranks, not averaged",
        file=CALL,
        old="        whole.register_hook(lambda grad: grad / mesh.size())\n",
        new="        pass\n",
        tests=f"{IN_TORCH} -k ranks",
    ),
    # -- quantised weights --
    Mutant(
        fault="the offset of nested scales is dropped",
        file=WEIGHTS,
        old="blocks // self.nested_block) + offset",
        new="blocks // self.nested_block)",
        tests=QUANTISED,
    ),
    Mutant(
        fault="a slab takes the scales of the first one",
        file=WEIGHTS,
        old="blocks = torch.arange(first * depth // self.block, -(-last * depth // self.block), device=packed.device)",
        new="blocks = torch.arange(0, -(-(last - first) * depth // self.block), device=packed.device)",
        tests=QUANTISED,
    ),
    Mutant(
        fault="the label's row of 8 bits takes another row's scale",
        file=WEIGHTS,
        old="self.scales.index_select(0, index))",
        new="self.scales[: index.numel()])",
        tests=QUANTISED,
    ),
    # -- the paired loss and the divergence --
    Mutant(
        fault="tiles that were kept stay relative to older constants",
        file=LOSS,
        old="            tile.mul_(later[:, None])\n",
        new="",
        tests="tests/reference/test_linear_preference_loss.py",
    ),
    Mutant(
        fault="each pair counts as if it were the only one",
        file=LOSS,
        old="_losses(loss, leaf, references).sum() / pairs",
        new="_losses(loss, leaf, references).mean()",
        tests="tests/reference/test_linear_preference_loss.py",
    ),
    Mutant(
        fault="the divergence goes the other way at the label",
        file=KL,
        old="at_label = (g1 * mine + g2 * (its - mine)) * ours.label_slopes",
        new="at_label = (g1 * mine + g2 * (mine - its)) * ours.label_slopes",
        tests="tests/reference/test_linear_kl.py",
    ),
    Mutant(
        fault="a divergence stays relative to older constants",
        file=KL,
        old="rescale * (crossed + sides[1].sums * (moved_a - moved_b))",
        new="rescale * crossed",
        tests="tests/reference/test_linear_kl.py",
    ),
)
