"""`dpo-engine inspect`: is this data any good, and what will training on it compute?

Rows are read exactly as `dpo-engine train` reads them. Of the model only its config and its tokenizer are read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from dpo_engine.data import TokenizedTree, check_source, load_pairs, load_row
from dpo_engine.data.inspection import ModelCost, completion_names, inspect_pairs
from dpo_engine.data.mismatched import with_mismatched
from dpo_engine.data.token_view import Piece, token_pieces, visible
from dpo_engine.errors import ConfigError
from dpo_engine.losses.table import get_method
from dpo_engine.model.loading import check_model, load_tokenizer, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SCHEMA = 1
_SCORED = ("black on green", "black on cyan")  # in turn, so that boundaries show


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The flags of the verb; names, meaning and defaults are those of `dpo-engine train`."""

    data: str
    model: str
    method: str
    split: str
    max_length: str
    """A number of tokens, or none."""
    truncation: str
    chat_template: str
    skip_bad_rows: bool
    max_pairs: int | None
    batch_size: int
    seed: int

    def reading(self) -> dict[str, Any]:
        """What `load_pairs` and `load_row` are told."""
        return {
            "max_length": _tokens_or_none(self.max_length),
            "truncation": self.truncation,
            "chat_template": self.chat_template,
            "skip_bad_rows": self.skip_bad_rows,
            "method": self.method,
            "kind": self.kind(),
        }

    def kind(self) -> str:
        """What the method trains on."""
        return get_method(self.method).kind


def inspect_command(options: InspectOptions, *, row: int | None, ids: bool, as_json: bool) -> None:
    """Print the account of the data, or the tokens of one row.

    With `as_json` what is meant for people goes to stderr, and the last line of stdout is one JSON object.

    Raises:
        EngineError: as training would for the same data and model.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    out = sys.stderr if as_json else sys.stdout
    reading = options.reading()
    if row is None:
        source = check_source(
            options.data,
            split=options.split,
            skip_bad_rows=options.skip_bad_rows,
            method=options.method,
            kind=options.kind(),
        )
        config, path, tokenizer = _model(options.model)
        data = load_pairs(source, tokenizer, limit=options.max_pairs, **reading)
        if options.kind() == "unpaired":
            data = replace(data, trees=with_mismatched(data.trees, reading["max_length"]))
        found = inspect_pairs(data, batch_size=options.batch_size, seed=options.seed)
        cost = model_cost(config)
        print(*data.report.lines(), "", *found.lines(cost), sep="\n", file=out)
        account = asdict(data.report)
        del account["examples"]
        numbers = account | found.numbers(cost)
    else:
        _, path, tokenizer = _model(options.model)
        tree = load_row(options.data, row, tokenizer, split=options.split, **reading)
        sections = _sections(tree, tokenizer)
        console = Console(file=out, highlight=False)
        for line in _view(tree.origin, sections, ids=ids, marks=console.color_system is None or console.no_color):
            console.print(line, soft_wrap=True)
        numbers = {"origin": tree.origin} | {name: [asdict(p) for p in pieces] for name, pieces in sections.items()}
    if as_json:
        print(json.dumps({"schema": SCHEMA, "model_path": path} | numbers))


def _tokens_or_none(text: str) -> int | None:
    if text.lower() in ("none", "null"):
        return None
    if not text.isdecimal():
        raise ConfigError(f"max_length={text!r}; expected a number of tokens, or none")
    return int(text)


def _model(name: str) -> tuple[PreTrainedConfig, str, PreTrainedTokenizerBase]:
    path = resolve_model(name, progress=lambda line: print(line, file=sys.stderr))
    return check_model(path), path, load_tokenizer(path)


def model_cost(config: PreTrainedConfig) -> ModelCost:
    """What a model of this config does for a token, from its shapes alone; sliding windows are not taken into account.

    Of a mixture's experts those count that a token is sent to.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_engine.model.head import head_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 0)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    layers = text.num_hidden_layers
    vocabulary, hidden_size = head_of(model).shape
    looked_up = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    apart = {
        id(parameter) for module in [*looked_up, model.get_output_embeddings()] for parameter in module.parameters()
    }
    weights = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in apart:
            routed = ".experts." in name and parameter.ndim == 3  # (experts, ..., ...)
            used = getattr(text, "num_experts_per_tok", 1) / parameter.shape[0] if routed else 1
            weights += used * parameter.numel()
    return ModelCost(
        per_token=round(2 * weights),
        per_attended=4 * layers * heads * head_dim,
        per_scored=2 * hidden_size * vocabulary,
    )


# ---- the tokens of a row ----


def _sections(tree: TokenizedTree, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Piece]]:
    """The pieces of the prompt and of each completion."""
    prompt = token_pieces(tokenizer, tree.prompt_ids, [False] * len(tree.prompt_ids))
    completions = {
        name: token_pieces(tokenizer, ids, mask, before=tree.prompt_ids)
        for name, ids, mask in zip(completion_names(tree), tree.completions, tree.scored_masks, strict=True)
    }
    return {"prompt": prompt} | completions


def _view(origin: str, sections: dict[str, list[Piece]], *, ids: bool, marks: bool) -> list[Text]:
    """Lines for people: with marks around tokens, or else with colours."""
    legend = (
        Text("[scored] (not scored) *special")
        if marks
        else Text.assemble(
            ("prompt", "dim"), " ", ("scored", _SCORED[0]), ("scored", _SCORED[1]), " ",
            ("not scored", "bright_black"), " ", ("special", "bold underline"),
        )
    )  # fmt: skip
    lines = [Text(f"{origin}, · is a space, ↵ a newline: ") + legend]
    for name, pieces in sections.items():
        tokens = sum(len(piece.ids) for piece in pieces)
        scored = sum(len(piece.ids) for piece in pieces if piece.scored)
        lines += [Text(), Text(f"{name}: {tokens} tokens, {scored} scored")]
        lines.append(_tokens_line(pieces, in_prompt=name == "prompt", ids=ids, marks=marks))
    return lines


def _tokens_line(pieces: Sequence[Piece], *, in_prompt: bool, ids: bool, marks: bool) -> Text:
    line = Text()
    for index, piece in enumerate(pieces):
        text = visible(piece.text)
        number = f":{'+'.join(map(str, piece.ids))}" if ids else ""
        if marks:
            open_, close = "[]" if piece.scored else "()"
            line.append(f"{open_}{'*' * piece.special}{text}{number}{close}")
        else:
            plain = "dim" if in_prompt else "bright_black"
            style = _SCORED[index % 2] if piece.scored else plain
            line.append(text, style + " bold underline" * piece.special)
            line.append(number, "dim")
            line.append(" " * ids)
        if "\n" in piece.text:
            line.append("\n")
    line.rstrip()
    return line
