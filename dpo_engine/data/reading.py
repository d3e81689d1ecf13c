"""Which rows does a source hold, and where does each one stand?

A source is a local .jsonl, .json, .csv (each also .gz) or .parquet file, or the id of a dataset on the hub. A row that
cannot be parsed is handed on with its fault, for the caller to stop at or to skip; a file that cannot be read to its
end raises.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dpo_engine.data.records import SourceRow
from dpo_engine.data.strict_json import StrictDecoder, value_fault
from dpo_engine.errors import DataError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
SUFFIXES = (*TEXT_SUFFIXES, *(suffix + ".gz" for suffix in TEXT_SUFFIXES), ".parquet")
_FIELD_LIMIT = 2**31 - 1
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_rows(source: str | Path, *, split: str = "train") -> Iterator[SourceRow]:
    """Reads a source row by row.

    Args:
        source: A path that ends in one of `SUFFIXES`, or a hub dataset id such as "org/name".
        split: Which split of a hub dataset; a local file holds one split and does not look at it.

    Returns:
        An iterator over rows, in order. Rows that cannot be parsed have `columns` None and say why in `fault`.

    Raises:
        DataError: The source is missing, is a folder, has an unknown ending, or breaks off; while iterating, too.
    """
    path = local_path(source)
    if path is None:
        return _hub_rows(str(source), split)
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _parquet_rows(path)
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    return readers[suffix.removesuffix(".gz")](path)


def rows_in_memory(rows: Iterable[Any], name: str | None = None) -> Iterator[SourceRow]:
    """The rows of a list of dicts or a `datasets.Dataset`, with origins "row 1", or "name:row 1" if there is a name."""
    if isinstance(rows, Mapping):
        keys = ", ".join(map(str, rows))
        raise DataError(f"expected rows, found a mapping with the keys {keys}: give one split, such as data['train']")
    for number, row in enumerate(rows, start=1):
        origin = f"{name}:row {number}" if name else f"row {number}"
        if not isinstance(row, Mapping):
            yield SourceRow(origin=origin, columns=None, fault=f"expected an object, found {type(row).__name__}")
            continue
        columns = dict(row)
        fault = value_fault(columns)
        yield SourceRow(origin=origin, columns=None if fault else columns, fault=fault)


def local_path(source: str | Path) -> Path | None:
    """The path of a local data file, or None when the source can only be a hub id.

    Raises:
        DataError: It is a path, and no data file is there.
    """
    path = Path(source).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot look for the data file {str(source)!r}: {error}") from error
    if is_folder:
        raise DataError(f"{source} is a folder, expected a data file; it holds {_near_files(path, '')}")
    if is_file:
        if _suffix(path):
            return path
        raise DataError(f"{source}: unknown ending {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    if _looks_like_path(source, path):
        if not path.parent.is_dir():
            raise DataError(f"data file {source} not found: the folder {path.parent} does not exist")
        raise DataError(f"data file {source} not found; {path.parent} holds {_near_files(path.parent, path.name)}")
    return None


def _looks_like_path(source: str | Path, path: Path) -> bool:
    if isinstance(source, Path) or _suffix(path) or not _HUB_ID.fullmatch(source):
        return True
    return "/" in source and path.parent.is_dir()


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def _near_files(folder: Path, name: str) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and _suffix(entry))
    except OSError as error:
        return f"files that cannot be listed ({error.strerror})"
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6) or names[:5]
    return ", ".join(near) if near else "no data file"


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unzipped; what can go wrong while reading them is a `DataError`."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _object_row(origin: str, value: Any, fault: str | None) -> SourceRow:
    if fault is None and not isinstance(value, dict):
        fault = f"expected an object with columns, found {_kind(value)}"
    return SourceRow(origin=origin, columns=None if fault else value, fault=fault)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _jsonl_rows(path: Path) -> Iterator[SourceRow]:
    decoder = StrictDecoder()
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _json_line(decoder, line, f"{path.name}:{number}")


def _json_line(decoder: StrictDecoder, line: bytes, origin: str) -> SourceRow:
    if b"\0" in line:
        return SourceRow(origin=origin, columns=None, fault="holds a NUL byte")
    try:
        return _object_row(origin, *decoder.decode(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
    except json.JSONDecodeError as error:
        fault = f"broken JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        fault = "broken JSON: nested too deep"
    return SourceRow(origin=origin, columns=None, fault=fault)


def _json_rows(path: Path) -> Iterator[SourceRow]:
    with _opened(path) as file:
        data = file.read().removeprefix(_BOM)
    if not data.lstrip().startswith(b"["):
        yield from _json_objects(path, data)
        return
    if b"\0" in data:
        raise DataError(f"{path.name}:{data[: data.index(0)].count(10) + 1}: holds a NUL byte")
    text = data.decode("utf-8", "surrogateescape")  # a byte that is not UTF-8 becomes the fault of its own row
    try:
        yield from _list_items(path, text)
    except json.JSONDecodeError as error:
        # after a syntax error nobody knows where the next row begins, so such rows cannot be skipped
        raise DataError(
            f"{path.name}:{error.lineno}: broken JSON: {error.msg} at column {error.colno} "
            "(the rows after it cannot be told apart; mend it, or keep one row a line in a .jsonl file)"
        ) from error


def _json_objects(path: Path, data: bytes) -> Iterator[SourceRow]:
    """A .json file that is not a list: one object a line is common, one object spread over lines is not a data set."""
    decoder = StrictDecoder()
    lines = data.splitlines()
    first = next((line for line in lines if line.strip()), b"")
    if first and _json_line(decoder, first, "").columns is None:
        raise DataError(f"{path.name}: expected a list of objects, or one object a line; its first line is neither")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_line(decoder, line, f"{path.name}:{number}")


def _list_items(path: Path, text: str) -> Iterator[SourceRow]:
    """The items of the JSON list `text`, one at a time."""
    decoder = StrictDecoder()
    at, number = _past_space(text, text.index("[") + 1), 0
    more = text[at : at + 1] != "]"
    while more:
        number += 1
        origin = f"{path.name}:row {number}"
        try:
            value, fault, at = decoder.decode_at(text, _past_space(text, at))
        except RecursionError as error:
            raise DataError(f"{origin}: broken JSON: nested too deep") from error
        yield _object_row(origin, value, fault)
        at = _past_space(text, at)
        more = text[at : at + 1] == ","
        if not more and text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, at)
        at += more
    end = _past_space(text, at + 1)
    if end != len(text):
        raise json.JSONDecodeError("Extra data after the list", text, end)


def _past_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _csv_rows(path: Path) -> Iterator[SourceRow]:
    previous = csv.field_size_limit(_FIELD_LIMIT)  # the default refuses a field of 128 KiB
    try:
        with _opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
            yield from _table_rows(path, csv.reader(text, strict=True))
    finally:
        csv.field_size_limit(previous)


def _table_rows(path: Path, reader: Any) -> Iterator[SourceRow]:
    try:
        header: list[str] = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path.name}:1: a column name occurs twice: {', '.join(header)}")
        number = 0
        for fields in reader:
            if not fields:
                continue
            number += 1
            columns = dict(zip(header, fields, strict=False))
            fault = value_fault(columns)
            if len(fields) != len(header):
                fault = f"has {len(fields)} fields, the header has {len(header)}"
            yield SourceRow(origin=f"{path.name}:row {number}", columns=None if fault else columns, fault=fault)
    except csv.Error as error:
        # an unmatched quote swallows the rows after it: skipping one row would lose others in silence
        line = f"{path.name}:{reader.line_num}"
        raise DataError(f"{line}: broken CSV: {error} (check the quotes in and above this line)") from error


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow: pip install 'dpo-engine[train]'") from error
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path.name}: a column name occurs twice: {', '.join(names)}")
            for batch in file.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(batch, index, f"{path.name}:row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from error


def _parquet_row(batch: Any, index: int, origin: str) -> SourceRow:
    try:
        columns = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return SourceRow(origin=origin, columns=None, fault=f"not UTF-8 ({error.reason})")
    fault = value_fault(columns)
    return SourceRow(origin=origin, columns=None if fault else columns, fault=fault)


def _hub_rows(name: str, split: str) -> Iterator[SourceRow]:
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise DataError(f"reading the hub dataset {name!r} needs datasets: pip install 'dpo-engine[train]'") from error
    try:
        try:
            dataset = datasets.load_dataset(name, split=split)
        except ConnectionError:
            # datasets looks only for what it has prepared itself; the files may be in the hub cache all the same
            folder = huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
            dataset = datasets.load_dataset(folder, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # load_dataset reports a missing dataset or split, no network and a refused loading script in these ways
        raise DataError(
            f"data {name!r} is no local file, and the hub dataset of that id with split {split!r} cannot be loaded: "
            f"{_first_line(error)} (check the id and the split; without a network it must be in the local hub cache)"
        ) from error
    yield from rows_in_memory(dataset, name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
