"""What do the files of `make gpu` say? Checks, the operator, training and memory on a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.memory_table import table as memory_table
from benchmarks.report import ops
from benchmarks.report.names import is_ours, title
from benchmarks.report.results import GPU_PREFIX, Found, Record, Source, age, grouped, missing_fields, read_file
from benchmarks.report.tables import Row, Table, mebibytes, number

PARTS = ("correctness", "ops", "train", "memory")
COMMAND = "make gpu"
CONTEXT_MB = 600.0  # beside the allocator, as the plan and `benchmarks/gpu/memory.py` take it
Part = tuple[Source, Sequence[Record]]


def newest_parts(folder: Path, only: Sequence[Path] | None = None) -> dict[tuple[str, str], Part]:
    """`(card, part)` -> its newest file's records.

    Args:
        folder: holds a folder for each machine.
        only: files that may be read; all of them if not given.
    """
    allowed = None if only is None else {path.resolve() for path in only}
    files = [path for path in folder.glob(f"*/*-{GPU_PREFIX}*.jsonl") if allowed is None or path.resolve() in allowed]
    newest: dict[tuple[str, str], Part] = {}
    for _, _, source, records in sorted(map(read_file, files), key=age):
        part = source.benchmark.removeprefix(GPU_PREFIX)
        if part in PARTS:
            newest[(source.machine_words, part)] = (source, records)
    return newest


def tables(parts: Mapping[tuple[str, str], Part]) -> list[Table]:
    """A table for each card and part, and for each shape and case of the operator."""
    makers = {"correctness": _checks, "train": _train, "memory": _memory}
    made = []
    for (card, part), (source, records) in sorted(
        parts.items(), key=lambda item: (item[0][0], PARTS.index(item[0][1]))
    ):
        steps = [record for record in records if "step" in record]
        rows = [record for record in records if "step" not in record]
        if part == "ops":
            made += ops.tables(_of_operator(source, rows))
        elif part == "correctness":
            made += makers[part](card, source, steps)
        else:
            made += makers[part](card, source, rows)
        if part != "correctness":
            made += _not_run(card, part, source, steps)
    return made


def measured_lengths(parts: Mapping[tuple[str, str], Part]) -> list[tuple[str, Record]]:
    """`(card, record)` of each length that was trained on with the engine."""
    return [
        (card, record)
        for (card, part), (_, records) in parts.items()
        if part == "memory"
        for record in records
        if _who(record) == "engine" and record.get("status") == "measured"
        if not record.get("cap_gb") and not record.get("tiny")
    ]


def _who(record: Record) -> str:
    return record.get("implementation") or ""


def operator(parts: Mapping[tuple[str, str], Part]) -> list[Found]:
    """What was found of the operator, on every card."""
    return [
        of
        for (_, part), (source, records) in parts.items()
        if part == "ops"
        for of in _of_operator(source, [record for record in records if "step" not in record])
    ]


def _of_operator(source: Source, rows: Sequence[Record]) -> list[Found]:
    return [] if missing_fields(rows) else list(grouped(rows, source).values())


def _checks(card: str, source: Source, steps: Sequence[Record]) -> list[Table]:
    rows = []
    for step in steps:
        tests = step.get("tests") or {}
        counts = [number(tests.get(kind), "d") for kind in ("passed", "failed", "skipped")]
        rows.append(Row(cells=(step["step"], step["status"], *counts, ", ".join(step.get("failures") or []))))
    header = ("", "status", "passed", "failed", "skipped", "which failed")
    return [Table(title=f"{card}: checks", header=header, rows=tuple(rows), sources=(source,))]


def _train(card: str, source: Source, records: Sequence[Record]) -> list[Table]:
    header = ("", "pairs/s", "tokens/s", "of the measured peak rate", "peak GiB", "reference s")
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if not record.get("tiny"):
            groups.setdefault((record["weights"], record["lengths"], record.get("max_length")), []).append(record)
    return [
        Table(
            title=f"{card}: training, {weights}, pairs as long as those of {lengths}, max_length {max_length}",
            header=header,
            rows=tuple(_train_row(record) for record in of),
            sources=(source,),
        )
        for (weights, lengths, max_length), of in groups.items()
    ]


def _train_row(record: Record) -> Row:
    name = _who(record) or "all rows"
    ours = is_ours(name)
    if record["status"] != "measured":
        return Row(cells=(title(name),), why=record["status"], ours=ours)
    cells = (
        title(name),
        number(record.get("pairs_per_s"), ".2f"),
        number(record.get("computed_tokens_per_s"), ",.0f"),
        number(record.get("utilisation_of_measured"), ".1%"),
        number(record["peak_mb"] / 1024, ".1f"),
        number(record.get("reference_s"), ".1f"),
    )
    return Row(cells=cells, ours=ours)


def _memory(card: str, source: Source, records: Sequence[Record]) -> list[Table]:
    header = ("", "tokens a row", "peak MiB", "planned MiB", "pairs/s", "tokens/s", "within GB")
    rows = []
    for record in records:
        if record.get("tiny") or "length" not in record:
            continue
        name = f"{title(_who(record))} at {record['length']}"
        if record["status"] != "measured":
            rows.append(Row(cells=(name,), why=record["status"], ours=is_ours(_who(record))))
            continue
        cells = (
            title(_who(record)),
            str(record["length"]),
            mebibytes(record["peak_mb"]),
            mebibytes(record.get("planned_mb")),
            number(record.get("pairs_per_s"), ".2f"),
            number(record.get("tokens_per_s"), ",.0f"),
            number(record.get("cap_gb"), "g"),
        )
        rows.append(Row(cells=cells, ours=is_ours(_who(record))))
    words = f"{card}: QLoRA of a Llama-3.1-8B-shaped model by length"
    return [Table(title=words, header=header, rows=tuple(rows), sources=(source,))] if rows else []


def _not_run(card: str, part: str, source: Source, steps: Sequence[Record]) -> list[Table]:
    """Steps of a part that did not end well: they say why figures are missing."""
    bad = [step for step in steps if step["status"] != "passed"]
    rows = tuple(Row(cells=(step["step"], step["status"], " ".join(step.get("tail", [])[-1:]))) for step in bad)
    words = f"{card}: steps of the part {part} that did not pass"
    return [Table(title=words, header=("", "status", "last line"), rows=rows, sources=(source,))] if rows else []


# ---- for a page written by hand ----


def block(parts: Mapping[tuple[str, str], Part]) -> tuple[str, Sequence[Source]]:
    """Markdown: memory by card and length, or the command that will measure it; and the files that it is from."""
    of_memory = [part for (_, name), part in parts.items() if name == "memory"]
    if not of_memory:
        return f"On a GPU: not measured. Run: `{COMMAND}`", ()
    records = [{**record, "machine": source.machine} for source, records in of_memory for record in records]
    return memory_table(records), [source for source, _ in of_memory]
