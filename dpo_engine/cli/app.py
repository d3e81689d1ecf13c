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
