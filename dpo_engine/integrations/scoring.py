"""How does a model that a trainer asks for logits give log-probs instead?

While a trainer's method runs inside `scoring(...)`, the models that it asks return `ScoredLogits` where their logits would be: the
decoder runs, the rows that predict a scored token go through `linear_logps`, all within the model's own `forward`, so that what
wraps it (PEFT, DDP, accelerate) acts as always. Afterwards the models have their own forward again.

Which tokens are scored the method's batch says (`Scored`); where it does not, every attended token is. A call that the engine
cannot answer (images, router losses, no tokens) goes to the model's own forward, and says so once.
"""

from __future__ import annotations

import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dpo_engine.errors import ModelError
from dpo_engine.integrations.scored_logits import ScoredLogits

# What a text model's forward may be told besides its tokens; more than that, and its own forward is called.
_OF_THE_DECODER = {"attention_mask", "position_ids", "token_type_ids"}
_OF_THE_OUTPUT = {
    "input_ids",
    "use_cache",
    "logits_to_keep",
    "output_hidden_states",
    "return_dict",
    "output_router_logits",
}
_EXTRAS = ("entropy", "log_sum_squares", "is_top1")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Which tokens of one batch of sequences are scored."""

    input_ids: Tensor  # (B, L)
    mask: Tensor  # (B, L) nonzero where the token at that place is scored
    attention: Tensor | None = None  # (B, L), to recognise the same tokens without padding, as one row
    wraps: bool = False
    """Whether the trainer has the last position of a row predict its first token, as TRL's does where it rolls its masks."""


@dataclass
class Scope:
    """One call of a trainer's method."""

    extras: Sequence[str] = ()
    """Names of `TokenExtras` that the trainer will ask for."""
    mean_logits: str = "scored"
    """At which positions it will ask for the mean of the logits: "scored", "all" or "none"."""
    of_every_pass: bool = True
    """Whether both are asked of passes without gradients too; else those are the reference's, of which only log-probs are asked."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """That of the trainer's accelerator, for models whose own forward it has wrapped in it."""
    batches: list[Scored] = field(default_factory=list)


@dataclass
class ScoredOutput(ModelOutput):
    """What a model returns within `scoring`."""

    token_logps: Tensor | None = None
    """(B, L) those of `logits`, once more: FSDP2 looks among an output's own fields for tensors that take a gradient."""
    logits: Any = None
    """`ScoredLogits`."""


_scope: ContextVar[Scope | None] = ContextVar("dpo_engine_scope", default=None)
# Models that were probed: by which head layer they had, and why not, if not.
_agreed: weakref.WeakKeyDictionary[nn.Module, tuple[int, str]] = weakref.WeakKeyDictionary()
_said: set[str] = set()


def current_scope() -> Scope | None:
    return _scope.get()


@contextmanager
def scoring(models: Sequence[Any], scope: Scope) -> Iterator[None]:
    """Within, each of `models` (wrapped or not) returns `ScoredLogits`; None among them is passed over.

    A scope inside another changes nothing but adds its batches: a trainer's methods call each other.
    """
    if (outer := _scope.get()) is not None:
        outer.batches += scope.batches
        yield
        return
    if any(isinstance(model, nn.DataParallel) for model in models):
        say("torch.nn.DataParallel calls copies of the model, which build their logits; start by torchrun for DDP")
        yield
        return
    bare = list(dict.fromkeys(causal_model(model) for model in models if model is not None))
    token = _scope.set(scope)
    replaced: list[tuple[Any, Any]] = []
    try:
        for model in bare:
            if _agrees(model, scope):
                replaced.append((model, vars(model).get("forward")))
                model.forward = types.MethodType(_scored_forward(model), model)
        yield
    finally:
        for model, own in replaced:
            del model.forward
            if own is not None:  # accelerate and others put theirs on the instance
                model.forward = own
        _scope.reset(token)


def causal_model(model: Any) -> Any:
    """The causal language model inside DDP, `torch.compile` and PEFT."""
    while True:
        if isinstance(inner := getattr(model, "module", None), nn.Module) or isinstance(
            inner := getattr(model, "_orig_mod", None), nn.Module
        ):
            model = inner
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _agrees(model: Any, scope: Scope) -> bool:
    """Whether the model's own logits are what the engine computes; asked once a model, and a no is said."""
    layer = id(model.get_output_embeddings())  # an adapter that comes onto the head is another layer
    if _agreed.get(model, (None, ""))[0] != layer:
        _agreed[model] = layer, _disagreement(model, scope)
    reason = _agreed[model][1]
    if reason:
        say(f"{type(model).__name__} keeps building its logits: {reason}")
    return not reason


def _disagreement(model: Any, scope: Scope) -> str:
    """Why the engine does not score this model; nothing if it does."""
    from dpo_engine.model.probe import probe_head

    if reason := _sharded(model):
        return reason
    token = _scope.set(None)
    try:
        with _autocast(model, scope):
            probe_head(model)
    except (ModelError, AttributeError) as error:
        return str(error)
    finally:
        _scope.reset(token)
    return ""


def _sharded(model: Any) -> str:
    """Why its logits cannot be asked for from outside its wrapper, if so: the probe would meet parts of weights."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if hasattr(weight, "full_tensor") or hasattr(weight, "ds_id"):
        return "its weights are shared out (FSDP2, ZeRO-3), so that it cannot be asked whether the engine computes the same"
    return ""


def _autocast(model: Any, scope: Scope) -> AbstractContextManager[Any]:
    """As the model's own forward runs: accelerate's autocast is in it or, of what wraps the model, around it, or not at all."""
    return scope.autocast() if "_original_forward" in vars(model) else nullcontext()


def forget() -> None:
    """What was found out of models and said of them."""
    _agreed.clear()
    _said.clear()


def say(line: str) -> None:
    """Warn once."""
    if line not in _said:
        _said.add(line)
        warnings.warn(f"dpo_engine: {line}", stacklevel=3)


def _scored_forward(model: Any) -> Callable[..., Any]:
    replaced, original = model.forward, id(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A copy that was made meanwhile has this forward too, and weights of its own.
        own = replaced if id(self) == original else type(self).forward.__get__(self)
        scope = _scope.get()
        if scope is None:
            return own(*args, **kwargs)
        given = _by_name(own, args, kwargs)
        if reason := _why_not(given):
            say(f"{type(self).__name__} builds its logits, {reason}")
            return own(*args, **kwargs)
        return _output(self, scope, given)

    # PEFT and accelerate read the names of forward's arguments.
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *inspect.signature(replaced).parameters.values()]
    )
    return forward


def _by_name(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names, those that are None left out."""
    bound = inspect.signature(own).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        spread = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= value if spread else {name: value}
    return {name: value for name, value in named.items() if value is not None}


def _why_not(given: dict[str, Any]) -> str:
    """Why only the model's own forward can answer this call; nothing if the engine can."""
    if "input_ids" not in given:
        return "because it is called without input_ids, from which the scored labels are taken"
    if given.get("output_router_logits"):
        return "because the trainer asks for the router's auxiliary loss"
    others = sorted(set(given) - _OF_THE_DECODER - _OF_THE_OUTPUT)
    return f"because it is called with {', '.join(others)}" if others else ""


def _output(model: Any, scope: Scope, given: dict[str, Any]) -> Any:
    from dpo_engine.model.scoring import decoder_of

    input_ids = given["input_ids"]
    of_decoder = {name: given[name] for name in _OF_THE_DECODER if name in given}
    with _autocast(model, scope):
        # A dynamic rope remembers rows as it would in the model's own forward: the trainer's figures are to stay what they are.
        hidden = decoder_of(model)(input_ids=input_ids, use_cache=False, **of_decoder)[0]  # (B, L, D)
        logits = scored_logits(
            model, hidden, input_ids, _predicts(scope, input_ids, given.get("attention_mask")), scope
        )
    keep = given.get("logits_to_keep", 0)
    if isinstance(keep, Tensor):
        logits = logits[:, keep]
    elif keep:
        logits = logits[:, -int(keep) :]
    return ScoredOutput(token_logps=logits.token_logps, logits=logits)


def _predicts(scope: Scope, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, L) bool: the positions whose next token is scored."""
    mask = None
    for batch in reversed(scope.batches):
        if (mask := _mask_of(batch, input_ids)) is not None:
            if batch.wraps:
                return mask.roll(-1, dims=1) != 0
            break
    if mask is None:
        mask = torch.ones_like(input_ids) if attention_mask is None or attention_mask.ndim != 2 else attention_mask
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    predicts[:, :-1] = mask[:, 1:] != 0
    return predicts


def _mask_of(batch: Scored, input_ids: Tensor) -> Tensor | None:
    """`batch.mask`, if these are its tokens: all, without the columns on the right, or without padding as one row."""
    ids, mask, width = batch.input_ids, batch.mask, input_ids.shape[1]
    if ids is input_ids:
        return mask
    ids, mask = ids.to(input_ids.device), mask.to(input_ids.device)
    if ids.shape[0] == input_ids.shape[0] and ids.shape[1] >= width and torch.equal(ids[:, :width], input_ids):
        return mask[:, :width]
    if batch.attention is not None and input_ids.shape[0] == 1:
        kept = batch.attention.to(input_ids.device).bool()
        if torch.equal(ids[kept], input_ids[0]):
            return mask[kept][None]
    return None


def scored_logits(model: Any, hidden: Tensor, input_ids: Tensor, predicts: Tensor, scope: Scope) -> ScoredLogits:
    """What stands for the logits of `hidden` (B, L, D): each position of `predicts` (B, L) scores the token after it."""
    from dpo_engine.model.head import head_of
    from dpo_engine.model.scoring import head_logps

    labels = input_ids.roll(-1, dims=1)
    if (device := head_of(model).weight.device).type != "meta":  # where the head waits elsewhere for its call
        hidden = hidden.to(device)  # a model spread over devices may end on another than its head
    labels, predicts = labels.to(hidden.device), predicts.to(hidden.device)
    index = predicts.flatten().nonzero().squeeze(-1)
    rows = hidden.flatten(0, 1).index_select(0, index)  # (N, D)
    more = torch.is_grad_enabled() or scope.of_every_pass
    logps, extras = head_logps(model, rows, labels.flatten()[index], "auto", tuple(scope.extras) if more else ())
    answers = {name: value for name in _EXTRAS if (value := getattr(extras, name, None)) is not None}
    means = None
    if more and scope.mean_logits == "all":
        means = _means(model, hidden)
    elif more and scope.mean_logits == "scored":
        answers["mean_logits"] = _means(model, rows)

    def spread(value: Tensor) -> Tensor:
        return value.new_zeros(predicts.shape).masked_scatter(
            predicts, value
        )  # no view: FSDP2 hooks what a forward returns

    stand: dict[str, Any] = {name: spread(value) for name, value in answers.items()}
    if means is not None:
        stand["mean_logits"] = means
    return ScoredLogits(
        vocabulary=head_of(model).shape[0], labels=labels, scored=predicts, token_logps=spread(logps), **stand
    )


def _means(model: Any, hidden: Tensor) -> Tensor:
    """(...) means of the logits over the vocabulary."""
    from dpo_engine.model.head import called_through, head_of, modules_to_call, read_head_transform
    from dpo_engine.model.scoring import rows_for
    from dpo_engine.ops.linear_logps import gathered
    from dpo_engine.ops.mean_logits import mean_logits

    def within(rows: Tensor) -> Tensor:
        head, transform = head_of(model), read_head_transform(model.config)
        rows = rows_for(head, rows)
        return mean_logits(
            rows, gathered(head.weight), head.bias, transform.logit_scale, transform.softcap, lora=head.lora(rows)
        )

    with torch.no_grad():
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        return called_through(modules_to_call(model), within, rows).view(hidden.shape[:-1])
