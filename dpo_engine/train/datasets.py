"""What may a user pass as a data set, and what does the trainer make of it?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_engine.batch import TokenTree
from dpo_engine.data import DataReport, PairData, tokenize_pairs
from dpo_engine.data.records import describe_reason
from dpo_engine.data.streaming import PairStream
from dpo_engine.errors import ConfigError
from dpo_engine.reference.values import ReferenceValues
from dpo_engine.train.config import DPOConfig

logger = logging.getLogger(__name__)


def tokenized(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: DPOConfig, name: str) -> Any:
    """Trees, from whatever a user passes as a data set."""
    if dataset is None:
        return None
    if isinstance(dataset, PairStream):
        _check_stream(dataset, args, name)
        return dataset
    if isinstance(dataset, dict):
        raise ConfigError(f"DPOTrainer: {name} is a dict of {', '.join(map(str, dataset))}; expected one data set")
    if is_stream := not hasattr(dataset, "__len__"):
        _check_stream(dataset, args, name)
    elif not len(dataset):
        raise ConfigError(f"DPOTrainer: {name} is empty; expected at least one pair, or None")
    if isinstance(dataset, PairData | ReferenceValues) or _has_trees(dataset):
        return dataset
    if tokenizer is None:
        raise ConfigError(f"DPOTrainer: {name} is text, but processing_class is None; pass the model's tokenizer")
    if is_stream:
        return PairStream(dataset, tokenizer, source=name, **args.pair_options())
    data = tokenize_pairs(dataset, tokenizer, **({"source": name} | args.pair_options()))
    if args.process_index == 0:
        warn_of_rows_left_out(data.report)
    return data


def warn_of_rows_left_out(report: DataReport) -> None:
    """Say which rows of a data set will not be trained on, and why, if any."""
    if report.rows_left_out:
        reasons = "; ".join(describe_reason(report, reason) for reason in report.rows_left_out)
        logger.warning(
            "%s: %d of %d rows are used; left out: %s", report.source, report.rows_used, report.rows_read, reasons
        )


def present(trees: Sequence[TokenTree | None]) -> list[TokenTree]:
    """The rows of a micro-batch, without those that fill up a data set for its ranks."""
    return [tree for tree in trees if tree is not None]


def knows_reference(rows: Any) -> bool:
    """Whether the rows bring reference log-probs: all do, or none."""
    return any(getattr(rows[0], name, None) is not None for name in ("reference_token_logps", "reference_logps"))


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
    if args.dataloader_num_workers:
        raise ConfigError(
            f"dataloader_num_workers={args.dataloader_num_workers}, and {name} is a stream, which each worker would read from its "
            "beginning; expected 0"
        )
    if args.max_steps <= 0:
        raise ConfigError(f"DPOTrainer: {name} is a stream, whose length is not known; set max_steps")
