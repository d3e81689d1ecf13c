"""What bounds a call on a known card? Four times by arithmetic, none of them measured.

    matrix   the case's products at the datasheet's dense rate with float32 accumulation
    exp      one exponential a logit and a pass, 16 a multiprocessor and cycle
    l2       what a tile moves between a product and the pass over it, at 5120 bytes a cycle
    memory   weight, hidden states and results, each once, at the datasheet's bandwidth

The largest is the bound. A card that is not in the table has no such line: nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.ops.cases import Case, Shape

EXP_PER_SM_AND_CYCLE = 16


@dataclass(frozen=True, kw_only=True)
class Card:
    tflops: float  # bfloat16 and float16, dense, float32 accumulation
    float32_tflops: float  # without TF32
    memory_tb_per_s: float
    sms: int
    ghz: float  # boost
    l2_bytes_per_cycle: int | None = None  # where the vendor says


# Datasheets and architecture papers of the vendor; the first name that the device's own contains counts.
CARDS = {
    "H200": Card(tflops=989.4, float32_tflops=66.9, memory_tb_per_s=4.8, sms=132, ghz=1.98, l2_bytes_per_cycle=5120),
    "H100 PCIe": Card(
        tflops=756, float32_tflops=51.2, memory_tb_per_s=2.0, sms=114, ghz=1.755, l2_bytes_per_cycle=5120
    ),
    "H100": Card(tflops=989.4, float32_tflops=66.9, memory_tb_per_s=3.35, sms=132, ghz=1.98, l2_bytes_per_cycle=5120),
    "A100-SXM4-80GB": Card(
        tflops=312, float32_tflops=19.5, memory_tb_per_s=2.039, sms=108, ghz=1.41, l2_bytes_per_cycle=5120
    ),
    "A100-SXM4-40GB": Card(
        tflops=312, float32_tflops=19.5, memory_tb_per_s=1.555, sms=108, ghz=1.41, l2_bytes_per_cycle=5120
    ),
    "RTX 4090": Card(tflops=165.2, float32_tflops=82.6, memory_tb_per_s=1.008, sms=128, ghz=2.52),
    "RTX 3090": Card(tflops=71.2, float32_tflops=35.6, memory_tb_per_s=0.936, sms=82, ghz=1.695),
}

# Passes over the logits, and bytes a logit that they move: float32 written and read; exponentials or gradients, in the
# inputs' dtype, written and read by each product that follows.
PASSES = {"no_gradient": 1, "frozen": 1, "trainable": 2, "preference_loss": 1}
READERS = {"no_gradient": 0, "frozen": 1, "trainable": 2, "preference_loss": 2}


def card_of(name: str | None) -> Card | None:
    return next((card for known, card in CARDS.items() if name and known in name), None)


def roofline(case: Case, shape: Shape, card: Card) -> dict[str, float | str]:
    """Milliseconds by what could bound the call, and which of them does."""
    itemsize = shape.torch_dtype.itemsize
    rate = card.float32_tflops if shape.dtype == "float32" else card.tflops
    logits = shape.rows * shape.vocabulary
    readers = READERS[case.name]
    moved = 8 * PASSES[case.name] + itemsize * (readers + 1 if readers else 0)
    weights, rows = shape.vocabulary * shape.hidden, shape.rows * shape.hidden
    stored = weights * (1 + ("weight" in case.gradients)) + rows * (1 + ("hidden" in case.gradients))
    times = {
        "matrix": len(case.gemms) * shape.gemm_flop / rate * 1e-9,
        "exp": PASSES[case.name] * logits / (card.sms * EXP_PER_SM_AND_CYCLE * card.ghz) * 1e-6,
        "memory": itemsize * stored / card.memory_tb_per_s * 1e-9,
    }
    if card.l2_bytes_per_cycle is not None:
        times["l2"] = logits * moved / (card.l2_bytes_per_cycle * card.ghz) * 1e-6
    return {
        **{f"{name}_ms": round(time, 4) for name, time in times.items()},
        "bound": max(times, key=times.__getitem__),
    }
