"""What may a user pass as a data set, and what does the trainer make of it?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_engine.batch import TokenTree
from dpo_engine.data import DataReport, PairData, tokenize_pairs
from dpo_engine.data.inspection import suggested_weights
from dpo_engine.data.records import describe_reason
from dpo_engine.data.streaming import PairStream
from dpo_engine.data.token_columns import pairs_of_ids, token_columns
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.reference.values import ReferenceValues, with_reference
from dpo_engine.train.config import DPOConfig
from dpo_engine.train.mismatched import trees_with_mismatched
from dpo_engine.train.trl_settle import say_once

logger = logging.getLogger(__name__)


def tokenized(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: DPOConfig, name: str) -> Any:
    """Trees, from whatever a user passes as a data set; of a dict of held-out data sets, a dict."""
    if dataset is None:
        return None
    if isinstance(dataset, dict) and dataset and name != "train_dataset":
        return {key: tokenized(part, tokenizer, args, f"{name}[{key!r}]") for key, part in dataset.items()}
    if isinstance(dataset, PairStream):
        _check_stream(dataset, args, name)
        return dataset
    data = _read(dataset, tokenizer, args, name)
    return data if isinstance(data, PairStream | ReferenceValues) else _for_method(data, args, name)


def _read(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: DPOConfig, name: str) -> Any:
    if isinstance(dataset, dict):
        raise ConfigError(
            f"DPOTrainer: {name} is a dict of {', '.join(map(str, dataset)) or 'nothing'}; expected one data set, such as one of "
            "its splits"
        )
    if is_stream := not hasattr(dataset, "__len__"):
        _check_stream(dataset, args, name)
    elif not len(dataset):
        raise ConfigError(f"DPOTrainer: {name} is empty; expected at least one pair, or None")
    if isinstance(dataset, PairData | ReferenceValues) or _has_trees(dataset):
        return dataset
    first = {} if is_stream else next(iter(dataset))
    if columns := token_columns(first):
        options = args.pair_options()
        names = ("max_length", "truncation", "max_prompt_length", "max_completion_length", "method", "kind")
        bounds = {key: options[key] for key in names}
        data = pairs_of_ids(dataset, columns, name, skip_bad_rows=args.skip_bad_rows, **bounds)
        if args.process_index == 0:
            warn_of_rows_left_out(data.report)
        return data
    if tokenizer is None:
        raise ConfigError(f"DPOTrainer: {name} is text, but processing_class is None; pass the model's tokenizer")
    if is_stream:
        return PairStream(dataset, tokenizer, source=name, **args.pair_options())
    if args.chat_template == "auto" and tokenizer.chat_template and isinstance(_get(first, "prompt"), str):
        say_once(
            f"{name}: prompts are text, and are put into the tokenizer's chat template; chat_template='off' leaves them as they "
            "stand, which is what TRL does"
        )
    data = tokenize_pairs(dataset, tokenizer, **({"source": name} | args.pair_options()))
    if args.process_index == 0:
        warn_of_rows_left_out(data.report)
    return data


def _for_method(data: Any, args: DPOConfig, name: str) -> Any:
    """The trees as the method needs them.

    Raises:
        DataError: they are of another kind of data.
    """
    method = args.entry
    for index, tree in enumerate(data):
        if fault := _misfit(tree, method.kind):
            raise DataError(
                f"{getattr(tree, 'origin', None) or f'{name}: row {index + 1}'} {fault}; the method {method.name} trains on "
                f"{_EXPECTED[method.kind]}"
            )
    if method.kind == "unpaired" and args.process_index == 0 and name == "train_dataset":
        _suggest_weights(data, args, name)
    if method.mismatched and not getattr(data[0], "mismatched", False):
        return _replaced(data, trees_with_mismatched(list(data), args.max_length))
    are_ranked = [getattr(tree, "ranks", None) is not None for tree in data]
    if args.ranked_pairs != "all" and name == "train_dataset" and not any(are_ranked):
        raise ConfigError(
            f"ranked_pairs={args.ranked_pairs!r}, but {name} has pairs only; expected all, or ranked lists"
        )
    if any(are_ranked) and not all(are_ranked):  # in a forest all completions have ranks, or none
        both = zip(data, are_ranked, strict=True)
        return _replaced(data, [tree if is_ranked else _as_list(tree) for tree, is_ranked in both])
    return data


def _replaced(data: Any, trees: list[TokenTree]) -> Any:
    """The data set with other trees for its rows."""
    return replace(data, trees=trees) if isinstance(data, PairData) else trees  # type: ignore[arg-type]  # all are trees


def _as_list(pair: TokenTree) -> TokenTree:
    """A pair as a ranked list of two."""
    known = (getattr(pair, name, None) for name in ("reference_token_logps", "reference_logps"))
    return replace(with_reference(pair, *known), ranks=(0, 1))


_EXPECTED = {
    "pairs": "trees of two completions, or of more that have ranks",
    "unpaired": "trees whose completions are labelled desirable or not",
    "ranked": "trees of at least two completions that have ranks",
}


def _misfit(tree: TokenTree, kind: str) -> str | None:
    """Why a tree cannot be trained on by a method of this kind of data."""
    count, ranks = len(tree.completions), getattr(tree, "ranks", None)
    if kind == "unpaired":
        return "has no labels (desirable)" if getattr(tree, "desirable", None) is None else None
    if getattr(tree, "desirable", None) is not None:
        return "is labelled, not ranked"
    if ranks is None:
        return None if count == 2 else f"has {count} completions and no ranks"
    if len(ranks) != count or list(ranks) != sorted(ranks) or ranks[0] == ranks[-1]:
        return f"has {count} completions with ranks {list(ranks)}, of which none is better, or which do not ascend"
    return None


def _suggest_weights(data: Any, args: DPOConfig, name: str) -> None:
    """Say which class weights the data asks for, where those given are far from it."""
    labels = [label for tree in data for label in tree.desirable]
    desirable, undesirable = sum(labels), len(labels) - sum(labels)
    if not desirable or not undesirable:
        only = "desirable" if desirable else "undesirable"
        logger.warning("%s: all %d completions are %s; kto learns from both kinds", name, len(labels), only)
        return
    settings = args.entry.settings(args)
    # A tree counts once, whatever the number of its completions.
    good_share = sum(sum(tree.desirable) / len(tree.desirable) for tree in data)
    bad_share = len(data) - good_share
    ratio = settings["desirable_weight"] * good_share / (settings["undesirable_weight"] * bad_share)
    if not 1 - 1e-3 <= ratio <= 4 / 3 + 1e-3:  # weights are printed with four digits
        good, bad = suggested_weights(round(60 * good_share), round(60 * bad_share))
        logger.warning(
            "%s: %d desirable and %d undesirable completions: with desirable_weight %.4g and undesirable_weight %.4g the "
            "classes count %.2f to 1, and 1 to 1.33 is advised; desirable_weight: %.4g and undesirable_weight: %.4g would be",
            name, desirable, undesirable, settings["desirable_weight"], settings["undesirable_weight"], ratio, good, bad,
        )  # fmt: skip


def warn_of_rows_left_out(report: DataReport) -> None:
    """Say which rows of a data set will not be trained on, and why, if any."""
    if report.rows_left_out:
        reasons = "; ".join(describe_reason(report, reason) for reason in report.rows_left_out)
        logger.warning(
            "%s: %d of %d rows are used; left out: %s", report.source, report.rows_used, report.rows_read, reasons
        )


def all_parts(dataset: Any) -> list[Any]:
    """The data sets in a dict of them, or the one."""
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def each_part(dataset: Any, change: Callable[[Any], Any]) -> Any:
    """`change(dataset)`, or the dict of what it makes of each data set in a dict."""
    if isinstance(dataset, dict):
        return {key: change(part) for key, part in dataset.items()}
    return change(dataset)


def is_text(dataset: Any) -> bool:
    """Whether a data set has to be tokenised."""
    if dataset is None or isinstance(dataset, PairData | PairStream | ReferenceValues) or _has_trees(dataset):
        return False
    return not hasattr(dataset, "__len__") or (len(dataset) > 0 and token_columns(next(iter(dataset))) is None)


def present(trees: Sequence[TokenTree | None]) -> list[TokenTree]:
    """The rows of a micro-batch, without those that fill up a data set for its ranks."""
    return [tree for tree in trees if tree is not None]


def knows_reference(rows: Any) -> bool:
    """Whether the rows bring reference log-probs: all do, or none."""
    return any(getattr(rows[0], name, None) is not None for name in ("reference_token_logps", "reference_logps"))


def _get(row: Any, column: str) -> Any:
    return row.get(column) if isinstance(row, Mapping) else None


def _has_trees(dataset: Any) -> bool:
    """Whether it is a list of trees, such as those that know their reference."""
    return isinstance(dataset, list) and bool(dataset) and hasattr(dataset[0], "prompt_ids")


def _check_stream(dataset: Any, args: DPOConfig, name: str) -> None:
    """Refuse what cannot be streamed."""
    if not hasattr(dataset, "__iter__"):
        raise ConfigError(
            f"DPOTrainer: {name} is a {type(dataset).__name__}; expected rows: a list, a Dataset or a stream"
        )
    if name != "train_dataset":
        raise ConfigError(
            f"DPOTrainer: {name} is a stream; expected a data set with an end, such as a list of its first rows"
        )
    if args.world_size > 1:
        raise ConfigError(
            f"DPOTrainer: {name} is a stream, and there are {args.world_size} ranks; expected a data set in memory"
        )
    if args.entry.mismatched:
        raise ConfigError(
            f"DPOTrainer: {name} is a stream, and the method {args.method} puts completions behind prompts of other rows; expected "
            "a data set in memory"
        )
    if args.dataloader_num_workers:
        raise ConfigError(
            f"dataloader_num_workers={args.dataloader_num_workers}, and {name} is a stream, which each worker would read from its "
            "beginning; expected 0"
        )
    if args.max_steps <= 0:
        raise ConfigError(f"DPOTrainer: {name} is a stream, whose length is not known; set max_steps")
