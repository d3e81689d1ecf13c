"""How does a causal language model return log-probs instead of logits?

    bind_scoring(model)
    out = model(input_ids=sheets, score_from=score_from, labels=labels, forest_shape=shape)
    out.token_logps                       # (N,) float32: of labels[i], predicted by hidden row score_from[i]

`input_ids` is one (rows, width) tensor, or several of different widths (sheets); hidden rows are `hidden.reshape(-1, D)`, those
of several sheets laid end to end. With a `forest_shape` it is one row of trees, and `forest_attention` keeps them apart.

A call with `score_from` runs the decoder, gathers the rows that predict, and hands them to `linear_logps`; the logits are
never built. A call without it is the model's own forward, so that generation and evaluation by others go on working.
`dpo_engine.integrations.token_logps` has a bound model answer `labels` alone in the same way.

It happens inside `forward` because wrappers (PEFT, DDP, FSDP2, autocast) act there: around the wrapper, DDP would not reduce
the head's gradients and FSDP2 would mix kinds of tensor. The forward is bound on the instance and not on a subclass, because
others also replace it there (offloading hooks, quantised loading, autocast) and a class would be hidden by them; a bound
method follows its model through `copy.deepcopy`. Pickling a bound model gives back the ordinary forward: bind it again.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dpo_engine.batch.forest import ForestShape, PreferenceForest
from dpo_engine.errors import ModelError
from dpo_engine.model.flex_attention import padded_forest
from dpo_engine.model.forest_attention import forest_form, over_forest
from dpo_engine.model.forest_mask import forest_mask
from dpo_engine.model.head import ModelHead, called_through, head_of, modules_to_call, read_head_transform
from dpo_engine.model.rope import forget_longer_rows, has_dynamic_rope
from dpo_engine.ops import TokenExtras, TokenKL, linear_kl, linear_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARK = "_dpo_engine_scores"
# For the part after the decoder, which scoring does without.
_OF_THE_HEAD = ("logits_to_keep", "num_logits_to_keep", "num_items_in_batch", "return_dict", "use_cache")


class LabelAnswer(Protocol):
    """What a bound model does with `labels` without `score_from`."""

    def __call__(self, model: Any, **arguments: Any) -> Any: ...


class Exact:
    """Tensors of an output as they were computed, where FSDP2 does not look for something to cast to its `output_dtype`."""

    def __init__(self, **tensors: Tensor | None) -> None:
        self.tensors = tensors


@dataclass
class ScoredTokens(ModelOutput):
    """What a scoring call returns."""

    token_logps: Tensor | None = None
    """(N,) float32, log-prob of each scored token; natural logarithm."""
    log_sum_squares: Tensor | None = None
    """(N,) float32, `log sum_v p_v**2` there, without gradient, if it was asked for."""
    reference_token_logps: Tensor | None = None
    """(N,) float32, if the reference's rows were given."""
    token_kl: Tensor | None = None
    """(N,) float32, KL(reference || policy) there, likewise."""
    rows: Tensor | None = None
    """(N, D) what the head would be given, if nothing else was asked for."""
    exact: Exact | None = None
    """The same under FSDP2, else None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        restore(self)


def exact_under_fsdp(model: nn.Module, **tensors: Tensor | None) -> Exact | None:
    """`tensors` for an output's `exact`, if FSDP2 wraps `model` or a part of it: accelerate sets its `output_dtype` in 16 bits."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule

    return Exact(**tensors) if any(isinstance(module, FSDPModule) for module in model.modules()) else None


def restore(output: Any) -> None:
    """Put an output's `exact` tensors back where they were cast; FSDP2 makes the output anew when it casts."""
    for name, tensor in {} if output.exact is None else output.exact.tensors.items():
        if tensor is not None and output[name].dtype != tensor.dtype:
            output[name] = tensor.to(output[name].device)


def bind_scoring(model: PreTrainedModel) -> None:
    """Make `model(..., score_from=..., labels=...)` return `ScoredTokens`. Binding twice is binding once.

    `model.scoring_backend` ("auto") is handed to `linear_logps` at every call.

    Args:
        model: the causal language model itself; of a PeftModel, `peft_model.get_base_model()`.

    Raises:
        ModelError: it has no decoder apart from its head, or a head that is not plain.
    """
    if is_bound(model):
        return
    head_of(model)
    decoder_of(model)
    instance: Any = model  # nn.Module's annotations allow parameters and modules only
    instance.forward_was_replaced = "forward" in vars(model)
    instance.forward_without_scoring = model.forward
    instance.forward = types.MethodType(_scoring_forward(model.forward), model)
    if not hasattr(model, "scoring_backend"):
        instance.scoring_backend = "auto"


def forest_token_logps(model: nn.Module, forest: PreferenceForest) -> Tensor:
    """(N,) float32 log-probs of a forest's scored tokens, in its order.

    Args:
        model: prepared (`prepare_model`), or a wrapper (PEFT, DDP) around such a model.
        forest: on the model's device, in a layout that the model is right on.

    Raises:
        ModelError: the model was not prepared.
    """
    token_logps = score_forest(model, forest).token_logps
    assert token_logps is not None
    return token_logps


def score_forest(model: nn.Module, forest: PreferenceForest, **asked: Any) -> ScoredTokens:
    """What else a model can say of a forest's scored tokens.

    Args:
        model, forest: as for `forest_token_logps`.
        asked: `extras=("log_sum_squares",)`; `rows_only=True`; or `reference_rows` (N, D), `reference_weight` and
            `reference_bias`: what the reference gives its head, and that head.

    Raises:
        ModelError: the model was not prepared.
    """
    try:
        return model(
            input_ids=forest.input_ids,
            score_from=forest.score_from,
            labels=forest.labels,
            forest_shape=forest.shape,
            **asked,
        )
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if any(is_bound(part) for part in model.modules()):  # type: ignore[arg-type]
            raise
        raise ModelError(
            f"{type(model).__name__} does not score forests yet; call dpo_engine.prepare_model(model) first, before DDP or "
            "FSDP2 wrap it"
        ) from error


def unbind_scoring(model: PreTrainedModel) -> None:
    """Give the model its own forward back. A model that is not bound is left alone."""
    if not is_bound(model):
        return
    instance: Any = model
    if not _is_scoring(instance.forward):
        return  # someone wrapped it since, and what they hold calls `forward_without_scoring`
    own = instance.forward_without_scoring
    was_replaced = instance.forward_was_replaced  # on the instance, before it was bound
    del instance.forward_without_scoring, instance.forward_was_replaced, instance.forward
    if was_replaced:
        instance.forward = own
    if instance.scoring_backend == "auto":
        del instance.scoring_backend


def is_bound(model: PreTrainedModel) -> bool:
    """Whether `bind_scoring` is in effect on this very instance, be it under a wrapper of accelerate's."""
    forward: Any = model.forward
    while forward is not None and not _is_scoring(forward):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _is_scoring(forward: Any) -> bool:
    """Whether this is the forward itself; wrappers copy its attributes."""
    function = getattr(forward, "__func__", forward)
    return getattr(function, _MARK, None) is function


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of the model that ends in the hidden states its head receives.

    Raises:
        ModelError: there is no such part.
    """
    for decoder in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if decoder is not model and decoder is not None:
            return decoder
    raise ModelError(
        f"{type(model).__name__} has no decoder apart from its head; expected a model such as LlamaForCausalLM"
    )


def _scoring_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """A function for `types.MethodType`. It holds no model, so that copies of the model do not share one."""

    def forward(self: Any, *args: Any, score_from: Tensor | None = None, **kwargs: Any) -> Any:
        if score_from is not None:
            return _score(self, score_from, *args, **kwargs)
        answer: LabelAnswer | None = getattr(self, "label_answer", None)
        if answer is not None:
            named = {**dict(zip(positional, args, strict=False)), **kwargs}
            if named.get("labels") is not None:
                return answer(self, **named)
        return self.forward_without_scoring(*args, **kwargs)

    # transformers reads the names of forward's arguments (generation, the Trainer's choice of columns), so they must stay.
    # functools.wraps is not used: it would keep `own`, and with it the model, alive in every copy.
    parameters = list(inspect.signature(own).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    at = next((i for i, parameter in enumerate(parameters) if parameter.kind is parameter.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("score_from", inspect.Parameter.KEYWORD_ONLY, default=None))
    parameters.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY))
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    forward.__doc__ = own.__doc__
    setattr(forward, _MARK, forward)
    return forward


def _score(
    model: Any,
    score_from: Tensor,
    *args: Any,
    labels: Tensor | None = None,
    extras: tuple[str, ...] = (),
    rows_only: bool = False,
    reference_rows: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    **kwargs: Any,
) -> ScoredTokens:
    """`linear_logps(decoder(...)[score_from], head, labels)`.

    Args:
        score_from: (N,) int64, hidden rows, counted through all sheets.
        labels: (N,) int64, the token that each row predicts.
        extras, rows_only, reference_rows, reference_weight, reference_bias: as for `score_forest`.
    """
    if labels is None:
        raise ValueError("score_from was given without labels; expected labels (N,), the token that each row predicts")
    rows = _hidden_rows(model, *args, **kwargs).index_select(0, score_from)  # (N, D)
    if rows_only:
        return ScoredTokens(rows=rows)
    found: dict[str, Tensor | None] = {}
    if reference_rows is not None:
        assert reference_weight is not None
        token_kl = head_kl(model, rows, labels, reference_rows, reference_weight, reference_bias)
        found = {
            "token_logps": token_kl.logps, "reference_token_logps": token_kl.reference_logps, "token_kl": token_kl.kl
        }  # fmt: skip
    if reference_rows is None or extras:
        # Beside a KL for the extras alone, which take no gradient.
        given = rows if reference_rows is None else rows.detach()
        token_logps, more = head_logps(model, given, labels, model.scoring_backend, extras)
        found.setdefault("token_logps", token_logps)
        if more is not None:
            found["log_sum_squares"] = more.log_sum_squares
    return ScoredTokens(**found, exact=exact_under_fsdp(model, **found))


def head_kl(
    model: PreTrainedModel,
    rows: Tensor,
    labels: Tensor,
    reference_rows: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
) -> TokenKL:
    """`linear_kl` of a model's own head and another; to be called within the model's forward.

    Args:
        rows, reference_rows: (N, D) what either head is given.
        labels: (N,) the token that each row predicts; every row counts.

    Raises:
        ModelError: the head has an adapter, which `linear_kl` does not follow.
    """

    def within(rows: Tensor) -> TokenKL:
        head, transform = head_of(model), read_head_transform(model.config)
        if head.branches:
            raise ModelError("the KL of tokens cannot follow an adapter on the LM head; train without lora_head")
        return linear_kl(
            rows_for(head, rows),
            head.weight,
            labels.to(rows.device),
            rows_for(head, reference_rows),
            reference_weight,
            bias=head.bias,
            reference_bias=reference_bias,
            logit_scale=transform.logit_scale,
            softcap=transform.softcap,
            ignore_index=None,
        )

    return called_through(modules_to_call(model), within, rows)


def head_logps(
    model: PreTrainedModel, rows: Tensor, labels: Tensor, backend: str, extras: tuple[str, ...] = ()
) -> tuple[Tensor, TokenExtras | None]:
    """`linear_logps` of a model's own head; to be called within the model's forward.

    Args:
        rows: (N, D) what the head is given.
        labels: (N,) the token that each row predicts; every row counts.
        backend, extras: as for `linear_logps`.

    Returns:
        `(log-probs (N,), extras)`; no extras where none are asked for.
    """

    def within(rows: Tensor) -> Any:
        head, transform = head_of(model), read_head_transform(model.config)
        rows = rows_for(head, rows)
        bias = head.bias
        if bias is not None and head.is_quantised:
            bias = bias.to(rows.dtype)  # bitsandbytes casts it so
        return linear_logps(
            rows,
            head.weight,
            labels.to(rows.device),
            bias=bias,
            logit_scale=transform.logit_scale,
            softcap=transform.softcap,
            ignore_index=None,
            backend=backend,
            lora=head.lora(rows),
            extras=extras,  # type: ignore[arg-type]
        )

    found = called_through(modules_to_call(model), within, rows)
    return found if extras else (found, None)


def rows_for(head: ModelHead, rows: Tensor) -> Tensor:
    """`rows` in the dtype that the head multiplies: some models keep a float32 residual stream before a bfloat16 head."""
    if head.is_quantised or torch.is_autocast_enabled(rows.device.type):
        return rows
    return rows.to(head.weight.dtype)


def decoder_output(model: PreTrainedModel, *args: Any, **arguments: Any) -> Any:
    """What the decoder returns, the (B, L, D) hidden states first, for the arguments of the model's own forward."""
    arguments = {k: v for k, v in arguments.items() if k not in _OF_THE_HEAD and v is not None}
    decoder = decoder_of(model)
    if has_dynamic_rope(model.config.get_text_config()):
        forget_longer_rows(decoder)
    return decoder(*args, use_cache=False, **arguments)


def _hidden_rows(model: Any, *args: Any, forest_shape: ForestShape | None = None, **kwargs: Any) -> Tensor:
    """(tokens, D) the decoder's output, of several sheets laid end to end."""
    arguments = {k: v for k, v in kwargs.items() if k not in _OF_THE_HEAD and v is not None}
    input_ids = arguments.get("input_ids")
    if forest_shape is not None:
        return _over_forest(model, forest_shape, **arguments)
    if not isinstance(input_ids, (tuple, list)):
        hidden = _decoded(model, *args, **arguments)  # (B, L, D)
        return hidden.reshape(-1, hidden.shape[-1])
    if set(arguments) != {"input_ids"}:
        raise ValueError(
            f"input_ids are {len(input_ids)} sheets beside {sorted(set(arguments) - {'input_ids'})}; expected them alone"
        )
    sheets = [_decoded(model, input_ids=sheet).flatten(0, 1) for sheet in input_ids]
    return sheets[0] if len(sheets) == 1 else torch.cat(sheets)


def _over_forest(model: Any, shape: ForestShape, input_ids: Any, **others: Any) -> Tensor:
    """(L, D) of one row of trees."""
    (row,) = input_ids if isinstance(input_ids, (tuple, list)) else (input_ids,)
    if others or row.shape != shape.position_ids.shape:
        raise ValueError(
            f"a forest of {tuple(shape.position_ids.shape)} tokens came with input_ids {tuple(row.shape)} and "
            f"{sorted(others) or 'nothing else'}; expected input_ids of its own shape alone"
        )
    form = forest_form(model)
    if form is None:
        raise ValueError(
            f"{type(model).__name__} has no forest attention for this layout; build the forest "
            "with the layout that prepare_model(model) returned"
        )
    length = row.shape[1]
    if form == "blocks":
        row, shape = padded_forest(row, shape)
    # A mask of ones keeps transformers from finding packed sequences in the positions by itself.
    mask = forest_mask(shape, model.dtype) if form == "mask" else torch.ones_like(row)
    with over_forest(shape):
        hidden = _decoded(model, input_ids=row, position_ids=shape.position_ids, attention_mask=mask)
    return hidden.flatten(0, 1)[:length]


def _decoded(model: Any, *args: Any, **arguments: Any) -> Tensor:
    """(B, L, D) the decoder's hidden states, the same whatever rows it has seen before."""
    return decoder_output(model, *args, **arguments)[0]
