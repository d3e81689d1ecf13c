"""What is on the disk? A folder of spaces, each a folder of files.

FOLDER/<space address>/space.json               what the address is the hash of
FOLDER/<space address>/<writer>.sqlite          log-probs (`files.py`)
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.batch import ForestCollator, pack_trees
from dpo_engine.batch.forest import TreeLike, as_tree
from dpo_engine.errors import CacheError
from dpo_engine.model.adapters import REFERENCE, has_reference_adapter, is_peft_model, reference_of
from dpo_engine.model.layout import Layout
from dpo_engine.model.scoring import forest_token_logps
from dpo_engine.ops.choice import cache_folder
from dpo_engine.reference.filling import Score, fill
from dpo_engine.reference.guard import GUARDED_ROWS, check_rows, refuse, some_rows
from dpo_engine.reference.space import ReferenceSpace, reference_space
from dpo_engine.reference.store import ABOUT, ReferenceStore, damaged_files, space_note
from dpo_engine.reference.values import ReferenceValues, scored_tokens

_DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class SpaceOnDisk:
    """One space of a folder, counted."""

    address: str
    folder: Path
    about: dict[str, Any]
    """The parts that the address is the hash of; empty where the note is missing."""
    files: int
    entries: int
    """Completions; one that several writers computed counts once."""
    bad: int
    """Entries and files that were found damaged and set aside just now."""
    damaged_files: int
    """Files that are set aside."""
    bytes: int
    used_days_ago: float


class ReferenceCache:
    """Reference log-probs on disk, addressed by content: `(model as loaded, token ids, scored mask) -> float32 per scored token`.

    Any number of processes may read and write one folder. Values are never used unless their checksum fits.

    Args:
        folder: by default `$DPO_ENGINE_CACHE/reference`, else `~/.cache/dpo-engine/reference`. It need not exist.

        cache = ReferenceCache()
        logps = cache.token_logps(model, [(prompt_ids, [chosen_ids, rejected_ids])])     # model: see `prepare_model`
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else cache_folder() / "reference"

    def __repr__(self) -> str:
        return f"ReferenceCache({str(self.folder)!r})"

    def store(self, space: ReferenceSpace, made: dict[str, str] | None = None) -> ReferenceStore:
        """The log-probs of one space.

        Args:
            made: what to note in files that are written (device, versions, ...).
        """
        return ReferenceStore(self.folder / space.address, space.address, made)

    def token_logps(
        self,
        model: nn.Module,
        trees: Sequence[TreeLike],
        *,
        layout: Layout | str = "shared",
        max_tokens: int = 4096,
        guard: int = GUARDED_ROWS,
    ) -> list[list[Tensor]]:
        """Reference log-probs of trees: read where they are known, computed and kept where not.

        Args:
            model: a prepared causal language model (`prepare_model`) that is frozen, or a PeftModel around one, whose reference
                lies under its adapters. It is asked in eval mode, without gradient.
            layout: what `prepare_model` returned for it.
            max_tokens: of a forest.
            guard: how many trees that were found are computed again and compared.

        Returns:
            For each tree one (scored tokens,) float32 a completion, on the CPU.

        Raises:
            CacheError: the folder cannot be used, a log-prob is not finite, or what was found is not what the model says.
            ModelError: the model is not prepared, or it trains something that is no adapter.
        """
        values = ReferenceValues([as_tree(tree) for tree in trees])
        peft: Any = model if is_peft_model(model) else None
        device = next(model.parameters()).device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        space = reference_space(
            peft.get_base_model() if peft else model,
            mixed_precision={None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(autocast, str(autocast)),
            with_adapters=peft is None or has_reference_adapter(peft),
            adapter=REFERENCE if peft and has_reference_adapter(peft) else None,
        )
        store = self.store(space)

        name, longest = (layout, None) if isinstance(layout, str) else (layout.name, layout.longest)
        laid_out = ForestCollator(max_tokens, name, longest)

        def pack(some: Sequence[Any]) -> list[list[Any]]:
            return pack_trees(some, max_tokens, name, longest)

        score = scorer_of(model, laid_out)
        store.describe(space)
        filled = fill(values, store, score, pack, bar=no_bar)
        store.close()
        dtype = autocast or next(p.dtype for p in model.parameters() if p.is_floating_point())
        found = check_rows(values, some_rows(filled.found, guard), score, pack, dtype=dtype)
        refuse(found, f"the cache {self.folder}", ["The model is not what its weights, buffers and config say."])
        return [values.logps(index) for index in range(len(values))]

    # ---- the folder as a whole ----

    def spaces(self) -> list[str]:
        """Addresses of the spaces that are there."""
        if not self.folder.exists():
            return []
        if not self.folder.is_dir():
            raise CacheError(f"reference cache {self.folder} is a file; expected a folder")
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir() and _is_address(path.name))

    def nearest(self, space: ReferenceSpace) -> tuple[str, list[str]] | None:
        """Another space of the same model class that differs least: `(address, differences)`; None without any."""
        found = []
        for address in self.spaces():
            about = space_note(self.folder / address)
            about.pop("address", None)
            if about.get("model") == space.parts["model"] and address != space.address:
                found.append((address, space.differences(about)))
        return min(found, key=lambda item: len(item[1]), default=None)

    def look(self, addresses: Sequence[str] | None = None) -> list[SpaceOnDisk]:
        """Count and check every entry of the spaces given, or of all; what is damaged is set aside.

        Raises:
            CacheError: a folder cannot be read.
        """
        return [self._look(address) for address in (self.spaces() if addresses is None else addresses)]

    def merge(self, addresses: Sequence[str] | None = None, *, others: Sequence[Path] = ()) -> None:
        """Take over what other folders have, then put each space's files together into one.

        Args:
            addresses: the spaces; all of them by default.
            others: folders of caches, which are left as they are.
        """
        for other in map(ReferenceCache, others):
            if not other.folder.is_dir():
                raise CacheError(f"merge: {other.folder} is no folder; expected the folder of another reference cache")
            for address in other.spaces():
                source = other._open(address)
                target = self._open(address)
                target.copy_from(source)
                note = other.folder / address / ABOUT
                if note.exists() and target.folder.exists() and not (target.folder / ABOUT).exists():
                    shutil.copyfile(note, target.folder / ABOUT)
                source.close()
                target.close()
        for address in self.spaces() if addresses is None else addresses:
            store = self._open(address)
            if len(list(store.folder.glob("*.sqlite"))) > 1:
                store.merge()
            store.close()

    def prune(self, *, unused_days: float | None = None, space: str | None = None) -> list[str]:
        """Remove files that were set aside; whole spaces that nothing used for so many days, or one by its address.

        Returns:
            The addresses of the spaces that were removed.

        Raises:
            CacheError: there is no such space, or it cannot be removed.
        """
        addresses = self.spaces()
        if space is not None:
            matching = [address for address in addresses if address.startswith(space)]
            if len(matching) != 1 or len(space) < 4:
                raise CacheError(
                    f"prune: {len(matching)} spaces of {self.folder} begin with {space!r}; expected at least 4 digits of one "
                    "address: dpo-engine cache info lists them"
                )
        removed = []
        try:
            for address in addresses:
                folder = self.folder / address
                for path in damaged_files(folder):
                    path.unlink(missing_ok=True)
                is_old = unused_days is not None and _days_unused(folder) > unused_days
                if is_old or (space is not None and address.startswith(space)):
                    shutil.rmtree(folder)
                    removed.append(address)
        except OSError as error:
            raise CacheError(f"prune: {error.filename} cannot be removed ({error.strerror})") from error
        return removed

    def _open(self, address: str) -> ReferenceStore:
        return ReferenceStore(self.folder / address, address)

    def _look(self, address: str) -> SpaceOnDisk:
        store = self._open(address)
        entries, bad = store.check()
        store.close()
        folder = self.folder / address
        about = space_note(folder)
        files = list(folder.glob("*.sqlite"))
        return SpaceOnDisk(
            address=address,
            folder=folder,
            about=about,
            files=len(files),
            entries=entries,
            bad=bad,
            damaged_files=len(damaged_files(folder)),
            bytes=sum(path.stat().st_size for path in files),
            used_days_ago=_days_unused(folder),
        )


@contextmanager
def no_bar(total: int) -> Iterator[Any]:
    """Shows nothing."""
    yield _NoBar()


class _NoBar:
    def update(self, n: int) -> None: ...


def scorer_of(model: nn.Module, laid_out: ForestCollator) -> Score:
    """Scores the trees of a forest with the reference of `model`: in eval mode, adapters off, without gradient."""
    device = next(model.parameters()).device

    def score(trees: Sequence[Any]) -> list[list[Tensor]]:
        (forest,) = laid_out(trees).to(device).forests
        with reference_of(model) as reference:
            return by_tree(trees, forest_token_logps(reference, forest))

    return score


def by_tree(trees: Sequence[Any], token_logps: Tensor) -> list[list[Tensor]]:
    """(N,) log-probs of a forest -> for each tree, one (scored tokens,) a completion, on the CPU."""
    counts = [scored_tokens(tree) for tree in trees]
    parts = iter(token_logps.float().cpu().split([count for of_tree in counts for count in of_tree]))
    return [[next(parts) for _ in of_tree] for of_tree in counts]


def _is_address(name: str) -> bool:
    return len(name) == 32 and all(digit in "0123456789abcdef" for digit in name)


def _days_unused(folder: Path) -> float:
    """Since the space was last asked for, or written."""
    times = [path.stat().st_mtime for path in [folder / ABOUT, *folder.glob("*.sqlite")] if path.exists()]
    return (time.time() - max(times, default=0.0)) / _DAY_S
