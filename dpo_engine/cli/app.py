"""What can `dpo-engine` do? The verbs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer(
    name="dpo-engine",
    help="Preference optimisation (DPO and its family) on one GPU, or none.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _both(name: str, text: str) -> Any:
    """An option that may be written with underscores, as a key of `dpo-engine train`, or with dashes."""
    return typer.Option(name, name[:2] + name[2:].replace("_", "-"), help=text)


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


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    short_help="Measure it: the operator, memory, the cache, how cost grows, whole steps beside TRL.",
)
def bench(context: typer.Context) -> None:
    """dpo-engine bench [SUITE ...] [--smoke] [--data_dir FOLDER], or list, report, readme, compare."""
    from dpo_engine.cli.bench import bench_command

    raise typer.Exit(bench_command(context.args))


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


@app.command(short_help="Whether data is any good: rows, lengths, what training on it computes, tokens of a row.")
def inspect(
    data: Annotated[str, typer.Argument(help="What `dpo-engine train` is given as data: a file or a hub dataset id.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template: folder, hub id or smollm2.")],
    method: Annotated[str, typer.Option(help="The method that would train: it decides what rows must be.")] = "dpo",
    split: Annotated[str, typer.Option("--data_split", "--data-split", "--split", help="Of a hub dataset.")] = "train",
    max_length: Annotated[str, _both("--max_length", "Most tokens of a prompt and a completion, or none.")] = "1024",
    truncation: Annotated[str, typer.Option(help="keep_start, keep_end, drop or error.")] = "keep_start",
    chat_template: Annotated[str, _both("--chat_template", "auto, on or off.")] = "auto",
    skip_bad_rows: Annotated[bool, _both("--skip_bad_rows", "Leave out rows that cannot be parsed.")] = False,
    max_pairs: Annotated[int | None, _both("--max_pairs", "Only the first so many usable pairs.")] = None,
    batch_size: Annotated[int, _both("--per_device_train_batch_size", "Pairs in a padded rectangle.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the run: it decides which pairs share a rectangle.")] = 42,
    row: Annotated[int | None, typer.Option(help="Show the tokens of this row (its number as in messages).")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="With --row: each token's id beside it.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line of stdout; the text goes to stderr.")
    ] = False,
) -> None:
    """Print which rows are used, how long they are, and what an epoch computes padded, packed and with shared prompts.

    Flags and defaults are those of `dpo-engine train`. Only the model's config and tokenizer are read, never weights.
    """
    from dpo_engine.cli.inspect import InspectOptions, inspect_command

    options = InspectOptions(
        data=data,
        model=model,
        method=method,
        split=split,
        max_length=max_length,
        truncation=truncation,
        chat_template=chat_template,
        skip_bad_rows=skip_bad_rows,
        max_pairs=max_pairs,
        batch_size=batch_size,
        seed=seed,
    )
    inspect_command(options, row=row, ids=ids, as_json=as_json)


@app.command(short_help="Will it fit? Peak memory by part, before anything is downloaded, and a YAML file that fits.")
def plan(
    model: Annotated[
        str | None,
        typer.Option(help="A short name (without --model, their table), a folder, a config.json or a hub id."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="As for train: it decides what rows must be, and where a reference lies.")
    ] = "dpo",
    gpu: Annotated[str | None, typer.Option(help="24GB, rtx-4090, ...; what nvidia-smi tells if not given.")] = None,
    data: Annotated[str | None, typer.Option(help="Preference data: how long its rows are decides.")] = None,
    max_length: Annotated[int | None, _both("--max_length", "As for train; the largest safe if not given.")] = None,
    load_in_4bit: Annotated[str, _both("--load_in_4bit", "NF4 weights: true or false.")] = "true",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    lora_r: Annotated[int, _both("--lora_r", "LoRA rank; 0 trains every parameter.")] = 16,
    lora_target_modules: Annotated[
        str | None, _both("--lora_target_modules", "Names, separated by commas; all linear layers if not given.")
    ] = None,
    lora_head: Annotated[str, _both("--lora_head", "An adapter on the head too: true or false.")] = "false",
    optim: Annotated[str | None, typer.Option(help="As for train; paged_adamw_8bit for LoRA if not given.")] = None,
    gradient_checkpointing: Annotated[str, _both("--gradient_checkpointing", "true or false.")] = "true",
    activation_offload: Annotated[
        str, _both("--activation_offload", "Checkpoints wait in host memory: true or false.")
    ] = "false",
    output: Annotated[str | None, typer.Option(help="Write the YAML file there.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line of stdout; the text goes to stderr.")
    ] = False,
) -> None:
    """Predict the peak memory of training, part by part, from a model's config alone; write settings that fit a card.

    Exit code 2, with the cheapest change, where nothing fits.
    """
    from dpo_engine.cli.plan import PlanOptions, plan_command, switch

    options = PlanOptions(
        model=model,
        method=method,
        gpu=gpu,
        data=data,
        max_length=max_length,
        load_in_4bit=switch("load_in_4bit", load_in_4bit),
        dtype=dtype,
        lora_r=lora_r,
        lora_target_modules=lora_target_modules,
        lora_head=switch("lora_head", lora_head),
        optim=optim,
        gradient_checkpointing=switch("gradient_checkpointing", gradient_checkpointing),
        activation_offload=switch("activation_offload", activation_offload),
    )
    plan_command(options, output=output, as_json=as_json)


@app.command(short_help="Merge an adapter into its base, convert it to GGUF, print the commands that serve it.")
def export(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter that training saved.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write a plain model, adapter and base in one.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
    output: Annotated[
        str | None, typer.Option(help="New folder of the merged model; ADAPTER-merged if not given.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model it was trained on, if not where the adapter says.")] = None,
    load_in_4bit: Annotated[
        str, _both("--load_in_4bit", "Whether it was trained on 4-bit weights: auto (as recorded), true or false.")
    ] = "auto",
    gguf: Annotated[bool, typer.Option("--gguf", help="Merge, and convert with llama.cpp's own script.")] = False,
    outtype: Annotated[
        str, typer.Option(help="Of the GGUF file: f32, f16, bf16, q8_0, tq1_0, tq2_0 or auto.")
    ] = "q8_0",
    llama_cpp: Annotated[
        str | None, _both("--llama_cpp", "Checkout of llama.cpp; else $LLAMA_CPP, else its script on PATH.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line of stdout; the text goes to stderr.")
    ] = False,
) -> None:
    """Check an adapter against its base and print how to serve it; with --merge or --gguf, make a plain model of both.

    The merged model is read back and compared with the adapter on its base before it appears under its name.
    """
    from dpo_engine.cli.export import export_command
    from dpo_engine.export.run import ExportOptions

    options = ExportOptions(
        adapter=adapter,
        merge=merge,
        dtype=dtype,
        output=output,
        base=base,
        load_in_4bit=load_in_4bit,
        gguf=gguf,
        outtype=outtype,
        llama_cpp=llama_cpp,
    )
    export_command(options, as_json=as_json)


@app.command(short_help="Talk to a model, or to an adapter on its base, in the terminal.")
def chat(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, smollm2, or an adapter folder.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, _both("--max_new_tokens", "Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.7,
    load_in_4bit: Annotated[bool, _both("--load_in_4bit", "Weights in 4 bits (NF4).")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16).")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
) -> None:
    """A line is a turn; stdin may be a pipe. /base switches the adapter off and on, /clear forgets, /exit ends."""
    from dpo_engine.cli.chat import chat_command

    chat_command(
        model,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        in_4bit=load_in_4bit,
        dtype=dtype,
        seed=seed,
    )


cache_app = typer.Typer(
    help="Reference log-probs on disk. Every verb takes the keys and the YAML file of `dpo-engine train`, --reference_cache FOLDER "
    "among them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache", short_help="Build, look at and check reference log-probs on disk.")

_TRAIN_KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}
_EPILOG = "Beside these, every key of `dpo-engine train --help`."
_AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object as the last line of stdout; the text goes to stderr.")
]


def _cache(verb: str, arguments: list[str], as_json: bool, **own: Any) -> None:
    from dpo_engine.cli.cache import cache_command

    cache_command(verb, arguments, as_json, **own)


@cache_app.command(
    context_settings=_TRAIN_KEYS, epilog=_EPILOG, short_help="Compute what the cache lacks of a data set."
)
def build(context: typer.Context, as_json: _AsJson = False) -> None:
    """dpo-engine cache build [CONFIG.yaml] --model M --data D [--key value ...]"""
    _cache("build", context.args, as_json)


@cache_app.command(
    context_settings=_TRAIN_KEYS,
    epilog=_EPILOG,
    short_help="What the cache holds; of a data set, with --model and --data.",
)
def info(context: typer.Context, as_json: _AsJson = False) -> None:
    """dpo-engine cache info [CONFIG.yaml] [--key value ...]"""
    _cache("info", context.args, as_json)


@cache_app.command(
    context_settings=_TRAIN_KEYS,
    epilog=_EPILOG,
    short_help="Check every entry; with --model and --data, against the model too.",
)
def verify(
    context: typer.Context,
    every: Annotated[bool, typer.Option("--all", help="Compute every row again, not a few.")] = False,
    as_json: _AsJson = False,
) -> None:
    """dpo-engine cache verify [CONFIG.yaml] [--all] [--key value ...]; exit code 1 if anything is wrong."""
    _cache("verify", context.args, as_json, every=every)


@cache_app.command(
    context_settings=_TRAIN_KEYS,
    epilog=_EPILOG,
    short_help="Put the files of all writers together, and take over other folders'.",
)
def merge(
    context: typer.Context,
    others: Annotated[
        list[str] | None, typer.Option("--from", help="Folder of another cache; may be repeated.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """dpo-engine cache merge [--from FOLDER] [--key value ...]"""
    _cache("merge", context.args, as_json, others=others or [])


@cache_app.command(
    context_settings=_TRAIN_KEYS, epilog=_EPILOG, short_help="Remove damaged files, and what is not used any more."
)
def prune(
    context: typer.Context,
    unused_days: Annotated[
        float | None, _both("--unused_days", "Also remove what no run has used for so many days.")
    ] = None,
    space: Annotated[str | None, typer.Option(help="Also remove this space; at least 4 digits of its address.")] = None,
    as_json: _AsJson = False,
) -> None:
    """dpo-engine cache prune [--unused_days N] [--space ADDRESS] [--key value ...]"""
    _cache("prune", context.args, as_json, unused_days=unused_days, space=space)
