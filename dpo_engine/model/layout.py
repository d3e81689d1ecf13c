"""Which layout of a forest is this model right on? It is asked, not looked up.

A small random forest is scored in the layout under test and, sequence by sequence, by the model's own unmodified
forward. Some limits are longer than any probe: windows, chunks, lengths at which queries are scaled, how many tokens a
layer picks. Each is asked about again, shortened. What does not agree falls back: `shared` to `packed` to `padded`, each
in the first of its forms that agrees (`forest_attention.FORMS`), and the reason is one line.

Where a model's rope depends on the longest position of a row (dynamic NTK, longrope), sequences longer than its threshold
are laid out alone: there a neighbour would change what they compute. `rope` finds that threshold without shortening it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_engine.batch.forest import PreferenceForest, build_forest
from dpo_engine.errors import ConfigError
from dpo_engine.model.adapters import is_peft_model, refuse_prompt_learning
from dpo_engine.model.flex_attention import why_not_flex
from dpo_engine.model.forest_attention import FORMS, OWN, forest_form, restore_attention, use_forest_attention
from dpo_engine.model.forest_mask import why_not_one_mask
from dpo_engine.model.probe import TOLERANCES, probe_head
from dpo_engine.model.rope import longest_free_row
from dpo_engine.model.scoring import bind_scoring, decoder_of, forest_token_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE_PROMPT = ("auto", "on", "off")
_SHORT = 5  # what a limit is set to while it is probed: shorter than the probe's sequences
_LIMITS = (
    "sliding_window",
    "attention_chunk_size",
    "floor_scale",  # Llama-4 scales queries by log(1 + index / floor_scale), and counts the row's indices
    "original_max_position_embeddings",  # Ministral-3 scales them likewise, by positions
    "index_topk",  # sparse attention picks so many keys
    "keep_window_size",  # so does Doge's
)
_BESIDE = {"original_max_position_embeddings": "llama_4_scaling_beta"}
"""A limit that others keep for what cannot matter counts only where it stands beside this."""
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# In float32 a forest is exact to rounding; a tiny random model hides a wrong layout below anything coarser.
_EXACT = 1e-5
_SIZES = ((9, (6, 11)), (7, (1, 5, 8)), (12, (10,)))  # prompt and completions of the probe's trees
# What a model may raise when it is handed a forest it was not made for.
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How this model's batches are laid out."""

    name: str
    """One of `batch.LAYOUTS`."""
    line: str
    """What to tell the user."""
    longest: int | None = None
    """Sequences longer than this are laid out alone; None for no such limit."""


@dataclass(frozen=True)
class _Tree:
    prompt_ids: list[int]
    completions: list[list[int]]


def prepare_model(model: nn.Module, share_prompt: str = "auto") -> Layout:
    """Make a model score forests (`forest_token_logps`), and find the layout it is right on.

    Args:
        model: a causal language model, or a `PeftModel` around one; before DDP or FSDP2 wrap it. Its own `forward` and
            `generate` go on as before.
        share_prompt: as for `choose_layout`.

    Returns:
        The layout; its `name` is for `build_forest`.

    Raises:
        ModelError: its head cannot be reproduced, or its adapters are tokens put before the prompt.
        ConfigError: `share_prompt` is unknown, or "on" and the model does not agree.
    """
    refuse_prompt_learning(model)
    causal: Any = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    bind_scoring(causal)
    layout = choose_layout(causal, share_prompt)
    probe_head(causal)
    return layout


def choose_layout(model: PreTrainedModel, share_prompt: str = "auto") -> Layout:
    """The first of `shared`, `packed`, `padded` that this model is right on, with forest attention in place if it needs it.

    Args:
        model: the causal language model itself, bound (`bind_scoring`).
        share_prompt: "auto" and "on" begin with `shared`, "off" with `packed`; "on" refuses to fall back from it.

    Raises:
        ConfigError: `share_prompt` is unknown, or "on" and the model does not agree.
    """
    if share_prompt not in SHARE_PROMPT:
        raise ConfigError(f"share_prompt={share_prompt!r}; expected one of {', '.join(SHARE_PROMPT)}")
    restore_attention(model)
    longest, reasons = _longest(model)
    for name in ("shared", "packed") if share_prompt != "off" else ("packed",):
        reason = _disagreement(model, name, reasons)
        if reason is None:
            how = " by one mask" if forest_form(model) == "mask" else ""
            line = f"layout: {name}{how}" + (f" ({'; '.join(reasons)})" if reasons else "")
            return Layout(name=name, line=line, longest=longest)
        reasons.append(f"not {name}: {reason}")
        if share_prompt == "on":
            raise ConfigError(f'share_prompt="on", but {reason}; use share_prompt="auto" to fall back')
    return Layout(name="padded", line=f"layout: padded ({'; '.join(reasons)})", longest=longest)


def _longest(model: PreTrainedModel) -> tuple[int | None, list[str]]:
    """`Layout.longest`, and what to say of it."""
    try:
        longest = longest_free_row(model)
    except _REFUSALS as refusal:
        return 0, [f"every sequence alone: its rope cannot be asked what it depends on ({type(refusal).__name__})"]
    note = f"sequences of more than {longest} tokens alone: its rope depends on a row's longest"
    return longest, [] if longest is None else [note]


def _disagreement(model: PreTrainedModel, layout: str, notes: list[str]) -> str | None:
    """None where the layout gives the model's own numbers, with the form that does in place; else why it does not."""
    if "position_ids" not in inspect.signature(decoder_of(model).forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION
    if others:
        return f"its layers of type {', '.join(sorted(others))} mix neighbouring tokens"
    text = model.config.get_text_config()
    if getattr(text, "attn_temperature_tuning", False) and hasattr(text, "floor_scale"):
        return "it scales queries by their index in the row (attn_temperature_tuning)"  # below a bfloat16 probe's tolerance
    if model.config._attn_implementation not in OWN:
        return f"attention {model.config._attn_implementation!r} cannot be called tree by tree"
    reasons: dict[str, str] = {}
    for form in FORMS:
        reason = why_not_one_mask(model) if form == "mask" else None
        if reason is None:
            if not use_forest_attention(model, form):
                if form == "blocks" and model.device.type == "cuda":
                    reasons[form] = why_not_flex(model) or "its attention does not go through transformers' interface"
                continue
            reason = _compare_shortened(model, layout)
            if reason is None:
                if form != "blocks" and "blocks" in reasons:
                    notes.append(f"not in one kernel: {reasons['blocks']}")
                return None
            restore_attention(model)
        reasons[form] = reason
    return reasons.get("trees") or reasons["mask"]


def _compare_shortened(model: PreTrainedModel, layout: str) -> str | None:
    """`_compare` with the model as it is, then with each of its limits shortened."""
    for limit in (None, *(name for name in _LIMITS if _holders(model, name))):
        with _shortened(model, limit):
            reason = _compare(model, layout)
        if reason is not None:
            return reason + (f" with {limit}={_SHORT}" if limit else "")
    return None


def _compare(model: PreTrainedModel, layout: str) -> str | None:
    trees = _probe_trees(model)
    forest = build_forest(trees, layout).to(model.device)
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            want = _one_by_one(model, trees)
            try:
                found = forest_token_logps(model, forest)
                if forest_form(model) == "blocks":
                    _backward(model, forest)
            except _REFUSALS as refusal:
                why = " ".join(str(refusal).split())[:120]
                return f"{type(model).__name__} cannot run it ({type(refusal).__name__}: {why})"
    finally:
        for module, mode in training:
            module.training = mode
    error = (found - want).abs() / want.abs().clamp(min=1)
    at = int(error.nan_to_num(nan=math.inf).argmax())
    exact = model.dtype in (torch.float32, torch.float64) and model.device.type == "cpu"
    tolerance = _EXACT if exact else TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])
    if float(error[at]) <= tolerance:
        return None
    return f"a log-prob is {float(found[at]):.6g} in it and {float(want[at]):.6g} by {type(model).__name__} alone"


def _backward(model: PreTrainedModel, forest: PreferenceForest) -> None:
    """Run a backward pass through every layer, which a kernel compiles apart from its forward pass; gradients are kept nowhere."""
    embedded: list[Tensor] = []

    def with_gradient(module: Any, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_(True))
        return embedded[0]

    handle = model.get_input_embeddings().register_forward_hook(with_gradient)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(forest_token_logps(model, forest).sum(), embedded)
    finally:
        handle.remove()
    if not bool(gradient.isfinite().all()):
        raise ValueError("a gradient is not finite")


def _one_by_one(model: PreTrainedModel, trees: list[_Tree]) -> Tensor:
    """(N,) log-probs by the model's own forward, a sequence a call."""
    found = []
    for tree in trees:
        for completion in tree.completions:
            sequence = torch.tensor([tree.prompt_ids + completion], device=model.device)
            logits = model(input_ids=sequence, use_cache=False).logits[0, :-1].float()
            logps = logits.log_softmax(-1).gather(1, sequence[0, 1:, None]).squeeze(1)
            found.append(logps[len(tree.prompt_ids) - 1 :])
    return torch.cat(found)


def _probe_trees(model: PreTrainedModel) -> list[_Tree]:
    config = model.config.get_text_config()
    named = {**model.config.to_dict(), **config.to_dict()}
    special = {v for k, v in named.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    ids = torch.tensor([i for i in range(min(config.vocab_size, 4096)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return ids[torch.randint(len(ids), (count,), generator=generator)].tolist()

    return [_Tree(some(prompt), [some(n) for n in completions]) for prompt, completions in _SIZES]


def _holders(model: PreTrainedModel, name: str) -> list[dict[str, Any]]:
    """Where the model keeps a limit that a probe is too short to reach: its config, its rope's parameters, its modules."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    places = [vars(config), rope, *(p for p in rope.values() if isinstance(p, dict)), *map(vars, model.modules())]
    places = [p for p in places if _BESIDE.get(name, name) in p]
    return [p for p in places if isinstance(p.get(name), (int, float)) and p[name] > _SHORT]


@contextmanager
def _shortened(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Within it, the model has a limit that a probe can see: it is read at every call, to make masks and scales."""
    if name is None:
        yield
        return
    kept = [(holder, holder[name]) for holder in _holders(model, name)]
    for holder, _ in kept:
        holder[name] = _SHORT
    try:
        yield
    finally:
        for holder, value in kept:
            holder[name] = value
