"""What will training on this data compute? Counts that follow from the lengths of its prompts and completions alone.

    padded    today's trainers: B pairs are a rectangle of 2B rows, every prompt twice, as wide as the batch's longest (B trees of K
              completions each one of K · B rows)
    packed    every completion behind a copy of its prompt, end to end, without its last token (which predicts nothing)
    shared    every prompt once, then its completions without their last tokens, end to end

With what a model does for a token, for a query and key and for a scored token (`ModelCost`), the arithmetic of the three
follows, and from it how fast each should be beside the others.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo_engine.data.records import PairData, TokenizedTree
from dpo_engine.errors import ConfigError

LAYOUTS = {"padded": "padded", "packed": "packed", "shared": "packed+shared"}
"""Layouts and what they are called in print."""
_BARS = 10
_BAR_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class LengthStats:
    """How long are these sequences, in tokens?"""

    least: int
    mean: float
    median: float
    p95: int
    """95 % are not longer."""
    most: int
    histogram: tuple[tuple[int, int, int], ...]
    """(first length, last length, how many), without gaps; the last bar holds all beyond `p95`."""


@dataclass(frozen=True, kw_only=True)
class LayoutCost:
    """What one epoch takes in a layout."""

    tokens: int
    """Positions the model runs, padding included."""
    attended: int
    """Queries times keys: the sum of L² over rectangle rows (padded) or sequences (packed); of a shared tree, each completion's
    queries times its prompt's and its own keys, and the prompt's square once."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Floating-point operations of one forward pass; a backward pass takes the same multiple of each."""

    per_token: int
    """2 for each weight that a token is multiplied with."""
    per_attended: int
    """4 × layers × heads × head_dim: a query's product with a key, and its share of a value."""
    per_scored: int
    """2 × D × V: a scored token's row of the head."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How many completions are good, and what each class should weigh."""

    desirable: int
    undesirable: int
    desirable_weight: float
    undesirable_weight: float
    """As `suggested_weights` says."""


@dataclass(frozen=True, kw_only=True)
class Lists:
    """How long are the ranked lists?"""

    completions: dict[int, int]
    """Completions of a prompt -> how many prompts have so many."""
    with_ties: int
    """Lists in which two completions or more are of one rank."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_pairs` found."""

    pairs: int
    """Trees: pairs, labelled completions or ranked lists."""
    batch_size: int
    """Trees in a padded rectangle."""
    lengths: dict[str, LengthStats]
    """Of "prompt", and of pairs "chosen" and "rejected", of labelled completions "desirable" and "undesirable" where there are
    some, of ranked lists "best" and "others"."""
    scored_tokens: int
    prompt_share: float
    """Prompt tokens / all tokens, every completion behind a copy of its prompt, in [0, 1]."""
    repeated_prompts: int
    """Prompts that more than one pair has."""
    pairs_with_repeated_prompts: int
    layouts: dict[str, LayoutCost]
    padding: float
    """Share of the rectangles' positions that are padding, in [0, 1]."""
    labels: Labels | None = None
    """Of labelled completions."""
    lists: Lists | None = None
    """Of ranked lists."""

    @property
    def trees_are(self) -> str:
        """What to call the trees."""
        return "rows" if self.labels else "lists" if self.lists else "pairs"

    def saved(self, layout: str) -> float:
        """Share of the rectangles' positions that `layout` does not compute, in [0, 1]."""
        return 1 - self.layouts[layout].tokens / self.layouts["padded"].tokens

    def arithmetic(self, layout: str, model: ModelCost) -> int:
        """Operations of one forward pass over the data: `per_token · tokens + per_attended · L² + per_scored · scored`."""
        cost = self.layouts[layout]
        return (
            model.per_token * cost.tokens + model.per_attended * cost.attended + model.per_scored * self.scored_tokens
        )

    def speed(self, layout: str, over: str, model: ModelCost) -> float:
        """How many times as fast `layout` should be as `over`, if time is in proportion to arithmetic."""
        return self.arithmetic(over, model) / self.arithmetic(layout, model)

    def numbers(self, model: ModelCost) -> dict[str, Any]:
        """What `--json` prints; the keys are in `docs/stability.md`."""
        found = asdict(self)
        del found["pairs"]  # the report's rows_used
        for stats in found["lengths"].values():
            stats["histogram"] = [dict(zip(("from", "to", "count"), bar, strict=True)) for bar in stats["histogram"]]
        found["saved"] = {layout: self.saved(layout) for layout in LAYOUTS}
        found["predicted_speed"] = {
            f"{layout}_over_{over}": self.speed(layout, over, model)
            for layout, over in (("packed", "padded"), ("shared", "packed"), ("shared", "padded"))
        }
        found["model_cost"] = asdict(model)
        return found

    def lines(self, model: ModelCost) -> Iterator[str]:
        """The same for people, one line each."""
        yield f"{'tokens in a':<12}{'least':>8}{'mean':>9}{'median':>9}{'95 %':>8}{'most':>8}"
        for name, stats in self.lengths.items():
            yield f"{name:<12}{stats.least:>8}{stats.mean:>9.1f}{stats.median:>9g}{stats.p95:>8}{stats.most:>8}"
        for name, stats in self.lengths.items():
            yield ""
            yield f"{name}: tokens, {self.trees_are if name == 'prompt' else 'completions'}"
            yield from _bars(stats)
        yield ""
        yield from self._judgements()
        yield (
            f"{self.prompt_share:.1%} of the tokens are prompt (each prompt counted once for each completion); "
            f"{self.scored_tokens:,} are scored"
        )
        if self.repeated_prompts:
            prompts = "1 prompt occurs" if self.repeated_prompts == 1 else f"{self.repeated_prompts} prompts occur"
            each = self.trees_are.removesuffix("s")
            yield f"{prompts} in more than one {each}, in {self.pairs_with_repeated_prompts} {self.trees_are} together"
        yield ""
        if self.labels:
            yield "each row is computed with another prompt's completion besides, for the baseline"
        yield f"tokens computed in one epoch of {self.pairs} {self.trees_are}"
        held = f"{self.batch_size} {self.trees_are}"
        if self.trees_are == "pairs":
            held = f"{2 * self.batch_size} rows ({held})"
        remarks = {
            "padded": f"rectangles of {held}, as today's trainers; {self.padding:.1%} padding",
            "packed": f"{self.saved('packed'):.1%} saved: no padding",
            "shared": f"{self.saved('shared'):.1%} saved: no padding, every prompt once",
        }
        for layout, remark in remarks.items():
            yield f"  {LAYOUTS[layout]:<14}{self.layouts[layout].tokens:>13,}  {remark}"
        yield (
            f"predicted speed: packed {self.speed('packed', 'padded', model):.2f} x padded, packed+shared "
            f"{self.speed('shared', 'packed', model):.2f} x packed, {self.speed('shared', 'padded', model):.2f} x padded"
        )
        yield (
            f"  (time in proportion to {model.per_token:.3g} operations a token, {model.per_attended:.3g} a query and key, "
            f"{model.per_scored:.3g} a scored token)"
        )

    def _judgements(self) -> Iterator[str]:
        """Lines about labels or ranks, if there are some."""
        if self.labels:
            good, bad = self.labels.desirable, self.labels.undesirable
            yield f"{good} {'completion is' if good == 1 else 'completions are'} desirable, {bad} undesirable"
            if good and bad:
                # rounded so that what is copied from here is still within the bounds
                weights = (
                    math.ceil(self.labels.desirable_weight * 1e3),
                    math.floor(self.labels.undesirable_weight * 1e3),
                )
                yield (
                    f"class weights that even this out: desirable_weight {weights[0] / 1e3:g}, undesirable_weight "
                    f"{weights[1] / 1e3:g} (KTO asks for desirable_weight · {good} / (undesirable_weight · {bad}) in [1, 4/3])"
                )
        if self.lists:
            counts = ", ".join(f"{many} of {few}" for few, many in self.lists.completions.items())
            yield f"completions in a list: {counts}; {self.lists.with_ties} with ties"


def inspect_pairs(data: PairData, *, batch_size: int, seed: int) -> Inspection:
    """Count what training on `data` takes.

    Args:
        data: at least one tree; with its completion for the baseline, if training computes one (`with_mismatched`).
        batch_size: trees in a micro-batch, `per_device_train_batch_size`.
        seed: of the run; it decides which trees share a rectangle.

    Raises:
        ConfigError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"per_device_train_batch_size={batch_size} is out of range; expected at least 1")
    trees = data.trees
    prompts = [len(tree.prompt_ids) for tree in trees]
    sequences = [[len(tree.prompt_ids) + len(ids) for ids in tree.completions] for tree in trees]
    real = sum(map(sum, sequences))
    order = training_order(len(trees), seed)
    layouts = {
        "padded": _padded([sequences[index] for index in order], batch_size),
        "packed": _cost([length - 1 for lengths in sequences for length in lengths]),
        "shared": _shared(trees),
    }
    repeats = [count for count in Counter(tuple(tree.prompt_ids) for tree in trees).values() if count > 1]
    return Inspection(
        pairs=len(trees),
        batch_size=batch_size,
        lengths={"prompt": length_stats(prompts)}
        | {name: length_stats(lengths) for name, lengths in _completion_lengths(trees).items() if lengths},
        scored_tokens=sum(sum(mask) for tree in trees for mask in tree.scored_masks),
        prompt_share=sum(len(tree.completions) * len(tree.prompt_ids) for tree in trees) / real,
        repeated_prompts=len(repeats),
        pairs_with_repeated_prompts=sum(repeats),
        layouts=layouts,
        padding=1 - real / layouts["padded"].tokens,
        labels=_labels(trees),
        lists=_lists(trees),
    )


def suggested_weights(n_desirable: int, n_undesirable: int) -> tuple[float, float]:
    """`(desirable_weight, undesirable_weight)` under which the two classes count alike; the larger one keeps 1.

        desirable_weight · n_desirable / (undesirable_weight · n_undesirable)  =  1, and never below it by rounding

    Without one of the classes nothing can be evened out: (1, 1).

    Source: KTO (arXiv:2402.01306), eq. 8, which asks for a ratio in [1, 4/3].
    """
    if not n_desirable or not n_undesirable:
        return 1.0, 1.0
    desirable = max(1.0, n_undesirable / n_desirable)
    undesirable = max(1.0, n_desirable / n_undesirable)
    while desirable * n_desirable / (undesirable * n_undesirable) < 1:  # by a rounding error
        if n_desirable < n_undesirable:
            desirable = math.nextafter(desirable, math.inf)
        else:
            undesirable = math.nextafter(undesirable, 0.0)
    return desirable, undesirable


def training_order(count: int, seed: int) -> list[int]:
    """The order in which the first epoch of a run with `seed` sees `count` pairs.

    Source: `accelerate.data_loader.SeedableRandomSampler`, which transformers' trainer shuffles with.
    """
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def length_stats(lengths: Sequence[int]) -> LengthStats:
    """Numbers and a histogram of at least one length."""
    ordered = sorted(lengths)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    width = _round_width((p95 - ordered[0] + 1) / _BARS)
    edges = list(range(ordered[0] // width * width, p95 + 1, width))
    ends = [edge - 1 for edge in edges[1:]] + [edges[-1] + width - 1]
    if ends[-1] < ordered[-1]:
        edges.append(ends[-1] + 1)
        ends.append(ordered[-1])
    counts = [sum(first <= length <= last for length in ordered) for first, last in zip(edges, ends, strict=True)]
    return LengthStats(
        least=ordered[0],
        mean=statistics.fmean(ordered),
        median=statistics.median(ordered),
        p95=p95,
        most=ordered[-1],
        histogram=tuple(zip(edges, ends, counts, strict=True)),
    )


def _round_width(width: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, ... that is not below `width`."""
    power = 10 ** max(0, math.floor(math.log10(width)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)


def completion_names(tree: TokenizedTree) -> list[str]:
    """What to call each completion of a tree, whose names are all different."""
    own = len(tree.completions) - tree.mismatched
    if tree.ranks is not None:
        names = [f"completion {number}, rank {rank}" for number, rank in enumerate(tree.ranks, start=1)]
    elif tree.desirable is not None:
        names = ["desirable" if is_good else "undesirable" for is_good in tree.desirable]
    else:
        names = ["chosen", "rejected"][:own]
    return names + ["mismatched"] * tree.mismatched


def _completion_lengths(trees: Sequence[TokenizedTree]) -> dict[str, list[int]]:
    """Lengths of the rows' own completions, by what they are to training."""
    found: dict[str, list[int]]
    if trees[0].ranks is not None:
        found = {"best": [], "others": []}
    else:
        found = (
            {"desirable": [], "undesirable": []} if trees[0].desirable is not None else {"chosen": [], "rejected": []}
        )
    first, second = found
    for tree in trees:
        good = tree.desirable or [not place for place in range(len(tree.completions))]
        for is_good, ids in zip(good, tree.completions, strict=False):
            found[first if is_good else second].append(len(ids))
    return found


def _labels(trees: Sequence[TokenizedTree]) -> Labels | None:
    labels = [label for tree in trees for label in tree.desirable or ()]
    if not labels:
        return None
    good, bad = sum(labels), len(labels) - sum(labels)
    weights = suggested_weights(good, bad)
    return Labels(desirable=good, undesirable=bad, desirable_weight=weights[0], undesirable_weight=weights[1])


def _lists(trees: Sequence[TokenizedTree]) -> Lists | None:
    ranked = [tree.ranks for tree in trees if tree.ranks is not None]
    if not ranked:
        return None
    counts = Counter(map(len, ranked))
    return Lists(
        completions=dict(sorted(counts.items())), with_ties=sum(len(set(ranks)) < len(ranks) for ranks in ranked)
    )


def _shared(trees: Sequence[TokenizedTree]) -> LayoutCost:
    """The first completion attends together with its prompt, each other one over the prompt and itself."""
    tokens = attended = 0
    for tree in trees:
        prompt = len(tree.prompt_ids)
        first, *others = (len(ids) - 1 for ids in tree.completions)
        tokens += prompt + first + sum(others)
        attended += (prompt + first) ** 2 + sum(own * (prompt + own) for own in others)
    return LayoutCost(tokens=tokens, attended=attended)


def _cost(lengths: Sequence[int]) -> LayoutCost:
    return LayoutCost(tokens=sum(lengths), attended=sum(length**2 for length in lengths))


def _padded(sequences: Sequence[Sequence[int]], batch_size: int) -> LayoutCost:
    """Rectangles of `batch_size` trees each, in the given order; the last may be lower."""
    widths = []
    for start in range(0, len(sequences), batch_size):
        rows = [length for lengths in sequences[start : start + batch_size] for length in lengths]
        widths += [max(rows)] * len(rows)
    return _cost(widths)


def _bars(stats: LengthStats) -> Iterator[str]:
    highest = max(count for *_, count in stats.histogram)
    for first, last, count in stats.histogram:
        span = str(first) if first == last else f"{first}-{last}"
        bar = "█" * math.ceil(_BAR_WIDTH * count / highest)
        yield f"  {span:>11}  {bar:<{_BAR_WIDTH}}  {count}"
