"""What do the records of the suite `steps` say? Whole training steps beside TRL's: speed, memory, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import SPREAD
from benchmarks.report.names import is_ours, row_order, row_title
from benchmarks.report.results import Found, sources_of
from benchmarks.report.tables import NOTHING, Row, Table, counted, markdown, mebibytes, number, once, quantiles, spread
from benchmarks.steps.rows import BASE

RUN = ("case", "dtype", "threads", "batch", "max_length", "model")
Key = tuple[Any, ...]


def tables(found: Sequence[Found]) -> list[Table]:
    """A table for each data set and its settings."""
    header = (
        "",
        "pairs/s",
        "× TRL's best",
        "peak MiB",
        "of TRL's best",
        "tokens a pair",
        "reference s",
        "rounds",
        "remark",
    )
    return [
        Table(
            title=run_words(key),
            header=header,
            rows=tuple(_row(of, base_of(of, every)) for of in every),
            notes=once(
                [
                    *_bases(every),
                    *(f"{row_title(of['implementation'])}: {of['note']}" for of in every if of.get("note")),
                ]
            ),
            sources=sources_of(every),
        )
        for key, every in by_run(found).items()
    ]


def by_run(found: Sequence[Found]) -> dict[Key, list[Found]]:
    """Data set and settings -> its rows, in order."""
    runs: dict[Key, list[Found]] = {}
    for of in sorted(found, key=lambda of: row_order(of["implementation"])):
        runs.setdefault(tuple(of.get(name) for name in RUN), []).append(of)
    return dict(sorted(runs.items(), key=lambda item: str(item[0])))


def run_words(key: Key) -> str:
    case, dtype, threads, batch, max_length, model = key
    words = f"{case}: batch {batch}, max_length {max_length}, {dtype}, {counted(threads, 'thread')}"
    return f"{words}, {model}" if model else words


def base_of(of: Found, run: Sequence[Found]) -> Found | None:
    """TRL's best of the same file; None where none of it was measured there."""
    rates = {
        other: rate["median"]
        for other in run
        if other["implementation"] in BASE and other.source.file == of.source.file and (rate := speed(other))
    }
    return max(rates, key=lambda other: rates[other], default=None)


def speed(of: Found) -> dict[str, float] | None:
    """Pairs a second over the rounds; None where the only step is the first, which is not timed."""
    rates = [record.get("pairs_per_s") for record in of.records]
    return quantiles(rates) if of.is_measured and all(rates) else None


def peak(of: Found) -> float | None:
    """MiB: of the card where one was used, else resident."""
    peaks = [record.get("peak_cuda_mb") or record.get("peak_rss_mb") for record in of.records]
    return quantiles(peaks)["median"] if of.is_measured and all(peaks) else None


def tokens_a_pair(of: Found) -> float | None:
    """Tokens computed, prompts again and padding included."""
    steps = of.get("step_tokens")
    return sum(steps) / (len(steps) * of["batch"]) if of.is_measured and steps else None


def times(of: Found, base: Found | None) -> dict[str, float] | None:
    """Its speed as a multiple of `base`'s, round by round; None where that is not to be printed."""
    if base is None or why_no_ratio(of, base):
        return None
    return _by_round(of, base)


def memory_share(of: Found, base: Found | None) -> float | None:
    """Its peak as a multiple of `base`'s."""
    mine, theirs = peak(of), None if base is None else peak(base)
    return mine / theirs if mine is not None and theirs else None


def _bases(run: Sequence[Found]) -> list[str]:
    """What TRL's best is, and whether the pairs are those that were published."""
    best = once([row_title(base["implementation"]) for of in run if (base := base_of(of, run)) is not None])
    lines = [f"TRL's best here: {name}" for name in best]
    if any(of.get("published_data") is False for of in run):
        lines.append("not the file of pairs that published figures are from")
    return lines


def why_no_ratio(of: Found, base: Found | None) -> str | None:
    """Why no ratio of the two is to be printed; None where one may be, or where there is none."""
    if of.unquotable:
        return of.unquotable
    if base is None:
        return None
    if base.unquotable:
        return f"{row_title(base['implementation'])}: {base.unquotable}"
    ratio = _by_round(of, base)
    if ratio is None:
        return "no round in which neither was disturbed"
    if ratio["p80"] - ratio["p20"] > SPREAD * ratio["median"]:
        return f"too noisy to tell: the 20th and the 80th percentile are {ratio['p20']:.3g} and {ratio['p80']:.3g}"
    return None


def _by_round(of: Found, base: Found) -> dict[str, float] | None:
    """Over the rounds in which nobody disturbed either of the two."""
    theirs = _quiet(base)
    ratios = [mine / theirs[turn] for turn, mine in _quiet(of).items() if turn in theirs]
    return quantiles(ratios) if ratios else None


def _quiet(of: Found) -> dict[int, float]:
    """Round -> pairs a second."""
    return {
        record.get("round", number_): record["pairs_per_s"]
        for number_, record in enumerate(of.records)
        if not record.get("unquotable") and record.get("pairs_per_s")
    }


def _row(of: Found, base: Found | None) -> Row:
    name = of["implementation"]
    if not of.is_measured:
        return Row(cells=(row_title(name),), why=of.status, ours=is_ours(name))
    why = why_no_ratio(of, base)
    remark = f"no ratio: {why}" if why else "" if base else "no ratio: TRL's best was not measured in that run"
    reference = [record["reference_s"] for record in of.records if record.get("reference_s") is not None]
    cells = (
        row_title(name),
        spread(speed(of), ".3g"),
        spread(times(of, base), ".2f"),
        mebibytes(peak(of)),
        NOTHING if why else number(memory_share(of, base), ".2f"),
        number(tokens_a_pair(of), ".0f"),
        number(quantiles(reference)["median"] if reference else None, ".1f"),
        str(len(of.records)),
        remark,
    )
    return Row(cells=cells, ours=is_ours(name))


# ---- for a page written by hand ----


def block(found: Sequence[Found]) -> tuple[str, Sequence[Found]]:
    """Markdown: data sets and rows below each other; and the records that it is from."""
    header = ["data set", "", "pairs/s", "× TRL's best", "peak memory", "tokens computed a pair"]
    rows, notes, settings = [], [], []
    for key, run in by_run(found).items():
        best = "; ".join(_bases(run))
        rounds = max(len(of.records) for of in run)
        settings.append(f"{run_words(key)}; rounds: {rounds}" + (f"; {best}." if best else "."))
        for number_, of in enumerate(run):
            name, base = of["implementation"], base_of(of, run)
            first = key[0] if number_ == 0 else ""
            if not of.is_measured:
                rows.append([first, row_title(name), of.status.partition(":")[0], NOTHING, NOTHING, NOTHING])
                notes.append(f"{key[0]}, {row_title(name)}: {of.status}.")
                continue
            why = why_no_ratio(of, base)
            if why:
                notes.append(f"{key[0]}, {row_title(name)}: no ratio, {why}.")
            ratio, rate, most = times(of, base), speed(of), peak(of)
            rows.append(
                [
                    first,
                    row_title(name),
                    number(rate and rate["median"], ".2f"),
                    "not quoted" if why else number(ratio and ratio["median"], ".2f"),
                    "not measured" if most is None else f"{most / 1024:.1f} GiB",
                    number(tokens_a_pair(of), ".0f"),
                ]
            )
    return "\n".join([markdown(header, rows), "", *settings, *notes]), found


# ---- for a comparison of two runs ----


def ratios(found: Sequence[Found]) -> dict[tuple[str, ...], tuple[float, str]]:
    """`(data set and settings, row, what)` -> a figure that two runs may be compared by, and its kind."""
    figures = {}
    for key, run in by_run(found).items():
        for of in run:
            base = base_of(of, run)
            if of is base:
                continue
            name = (run_words(key), row_title(of["implementation"]))
            ratio = times(of, base)
            if ratio:
                figures[(*name, "speed × TRL's best")] = (ratio["median"], "ratio")
            share = memory_share(of, base)
            if share and not why_no_ratio(of, base):
                figures[(*name, "peak × TRL's best")] = (share, "ratio")
    return figures
