"""Where do the log-probs of one space lie, and how do many processes share them? A folder, read as the union of its files.

Every process writes a file of its own and reads those of all. A file in which anything is not as it was written is set aside:
what is sound in it is copied to this process's own file, the file is renamed `*.damaged`, and what was lost is computed again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_engine.errors import CacheError
from dpo_engine.reference.files import DAMAGED, SUFFIX, Damaged, EntryFile, entry_files

if TYPE_CHECKING:
    from dpo_engine.reference.space import ReferenceSpace

logger = logging.getLogger(__name__)

ABOUT = "space.json"
_COPIED_AT_ONCE = 1000
_STALE_S = 3600.0  # a new file that has no name by then never gets one


class ReferenceStore:
    """The log-probs of one space.

    Args:
        folder: of this space; it is made when something is written.
        space: the space's address.
        made: what is noted in files that are written: by which device, versions, ...
    """

    def __init__(self, folder: Path, space: str, made: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.space = space
        self.made = made or {}
        self.bad = 0
        """Entries found damaged since this store was opened; at least one for a file that could not be read."""
        self._readers: dict[Path, EntryFile] = {}
        self._writer: EntryFile | None = None
        self._left_out: set[Path] = set()
        self._about: ReferenceSpace | None = None

    def describe(self, space: ReferenceSpace) -> None:
        """Write down, for people, what this space is; once.

        Raises:
            CacheError: the folder cannot be written.
        """
        self._about = space
        path = self.folder / ABOUT
        if path.exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{ABOUT}.{os.getpid()}.partial")
            partial.write_text(json.dumps({"address": space.address, **space.parts}, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise CacheError(
                f"the reference cache {self.folder} cannot be written ({error.strerror}); give another folder with "
                "--reference_cache or DPO_ENGINE_CACHE, or set reference_cache: off"
            ) from error

    def get(self, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        """Values, little-endian float32, of those addresses that any file has.

        Raises:
            CacheError: a file cannot be read although nothing says that it is damaged (locked, no permission).
        """
        found: dict[bytes, bytes] = {}
        wanted = list(dict.fromkeys(addresses))
        for path in self._files():
            wanted = [address for address in wanted if address not in found] if found else wanted
            if not wanted:
                break
            try:
                found |= self._reader(path).get(wanted)
            except FileNotFoundError:
                continue  # set aside or merged by another process
            except (Damaged, CacheError) as error:
                if not path.exists():  # so it was, while this read it
                    continue
                if isinstance(error, CacheError):
                    raise
                found |= self._set_aside(path, error, wanted)
        return found

    def put(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Commit `(address, values)`, all of them or none, in this process's file.

        Raises:
            CacheError: nothing could be written.
        """
        entries = list(entries)
        while entries:
            file = self._own_file()
            try:
                file.put(entries)
            except CacheError:
                if file.is_in_place():
                    raise
                continue
            if file.is_in_place():  # else it was merged away, set aside or pruned meanwhile, and another file will do
                return

    def touch(self) -> None:
        """Note that this space was used, for `prune`."""
        with suppress(OSError):  # a cache that may only be read is not pruned from here
            os.utime(self.folder / ABOUT)

    def close(self) -> None:
        """Let go of all files."""
        for file in [*self._readers.values(), *([self._writer] if self._writer else [])]:
            file.close()
        self._readers.clear()
        self._writer = None

    def makers(self) -> list[dict[str, str]]:
        """What the files' writers noted of themselves, each different note once."""
        notes: list[dict[str, str]] = []
        for path in self._files():
            try:
                made = self._reader(path).made
            except (Damaged, FileNotFoundError):
                continue
            if made not in notes:
                notes.append(made)
        return notes

    def check(self) -> tuple[int, int]:
        """`(entries, bad)`: distinct sound entries over all files, and entries or files that are damaged; these are set aside.

        Reads everything.
        """
        before = self.bad
        sound: set[bytes] = set()
        for path in self._files():
            try:
                file = self._reader(path)
                addresses = []
                for address, values in file.entries():
                    if values is None:
                        raise Damaged("an entry does not fit its checksum")
                    addresses.append(address)
                if set(file.get(addresses)) != set(addresses):
                    raise Damaged("its index does not find all of its entries")
                sound.update(addresses)
            except FileNotFoundError:
                continue
            except Damaged as error:
                self._set_aside(path, error, ())
        for path in self._files():  # what was saved of damaged files
            if path not in self._left_out:
                sound.update(address for address, values in self._reader(path).entries() if values is not None)
        return len(sound), self.bad - before

    def merge(self) -> tuple[int, int]:
        """Copy all entries into one file, each once, and remove the others. Processes that write meanwhile lose nothing.

        Returns:
            `(files before, entries)`.
        """
        from filelock import FileLock

        if not self._files():
            return 0, 0
        with FileLock(self.folder / ".merge.lock"):  # of two, the second would take away what the first writes to
            return self._merge()

    def _merge(self) -> tuple[int, int]:
        paths = self._files()
        merged = EntryFile.create(self.folder, self.space, self.made)
        known: set[bytes] = set()
        for path in paths:
            try:
                file = self._reader(path)
                with file.locked():
                    self._copy(file, merged, known)
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
            except Damaged as error:
                self._set_aside(path, error, ())
        for path in self._files():  # what was saved of damaged files
            if path not in paths and path != merged.path and self._writer is not None and path == self._writer.path:
                self._copy(self._writer, merged, known)
                path.unlink(missing_ok=True)
        merged.close()
        self.close()
        return len(paths), len(known)

    def copy_from(self, other: ReferenceStore) -> int:
        """Take over the entries of another folder's store of the same space that this one lacks; returns how many."""
        taken = 0
        for path in other._files():
            try:
                batch: dict[bytes, bytes] = {}
                for address, values in other._reader(path).entries():
                    if values is None:
                        raise Damaged("an entry does not fit its checksum")
                    batch[address] = values
                    if len(batch) >= _COPIED_AT_ONCE:
                        taken += self._take(batch)
                        batch = {}
                taken += self._take(batch)
            except Damaged as error:
                logger.warning("reference cache: %s is damaged (%s); only part of it was taken", path, error)
                self.bad += 1
        return taken

    def _take(self, entries: dict[bytes, bytes]) -> int:
        known = self.get(list(entries))
        new = [(address, values) for address, values in entries.items() if address not in known]
        self.put(new)
        return len(new)

    @staticmethod
    def _copy(source: EntryFile, target: EntryFile, known: set[bytes]) -> None:
        """Those entries of `source` that are not `known`."""
        batch: list[tuple[bytes, bytes]] = []
        for address, values in source.entries():
            if values is None:
                raise Damaged("an entry does not fit its checksum")
            if address in known:
                continue
            known.add(address)
            batch.append((address, values))
            if len(batch) >= _COPIED_AT_ONCE:
                target.put(batch)
                batch = []
        target.put(batch)

    # ---- files ----

    def _files(self) -> list[Path]:
        return [path for path in entry_files(self.folder) if path not in self._left_out]

    def _reader(self, path: Path) -> EntryFile:
        file = self._readers.get(path)
        if file is not None and file.process != os.getpid():
            file = None  # a connection is not carried over a fork
        if file is None:
            if not path.exists():
                raise FileNotFoundError(path)
            file = self._readers[path] = EntryFile(path, self.space)
        return file

    def _own_file(self) -> EntryFile:
        """This process's file; another one where the first was set aside by somebody."""
        writer = self._writer
        if writer is not None and writer.process == os.getpid():
            if writer.is_in_place():
                return writer
            writer.close()
        self._writer = EntryFile.create(self.folder, self.space, self.made)
        if self._about is not None:  # the folder may have been pruned
            self.describe(self._about)
        return self._writer

    def _set_aside(self, path: Path, why: Damaged, wanted: Sequence[bytes]) -> dict[bytes, bytes]:
        """Take a damaged file out of the union, then keep what is sound in it; those of `wanted` among that.

        In this order, so that its owner, if there is one, commits nothing to it that would not be kept.
        """
        if self._writer is not None and self._writer.path == path:
            self._writer.close()
            self._writer = None
        aside = path.with_name(path.name + DAMAGED)
        where = f"set aside as {aside.name}"
        try:
            file = self._reader(path)
        except FileNotFoundError:
            return {}  # another process was first
        except Damaged:
            file = None  # nothing of it can be read
        try:
            os.replace(path, aside)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._left_out.add(path)
            where = f"left out ({error.strerror})"
        kept, lost, found = self._salvage(file, set(wanted))
        if file is not None:
            file.close()
        self._readers.pop(path, None)
        path.with_name(path.name + "-journal").unlink(missing_ok=True)
        self.bad += max(lost, 1)
        logger.warning(
            "reference cache: %s is damaged (%s) and was %s; %d entries of it are sound and kept, the others will be computed "
            "again", path, why, where, kept,
        )  # fmt: skip
        return found

    def _salvage(self, file: EntryFile | None, wanted: set[bytes]) -> tuple[int, int, dict[bytes, bytes]]:
        """`(kept, lost, found)`: entries copied to this process's file, entries that are not sound, those of `wanted`."""
        kept, lost = 0, 0
        found: dict[bytes, bytes] = {}
        batch: list[tuple[bytes, bytes]] = []
        try:
            for address, values in file.entries() if file is not None else ():
                if values is None:
                    lost += 1
                    continue
                kept += 1
                batch.append((address, values))
                if address in wanted:
                    found[address] = values
                if len(batch) >= _COPIED_AT_ONCE:
                    self.put(batch)
                    batch = []
        except Damaged:
            lost += 1
        self.put(batch)
        return kept, lost, found


def space_note(folder: Path) -> dict[str, Any]:
    """What `ReferenceStore.describe` wrote in a space's folder; empty where there is nothing to read."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def damaged_files(folder: Path) -> list[Path]:
    """Files that were set aside, and what an interrupted start left of new ones."""
    begun = [path for path in folder.glob(f".*{SUFFIX}.partial*") if _age_s(path) > _STALE_S]
    return sorted([*folder.glob(f"*{SUFFIX}{DAMAGED}"), *begun])


def _age_s(path: Path) -> float:
    """Seconds since a file was written; 0 for one that is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
