"""How does the time of a whole optimiser step grow with lengths, pairs, computed tokens, and the prompt's share of them?

The engine's own trainer, on a small random Llama and random token ids. One trainer takes steps of all sizes: a sampler hands
it the pairs of one size after the other, so that sizes take turns step by step. The first step of a round warms up and is not
timed. What a step costs however small it is (the optimiser, the loop around it) is part of its time, as it is of a real one.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from transformers.trainer_callback import PrinterCallback

from benchmarks.harness import Neighbours, Timing
from benchmarks.scale.series import Point, Series
from benchmarks.steps.engine import pair_data
from benchmarks.steps.watch import Refused, StepWatch
from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.batch import tree_cost
from dpo_engine.model.adapters import add_lora

SHARE_PROMPT = {"engine_shared": "auto", "engine_packed": "off"}
LAYOUT = {"engine_shared": "shared", "engine_packed": "packed"}
SPREAD = 0.5  # of the logarithm of a completion's length, where lengths differ
Pair = dict[str, list[int]]


def measure(
    varied: str, values: Sequence[float], fixed: Mapping[str, Any], rounds: int, fitted_from: float
) -> list[Series]:
    """Steps of every size in turn.

    Args:
        varied: "length", "shared_tokens", "pairs" or "prompt_share".
        fixed: `model`, sizes of a Llama; and what the pairs of `varied` are made of (`_pairs`).
    """
    names = list(SHARE_PROMPT) if varied == "prompt_share" else ["engine_shared"]
    draw = random.Random(0)
    by_value = {value: _pairs(varied, value, fixed, draw) for value in values}
    with tempfile.TemporaryDirectory(prefix="dpo-scale-") as folder, _quiet():
        runs = {name: _Run(name, by_value, fixed, Path(folder) / name) for name in names}
        seconds: dict[str, list[list[float]]] = {name: [] for name in names}
        neighbours = Neighbours(repeats=rounds)
        number = -1  # a warm-up
        while number < rounds:
            backwards = number % 2 == 1
            neighbours.start()
            this_round = {}
            for name in names[::-1] if backwards else names:
                this_round[name] = runs[name].round(backwards)
            if number >= 0:
                if not neighbours.keep():
                    continue
                for name, found in this_round.items():
                    seconds[name].append(found)
            number += 1
        timings = {name: [Timing(tuple(one)) for one in zip(*rows, strict=True)] for name, rows in seconds.items()}
    found = [
        Series(
            implementation=name,
            disturbed=neighbours.why,
            points=[
                Point(
                    x=runs[name].tokens[place] if varied == "shared_tokens" else value,
                    timing=timings[name][place],
                    seen={
                        "pairs": len(by_value[value]),
                        "step_tokens": runs[name].tokens[place],
                        "forest_tokens": runs[name].budget,
                    },
                    in_fit=value >= fitted_from,
                )
                for place, value in enumerate(values)
            ],
        )
        for name in names
    ]
    return _what_sharing_saves(*found) if varied == "prompt_share" else found


def _what_sharing_saves(shared: Series, packed: Series) -> list[Series]:
    """Beside each shared step, its time as a share of the packed one's, and the share that its tokens are: were tokens all
    that counts, the two would be one, and a power law through them would have slope 1.
    """
    for mine, its in zip(shared.points, packed.points, strict=True):
        ratio = mine.timing.over(its.timing)
        mine.seen |= {
            "over_packed": {"median": ratio.median, "p20": ratio.p20, "p80": ratio.p80},
            "tokens_over_packed": mine.seen["step_tokens"] / its.seen["step_tokens"],
            "ratio": ratio,
        }
    shared.fit_over, shared.fit_of = "tokens_over_packed", "ratio"
    packed.fit_over = None
    return [shared, packed]


# ---- one trainer ----


@dataclass
class _Turns:
    """Which pairs each step takes; a batch sampler, whose order may be changed from one run to the next."""

    batches: list[list[int]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _TurnsTrainer(DPOTrainer):
    """Takes the steps that `turns` says, instead of steps of one number of pairs."""

    turns: _Turns

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_sampler=self.turns, collate_fn=self.data_collator)  # type: ignore[arg-type]


class _Run:
    """A trainer that takes one step of every size a round, and the tokens that those steps computed."""

    def __init__(self, name: str, by_value: Mapping[float, list[Pair]], fixed: Mapping[str, Any], folder: Path) -> None:
        set_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**fixed["model"]))
        model.requires_grad_(False)
        self.watch = StepWatch(model.get_input_embeddings())
        data = pair_data([pair for pairs in by_value.values() for pair in pairs])
        layout = LAYOUT[name]
        costs = [tree_cost(tree, layout) for tree in data.trees]
        starts = accumulate(map(len, by_value.values()), initial=0)
        self.batches = [list(range(*span)) for span in pairwise(starts)]
        self.expected = [sum(costs[index] for index in batch) for batch in self.batches]
        self.budget = max(costs) if fixed["forest_tokens"] == "pair" else max(self.expected)
        if isinstance(fixed["forest_tokens"], int):
            self.budget = max(fixed["forest_tokens"], *costs)
        self.trainer = _TurnsTrainer(
            model=add_lora(model, r=fixed["lora_r"]),
            args=_config(folder, SHARE_PROMPT[name], self.budget),
            train_dataset=data,
            callbacks=[self.watch],
        )
        self.trainer.remove_callback(PrinterCallback)
        if self.trainer.layout.name != layout:
            raise Refused(f"the model was laid out {self.trainer.layout.name}; expected {layout}")
        self.tokens: list[int] = []

    def round(self, backwards: bool) -> list[float]:
        """Seconds of a step of each size, in the order of the sizes."""
        order = list(range(len(self.batches)))
        if backwards:
            order.reverse()
        self.watch.ends.clear()
        self.watch.tokens.clear()
        self.trainer.turns = _Turns([self.batches[0], *(self.batches[place] for place in order)])
        self.trainer.train()
        seconds = dict(zip(order, self.watch.seconds, strict=True))
        tokens = dict(zip(order, self.watch.tokens[1:], strict=True))
        self.tokens = [tokens[place] for place in sorted(tokens)]
        if self.tokens != self.expected:
            raise Refused(f"steps computed {self.tokens} tokens; expected {self.expected}")
        return [seconds[place] for place in sorted(seconds)]


def _config(folder: Path, share_prompt: str, forest_tokens: int) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        precompute_ref_log_probs=True,  # before the first step, and so in no step's time
        reference_cache="off",
        share_prompt=share_prompt,
        max_tokens_per_forest=forest_tokens,
        max_length=None,
        learning_rate=1e-6,
        num_train_epochs=1,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        logging_steps=1_000_000,
        save_strategy="no",
        disable_tqdm=True,
    )


# ---- the pairs ----


def _pairs(varied: str, value: float, fixed: Mapping[str, Any], draw: random.Random) -> list[Pair]:
    """The pairs of a step of one size, of random token ids."""
    vocabulary = fixed["model"]["vocab_size"]
    pairs, prompt, completion = fixed.get("pairs"), fixed.get("prompt"), fixed.get("completion")
    if varied == "length":  # half of it prompt
        prompt = completion = int(value) // 2
    elif varied == "prompt_share":  # an empty prompt there is not: a share of 0 is one token
        prompt = max(1, round(completion * value / (1 - value)))
    else:
        pairs = int(value)
    # Lengths that differ do so in the same way in every size, so that a pair of a large step is as long as one of a small one.
    lengths = random.Random(1)

    def ids(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    def long(length: int) -> int:
        if not fixed.get("lengths_differ"):
            return length
        return max(1, round(length * lengths.choice((1 - SPREAD, 1.0, 1 + SPREAD))))

    return [
        {"prompt_ids": ids(long(prompt)), "chosen_ids": ids(long(completion)), "rejected_ids": ids(long(completion))}
        for _ in range(pairs)
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is said of the pairs, which are learnt by heart here: they are random, and taken again and again."""
    logger = logging.getLogger("dpo_engine")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
