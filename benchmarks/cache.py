"""What does the reference cache cost, and what does it save?

    python -m benchmarks.cache --data pairs.jsonl                 all three parts, SmolLM2-135M
    python -m benchmarks.cache --data pairs.jsonl --parts build sweep --pairs 32 --rounds 3

store   made-up log-probs with the lengths of the data: rows/s written and read, bytes a token and a row. Reading is what training
        does: token ids are hashed to addresses, every entry's checksum is compared, values end in the data set's memory.
build   filling an empty cache beside the bare no-gradient forward of the same forests, in turns: the ratio of each round.
sweep   seconds until the reference of all pairs is at hand, for four values of beta one after the other on one cache.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import describe_machine, table, time_alternating, write_results

PARTS = ("store", "build", "sweep")
BETAS = (0.05, 0.1, 0.2, 0.5)
BATCH = 64
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    import torch
    from transformers import AutoModelForCausalLM, logging

    from dpo_engine.data import load_pairs
    from dpo_engine.model.loading import load_tokenizer, resolve_model

    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    machine = describe_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    path = resolve_model(args.model, progress=lambda line: print(line, file=sys.stderr))
    data = load_pairs(args.data, load_tokenizer(path), max_length=args.max_length, skip_bad_rows=True)

    def trainer(pairs: Any, folder: Path, beta: float = 0.1) -> Any:
        from dpo_engine import DPOConfig, DPOTrainer
        from dpo_engine.model.adapters import add_lora

        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype))
        config = DPOConfig(
            output_dir=str(folder / "out"), beta=beta, disable_tqdm=True, use_cpu=not torch.cuda.is_available()
        )
        return DPOTrainer(model=add_lora(model), args=config, train_dataset=pairs, reference_cache=folder / "cache")

    records: list[Record] = []
    try:
        for part in args.parts:
            with tempfile.TemporaryDirectory(prefix="dpo-cache-", dir=args.folder) as folder:
                measure: Callable[..., list[Record]] = {
                    "store": measure_store,
                    "build": measure_build,
                    "sweep": measure_sweep,
                }[part]
                found = measure(Path(folder), data, trainer, args)
            common = {
                "data": Path(args.data).name,
                "model": Path(args.model).name,
                "dtype": args.dtype,
                "threads": args.threads,
            }
            records += [{"part": part, **common, **record} for record in found]
            print(
                table(list(found[0]), [[_shown(value) for value in record.values()] for record in found]),
                "\n",
                flush=True,
            )
    finally:
        if records and not args.no_save:
            print(f"written to {write_results('cache', records, machine=machine)}")
    return 0


def measure_store(folder: Path, data: Any, trainer: Any, args: argparse.Namespace) -> list[Record]:
    """One record for each way of laying the rows out."""
    from dpo_engine.batch import Tree
    from dpo_engine.reference.addresses import entry_addresses
    from dpo_engine.reference.filling import look_up
    from dpo_engine.reference.store import ReferenceStore
    from dpo_engine.reference.values import ReferenceValues

    draw = random.Random(0)
    trees = []
    for number in range(args.rows):
        like = data.trees[number % len(data.trees)]
        ids = [[draw.randrange(50_000) for _ in ids] for ids in (like.prompt_ids, *like.completions)]
        trees.append(Tree(prompt_ids=ids[0], completions=ids[1:]))
    tokens = sum(len(ids) for tree in trees for ids in tree.completions)
    entries = [
        (address, draw.randbytes(4 * len(ids)))
        for tree in trees
        for address, ids in zip(entry_addresses(tree), tree.completions, strict=True)
    ]
    space = "0" * 32
    writer = ReferenceStore(folder / space, space)
    begin = time.perf_counter()
    for first in range(0, len(entries), BATCH):
        writer.put(entries[first : first + BATCH])
    written = time.perf_counter() - begin
    writer.close()
    bytes_used = sum(path.stat().st_size for path in (folder / space).glob("*.sqlite"))
    seconds = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        values = ReferenceValues(trees)
        missing = look_up(values, ReferenceStore(folder / space, space), range(len(trees)))
        seconds.append(time.perf_counter() - begin)
        assert not missing
    read = statistics.median(seconds)
    return [
        {
            "rows": len(trees),
            "tokens": tokens,
            "rows_per_s_written": round(len(trees) / written),
            "rows_per_s_read": round(len(trees) / read),
            "bytes_per_token": round(bytes_used / tokens, 3),
            "bytes_per_entry_over_values": round((bytes_used - 4 * tokens) / len(entries), 1),
        }
    ]


def measure_build(folder: Path, data: Any, trainer: Any, args: argparse.Namespace) -> list[Record]:
    """One record: filling beside the bare forward of the same forests."""
    from dpo_engine.reference.cache import no_bar
    from dpo_engine.reference.filling import fill
    from dpo_engine.reference.values import ReferenceValues

    pairs = data.trees[: args.pairs]
    run = trainer(pairs, folder)
    references = run.references
    references.open()  # the weights are read once, beside the first fill of a run
    forests = references.pack(pairs)

    def bare(_: int) -> None:
        for forest in forests:
            references.score(forest)

    def build(_: int) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        store = references.cache.store(references.space, references.made())
        filled = fill(ReferenceValues(pairs), store, references.score, references.pack, bar=no_bar)
        assert filled.computed == len(pairs)

    timings = time_alternating({"bare forward": bare, "build": build}, rounds=args.rounds)
    ratios = [b / a for a, b in zip(timings["bare forward"].seconds, timings["build"].seconds, strict=True)]
    begin = time.perf_counter()
    again = trainer(pairs, folder)
    made = time.perf_counter() - begin
    begin = time.perf_counter()
    again.references.open()
    opened = time.perf_counter() - begin
    return [
        {
            "pairs": len(pairs),
            "forests": len(forests),
            "bare_forward_s": round(timings["bare forward"].median, 2),
            "build_s": round(timings["build"].median, 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_least": round(min(ratios), 3),
            "ratio_most": round(max(ratios), 3),
            "weights_read_s": round(opened, 2),
            "start_of_a_run_s": round(made, 2),
        }
    ]


def measure_sweep(folder: Path, data: Any, trainer: Any, args: argparse.Namespace) -> list[Record]:
    """One record for each beta."""
    pairs = data.trees[: args.pairs]
    found = []
    for beta in BETAS:
        run = trainer(pairs, folder, beta)
        begin = time.perf_counter()
        run.know_reference()
        seconds = time.perf_counter() - begin
        filled = run.references.filled
        found.append({"beta": beta, "reused": filled.reused, "computed": filled.computed, "seconds": round(seconds, 2)})
    return found


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference pairs, as for dpo-engine train")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", type=int, default=20_000, help="of the part store")
    parser.add_argument("--pairs", type=int, default=48, help="of the parts build and sweep")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the caches lie; default: the system's folder for temporary files"
    )
    parser.add_argument("--no_save", action="store_true", help="print only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
