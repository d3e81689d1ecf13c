"""What can `dpo-engine` do? The verbs."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="dpo-engine",
    help="Preference optimisation (DPO and its family) on one GPU, or none.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    if version:
        from dpo_engine import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    short_help="Train a model on preference pairs.",
)
def train(context: typer.Context) -> None:
    """dpo-engine train [CONFIG.yaml] [--key value ...]"""
    from dpo_engine.cli.train import train_command

    train_command(context.args)


@app.command(short_help="What this machine can run, how fast, and what is missing.")
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Measure the head of this model (folder, hub id or smollm2).")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Measure this shape: N,D,V (rows, hidden size, vocabulary).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16).")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Measure nothing; show what was measured before.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line of stdout; the text goes to stderr.")
    ] = False,
) -> None:
    """Print versions, devices and what is missing; measure the operator's backends and keep which is fastest.

    Training with `backend: auto` uses what was measured here, and "tiled" until there is something.
    """
    from dpo_engine.cli.doctor import doctor_command

    raise typer.Exit(doctor_command(model=model, shape=shape, dtype=dtype, quick=quick, as_json=as_json))
