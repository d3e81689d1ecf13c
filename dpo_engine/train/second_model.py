"""May a second model be the reference of this policy? It must stay what it is while the policy trains, and know its tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_engine.batch import TokenTree
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.model.head import head_of

logger = logging.getLogger(__name__)

_PADDING = 1024
"""Rows by which two vocabularies of one tokenizer may differ: tables are padded to multiples of up to some hundred."""


def check_second_model(model: nn.Module, ref_model: Any) -> None:
    """Refuse a reference that would move or freeze with the policy.

    Args:
        model: the policy, adapters included.
        ref_model: what was given as its reference.

    Raises:
        ConfigError: it is no model, is the policy or lies in it, or has parts or weights in common with it.
    """
    if not isinstance(ref_model, nn.Module):
        raise ConfigError(
            f"DPOTrainer: ref_model is {ref_model!r}; expected a model object, or None for the model as it starts"
        )
    if ref_model is model:
        raise ConfigError("DPOTrainer: ref_model is the model being trained; pass None for a frozen copy of it")
    mine = {id(module): name for name, module in model.named_modules()}
    common = next((name for name, module in ref_model.named_modules() if id(module) in mine), None)
    if common is not None:
        what = f"its {common!r}" if common else f"{mine[id(ref_model)]!r}"
        raise ConfigError(
            f"DPOTrainer: ref_model and the model being trained have a part in common ({what}), so that whatever is trained or "
            "switched in one is in the other; pass None (adapters are put into the base model itself, and None asks it without "
            "them), or load ref_model on its own"
        )
    trained = {_memory(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in ref_model.named_parameters():
        owner = trained.get(_memory(parameter)) if parameter.numel() else None
        if owner is not None:
            raise ConfigError(
                f"DPOTrainer: ref_model keeps {name} in the memory of the policy's {owner}, which trains, so the reference would "
                "move with it; pass None for a frozen copy, or copy.deepcopy(model)"
            )


def check_vocabularies(policy: PreTrainedModel, reference: PreTrainedModel | None) -> None:
    """Refuse a reference with the words of another tokenizer, as far as sizes tell.

    Raises:
        ConfigError: the vocabularies differ by more than padding.
    """
    if reference is None:
        return
    mine, its = vocabulary_rows(policy), vocabulary_rows(reference)
    if abs(mine - its) > _PADDING:
        raise ConfigError(
            f"DPOTrainer: ref_model has a vocabulary of {its}, and the model being trained one of {mine}; expected the same "
            "tokenizer, since both are asked about the same token ids"
        )
    if mine != its:
        logger.warning(
            "ref_model has a vocabulary of %d, and the model being trained one of %d: taken to be one tokenizer with more or less "
            "padding; with another tokenizer the reference would be asked about other words",
            its,
            mine,
        )


def check_token_ids(
    models: Mapping[str, PreTrainedModel],
    datasets: Sequence[Sequence[TokenTree] | None],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuse rows with token ids that a model has no row for.

    Args:
        models: by what to call them.
        tokenizer: what made the ids; if it has no more tokens than the models have rows, no row is looked at.

    Raises:
        DataError: names the row, the id and the model.
    """
    sizes = {name: vocabulary_rows(model) for name, model in models.items()}
    name = min(sizes, key=sizes.__getitem__)
    if tokenizer is not None and len(tokenizer) <= sizes[name]:
        return
    for tree in (tree for data in datasets if data is not None for tree in data):
        largest = max(max(tree.prompt_ids), *map(max, tree.completions))
        if largest >= sizes[name]:
            raise DataError(
                f"{getattr(tree, 'origin', None) or 'a tree'}: has the token id {largest}, and {name} has a vocabulary of "
                f"{sizes[name]}; use the tokenizer that belongs to it, or call model.resize_token_embeddings first"
            )


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many tokens a model can read and say."""
    read: Any = model.get_input_embeddings()
    said = head_of(model).shape[0]
    return min(said, getattr(read, "num_embeddings", said))


def _memory(tensor: Tensor) -> int:
    """Where a tensor's bytes lie; the tensor itself where they are elsewhere."""
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter, torch.nn.Buffer):
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)
