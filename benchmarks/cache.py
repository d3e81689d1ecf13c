"""What does the reference cache cost, and what does it save?

    python -m benchmarks.cache                                    all three cases, SmolLM2-135M, the packaged example pairs
    python -m benchmarks.cache --data pairs.jsonl --cases build sweep --pairs 32 --rounds 3
    python -m benchmarks.cache --smoke                            does it run? A random model, seconds

store   made-up log-probs with the lengths of the data: rows/s written and read, bytes a token and a row. Reading is what training
        does: token ids are hashed to addresses, every entry's checksum is compared, values end in the data set's memory.
build   filling an empty cache beside the bare no-gradient forward of the same forests, in turns: the ratio of each round.
sweep   seconds until the reference of all pairs is at hand, for four values of beta one after the other on one cache, which is
        empty at the start of every round.

`median_ms`, `p20_ms` and `p80_ms` are of reading, of building, and of what is written above of `sweep`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    ROOT,
    Neighbours,
    Timing,
    add_suite_options,
    describe_machine,
    rounds_of,
    save,
    table,
    time_alternating,
)
from benchmarks.smoke import WHY, tiny_model, tiny_pairs

CASES = ("store", "build", "sweep")
IMPLEMENTATIONS = ("engine",)
BETAS = (0.05, 0.1, 0.2, 0.5)
BATCH = 64
DATA = ROOT / "examples" / "concise_train.jsonl"
SMOKE = {"rows": 40, "pairs": 4}
Record = dict[str, Any]
MakeTrainer = Callable[..., Any]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    machine = describe_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    records: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="dpo-cache-", dir=args.work_folder) as work:
        path, data = _smoke_data(Path(work), args) if args.smoke else _data(args)
        rounds = rounds_of(args)
        try:
            for case in args.cases:
                measure = {"store": measure_store, "build": measure_build, "sweep": measure_sweep}[case]
                folder = Path(work) / case
                found = measure(folder, data, _trainers(path, args.dtype), args.rows, args.pairs, rounds)
                shutil.rmtree(folder, ignore_errors=True)
                records += [{**_common(case, args, rounds), **record} for record in found]
                print(_shown(found), "\n", flush=True)
        finally:
            if args.smoke:
                records = [{**record, "unquotable": record["unquotable"] or WHY} for record in records]
            save("cache", records, args, machine)
    return 0


def _common(case: str, args: argparse.Namespace, rounds: int) -> Record:
    return {
        "case": case,
        "implementation": "engine",
        "dtype": args.dtype,
        "threads": args.threads,
        "rounds": rounds,
        "status": "measured",
        "unquotable": None,
        "data": "random" if args.smoke else args.data.name,
        "model": "random" if args.smoke else Path(args.model).name,
    }


def _data(args: argparse.Namespace) -> tuple[str, Any]:
    from dpo_engine.data import load_pairs
    from dpo_engine.model.loading import load_tokenizer, resolve_model

    path = str(resolve_model(args.model, progress=lambda line: print(line, file=sys.stderr)))
    return path, load_pairs(args.data, load_tokenizer(path), max_length=args.max_length, skip_bad_rows=True)


def _smoke_data(work: Path, args: argparse.Namespace) -> tuple[str, Any]:
    from benchmarks.steps.engine import pair_data

    args.rows, args.pairs = SMOKE["rows"], SMOKE["pairs"]
    return str(tiny_model(work / "model")), pair_data(tiny_pairs(8))


def _trainers(path: str, dtype: str) -> MakeTrainer:
    """Trainers of the model, each anew, with a cache in the folder that they are given."""

    def trainer(pairs: Any, folder: Path, beta: float = 0.1) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from dpo_engine import DPOConfig, DPOTrainer
        from dpo_engine.model.adapters import add_lora

        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        config = DPOConfig(
            output_dir=str(folder / "out"), beta=beta, disable_tqdm=True, use_cpu=not torch.cuda.is_available()
        )
        return DPOTrainer(model=add_lora(model), args=config, train_dataset=pairs, reference_cache=folder / "cache")

    return trainer


def measure_store(folder: Path, data: Any, trainer: MakeTrainer, rows: int, pairs: int, rounds: int) -> list[Record]:
    """One record: rows of made-up log-probs are written into an empty store and read back, in turns."""
    from dpo_engine.batch import Tree
    from dpo_engine.reference.addresses import entry_addresses
    from dpo_engine.reference.filling import look_up
    from dpo_engine.reference.store import ReferenceStore
    from dpo_engine.reference.values import ReferenceValues

    draw = random.Random(0)
    trees = []
    for number in range(rows):
        like = data.trees[number % len(data.trees)]
        ids = [[draw.randrange(50_000) for _ in ids] for ids in (like.prompt_ids, *like.completions)]
        trees.append(Tree(prompt_ids=ids[0], completions=ids[1:]))
    tokens = sum(len(ids) for tree in trees for ids in tree.completions)
    entries = [
        (address, draw.randbytes(4 * len(ids)))
        for tree in trees
        for address, ids in zip(entry_addresses(tree), tree.completions, strict=True)
    ]
    written = [value for _, value in entries]
    space = "0" * 32
    place = folder / space
    wrong: list[str] = []

    def write(_: int) -> None:
        shutil.rmtree(place, ignore_errors=True)
        writer = ReferenceStore(place, space)
        for first in range(0, len(entries), BATCH):
            writer.put(entries[first : first + BATCH])
        writer.close()

    def read(_: int) -> None:
        values = ReferenceValues(trees)
        store = ReferenceStore(place, space)
        missing = look_up(values, store, range(len(trees)))
        store.close()
        if missing:
            wrong.append(f"wrong: {len(missing)} rows that were written were not found")

    neighbours = Neighbours(repeats=rounds)
    write(0)  # there is something to read, whichever comes first
    timings = time_alternating({"write": write, "read": read}, rounds=rounds, neighbours=neighbours)
    values = ReferenceValues(trees)
    look_up(values, ReferenceStore(place, space), range(len(trees)))
    if [logps.numpy().tobytes() for tree in range(len(trees)) for logps in values.logps(tree)] != written:
        wrong.append("wrong: what was read is not what was written")
    bytes_used = sum(path.stat().st_size for path in place.glob("*.sqlite"))
    return [
        {
            "store_rows": len(trees),
            "tokens": tokens,
            **_times(timings["read"]),
            **{f"write_{name}": value for name, value in _times(timings["write"]).items()},
            "rows_per_s_written": round(len(trees) / timings["write"].median),
            "rows_per_s_read": round(len(trees) / timings["read"].median),
            "bytes_per_token": round(bytes_used / tokens, 3),
            "bytes_per_entry_over_values": round((bytes_used - 4 * tokens) / len(entries), 1),
            "unquotable": next(iter(wrong), None) or neighbours.why or timings["read"].why or timings["write"].why,
        }
    ]


def measure_build(folder: Path, data: Any, trainer: MakeTrainer, rows: int, pairs: int, rounds: int) -> list[Record]:
    """One record: filling beside the bare forward of the same forests."""
    from dpo_engine.reference.cache import no_bar
    from dpo_engine.reference.filling import fill
    from dpo_engine.reference.values import ReferenceValues

    some = data.trees[:pairs]
    run = trainer(some, folder)
    references = run.references
    references.open()  # the weights are read once, beside the first fill of a run
    forests = references.pack(some)
    wrong: list[str] = []

    def bare(_: int) -> None:
        for forest in forests:
            references.score(forest)

    def build(_: int) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        store = references.cache.store(references.space, references.made())
        filled = fill(ReferenceValues(some), store, references.score, references.pack, bar=no_bar)
        store.close()
        if filled.computed != len(some):
            wrong.append(f"wrong: {filled.computed} of {len(some)} rows were computed")

    neighbours = Neighbours(repeats=rounds)
    timings = time_alternating({"bare forward": bare, "build": build}, rounds=rounds, neighbours=neighbours)
    ratio = timings["build"].over(timings["bare forward"])
    begin = time.perf_counter()
    again = trainer(some, folder)
    made = time.perf_counter() - begin
    begin = time.perf_counter()
    again.references.open()
    opened = time.perf_counter() - begin
    return [
        {
            "pairs": len(some),
            "forests": len(forests),
            **_times(timings["build"]),
            **{f"bare_{name}": value for name, value in _times(timings["bare forward"]).items()},
            "over_bare": {
                "median": round(ratio.median, 3),
                "p20": round(ratio.p20, 3),
                "p80": round(ratio.p80, 3),
                "least": round(min(ratio.seconds), 3),
                "most": round(max(ratio.seconds), 3),
            },
            "weights_read_s": round(opened, 2),
            "start_of_a_run_s": round(made, 2),
            "unquotable": next(iter(wrong), None) or neighbours.why or ratio.why,
        }
    ]


def measure_sweep(folder: Path, data: Any, trainer: MakeTrainer, rows: int, pairs: int, rounds: int) -> list[Record]:
    """One record for each beta."""
    some = data.trees[:pairs]
    seconds: dict[float, list[float]] = {beta: [] for beta in BETAS}
    found: dict[float, Record] = {}
    wrong: dict[float, str] = {}
    neighbours = Neighbours()
    for _ in range(rounds):
        neighbours.start()
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for beta in BETAS:
            run = trainer(some, folder, beta)
            begin = time.perf_counter()
            run.know_reference()
            seconds[beta].append(time.perf_counter() - begin)
            filled = run.references.filled
            found[beta] = {"reused": filled.reused, "computed": filled.computed}
            if filled.computed != (len(some) if beta == BETAS[0] else 0):
                wrong[beta] = f"wrong: {filled.computed} rows were computed at beta {beta}"
        neighbours.keep()
    timings = {beta: Timing(tuple(values)) for beta, values in seconds.items()}
    return [
        {
            "pairs": len(some),
            "beta": beta,
            **found[beta],
            **_times(timings[beta]),
            "unquotable": wrong.get(beta) or neighbours.why or timings[beta].why,
        }
        for beta in BETAS
    ]


def _times(timing: Timing) -> dict[str, float]:
    return {f"{name}_ms": round(1e3 * getattr(timing, name), 3) for name in ("median", "p20", "p80")}


def _shown(records: Sequence[Record]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return " ".join(f"{name} {number}" for name, number in value.items())
        return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)

    columns = [(name, *(cell(record[name]) for record in records)) for name in records[0]]
    if len(records) == 1:  # one figure a line is read more easily than a table of one row
        return table(("", ""), columns)
    return table(list(records[0]), list(zip(*(column[1:] for column in columns), strict=True)))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=DATA, help="preference pairs, as for dpo-engine train")
    made.add_argument("--model", default="smollm2")
    made.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    made.add_argument("--rows", type=int, default=20_000, help="of the case store")
    made.add_argument("--pairs", type=int, default=48, help="of the cases build and sweep")
    made.add_argument("--max_length", type=int, default=512)
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument(
        "--work_folder", type=Path, help="where the caches lie; default: the system's folder for temporary files"
    )
    add_suite_options(made, rounds=3)
    return made


if __name__ == "__main__":
    sys.exit(main())
