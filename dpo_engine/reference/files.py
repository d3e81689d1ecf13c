"""How do log-probs lie in a file? One SQLite file per writer, in which an entry is either committed or absent.

    entries(address, part, parts, logps, checksum)

`logps` are little-endian float32, in parts of at most 512 tokens, because a page of 16 KiB that holds one entry of 9 KiB has
no room for a second. The checksum is over space, address and values: of 60 flipped bits SQLite itself noticed 7, and gave
back the others as values. Commits are synchronised to the disk.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from dpo_engine.errors import CacheError

SUFFIX = ".sqlite"
DAMAGED = ".damaged"
SCHEMA = 1
PART_TOKENS = 512
_PART_BYTES = 4 * PART_TOKENS
_WAIT_S = 60.0  # for another process's commit
_ASKED_AT_ONCE = 500  # SQLite allows 999 parameters
_TABLES = """
    CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
    CREATE TABLE entries (address BLOB, part INTEGER, parts INTEGER, logps BLOB, checksum BLOB);
    CREATE INDEX by_address ON entries (address);
"""


class Damaged(Exception):
    """A file that is not as it was written; the message says what was found."""


def entry_files(folder: Path) -> list[Path]:
    """The files of all writers of a space, oldest name first; none where there is no such folder."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())


class EntryFile:
    """One writer's file.

    Args:
        path: an existing file.
        space: the address of the space it belongs to, which its checksums cover.

    Raises:
        FileNotFoundError: it is gone: set aside or merged by another process.
        Damaged: it is no such file.
        CacheError: it cannot be opened.
    """

    def __init__(self, path: Path, space: str) -> None:
        self.path = path
        self._space = bytes.fromhex(space)
        self.process = os.getpid()
        try:
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=rw",
                uri=True,
                timeout=_WAIT_S,
                isolation_level=None,
                check_same_thread=False,  # a trainer may be handed to another thread; SQLite itself takes turns
            )
            self.inode = path.stat().st_ino
        except (sqlite3.Error, OSError) as error:
            if not path.exists():
                raise FileNotFoundError(path) from error
            raise CacheError(f"{path} cannot be opened ({error}); mend its permissions, or remove it") from error
        try:
            self._run("PRAGMA synchronous=FULL")
            self._run("PRAGMA cell_size_check=ON")
            about = dict(self._run("SELECT name, value FROM about"))
            if about.get("schema") != str(SCHEMA) or about.get("space") != space:
                raise Damaged(f"it says schema {about.get('schema')} of space {about.get('space')}")
        except (Damaged, CacheError):
            self.close()
            raise
        self.made: dict[str, str] = _object(about.get("made"))

    @classmethod
    def create(cls, folder: Path, space: str, made: dict[str, str]) -> EntryFile:
        """A new file of this process. It gets its name when it is whole, so that an empty one is a damaged one."""
        name = f"{socket.gethostname().split('.')[0]}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        path, partial = folder / name, folder / f".{name}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
                connection.execute("PRAGMA page_size=16384")
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("BEGIN")
                for statement in filter(str.strip, _TABLES.split(";")):
                    connection.execute(statement)
                connection.executemany(
                    "INSERT INTO about VALUES (?, ?)",
                    [("schema", str(SCHEMA)), ("space", space), ("made", json.dumps(made))],
                )
                connection.execute("COMMIT")
            os.rename(partial, path)
            _sync_folder(folder)
        except (sqlite3.Error, OSError) as error:
            with suppress(OSError):
                partial.unlink()
            raise CacheError(_cannot_write(folder, error)) from error
        return cls(path, space)

    def put(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Commit `(address, values)` together: all of them, or none.

        Raises:
            CacheError: the disk is full, or the file cannot be written; what was committed before is intact.
        """
        rows = [row for address, values in entries for row in self._rows(address, values)]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", rows)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                with suppress(sqlite3.Error):  # the journal brings the file back when it is opened next
                    self._connection.execute("ROLLBACK")
            raise CacheError(_cannot_write(self.path, error)) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes to the file meanwhile."""
        self._run("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            self._run("ROLLBACK")

    def is_in_place(self) -> bool:
        """Whether the file still has its name: others may merge it away, or set it aside."""
        try:
            return self.path.stat().st_ino == self.inode
        except FileNotFoundError:
            return False

    def get(self, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those addresses that are here.

        Raises:
            Damaged: an entry is not as it was written, or the file is not.
        """
        found: dict[bytes, bytes] = {}
        for first in range(0, len(addresses), _ASKED_AT_ONCE):
            asked = addresses[first : first + _ASKED_AT_ONCE]
            marks = ",".join("?" * len(asked))
            rows = self._run(
                f"SELECT address, part, parts, logps, checksum FROM entries WHERE address IN ({marks})", asked
            )
            found |= self._whole(rows)
        return found

    def entries(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Every entry of the file with its values, None for one that is not as it was written; for an entry twice, twice.

        Raises:
            Damaged: the rest of the file cannot be read.
        """
        last = -1
        pending: dict[bytes, list[tuple]] = {}
        while True:
            rows = self._run(
                "SELECT rowid, address, part, parts, logps, checksum FROM entries WHERE rowid > ? ORDER BY rowid LIMIT 1000",
                [last],
            )
            if not rows:
                break
            if rows[-1][0] <= last:
                raise Damaged("its rows are out of order")
            last = rows[-1][0]
            for _, *row in rows:
                if not self._is_sound(row):
                    yield bytes(row[0]) if isinstance(row[0], bytes) else b"", None
                    continue
                parts = pending.setdefault(row[0], [])
                parts.append(tuple(row))
                if len(parts) == row[2]:
                    yield row[0], _joined(pending.pop(row[0]))
        for address in pending:
            yield address, None

    def bytes_used(self) -> int:
        """Of the file on the disk."""
        return self.path.stat().st_size

    def close(self) -> None:
        self._connection.close()

    def _rows(self, address: bytes, values: bytes) -> Iterator[tuple[bytes, int, int, bytes, bytes]]:
        parts = max(1, -(-len(values) // _PART_BYTES))
        for part in range(parts):
            piece = values[part * _PART_BYTES : (part + 1) * _PART_BYTES]
            yield address, part, parts, piece, self._checksum(address, part, parts, piece)

    def _checksum(self, address: bytes, part: int, parts: int, piece: bytes) -> bytes:
        return blake2b(b"".join((self._space, address, struct.pack("<II", part, parts), piece)), digest_size=8).digest()

    def _is_sound(self, row: Sequence) -> bool:
        address, part, parts, piece, checksum = row
        kinds = (bytes, int, int, bytes, bytes)
        return (
            all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True))
            and 0 <= part < parts < 2**32
            and self._checksum(address, part, parts, piece) == checksum
        )

    def _whole(self, rows: Sequence[tuple]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        pieces: dict[bytes, list[tuple]] = {}
        for row in rows:
            if not self._is_sound(row):
                raise Damaged("an entry does not fit its checksum")
            if row[2] == 1:
                found[row[0]] = row[3]
            else:
                pieces.setdefault(row[0], []).append(row)
        for address, parts in pieces.items():
            whole = _joined(parts)
            if whole is None:
                raise Damaged("a part of an entry is missing")
            found[address] = whole
        return found

    def _run(self, statement: str, values: Sequence = ()) -> list[tuple]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            if _is_outside(error):
                raise CacheError(f"{self.path} cannot be read ({error}); try again, or remove it") from error
            raise Damaged(str(error)) from error
        except sqlite3.ProgrammingError as error:  # a connection that was closed: says nothing of the file
            raise CacheError(f"{self.path} cannot be read ({error}); try again") from error
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            raise Damaged(str(error)) from error


def _joined(parts: Sequence[tuple]) -> bytes | None:
    """The values of an entry's parts; None where one is missing. A part that is there twice is taken once."""
    by_number = {row[1]: row[3] for row in parts}
    if len(by_number) != parts[0][2]:
        return None
    return b"".join(by_number[number] for number in sorted(by_number))


def _object(text: str | None) -> dict[str, str]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise Damaged("its description is not JSON") from error
    return value if isinstance(value, dict) else {}


def _is_outside(error: sqlite3.OperationalError) -> bool:
    """Whether an error is the machine's and not the file's."""
    said = str(error)
    return any(
        text in said for text in ("locked", "disk I/O error", "unable to open", "readonly", "full", "out of memory")
    )


def _cannot_write(path: Path, error: Exception) -> str:
    return (
        f"reference log-probs cannot be written to {path} ({error}); make room or permission there, give another folder with "
        "--reference_cache or DPO_ENGINE_CACHE, or set reference_cache: off"
    )


def _sync_folder(folder: Path) -> None:
    """Names are on the disk too."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
