"""How does a folder appear whole or not at all, and is there room for it?

with whole_folder(output) as partial:       a temporary sibling
    ...                                     write and check
                                            synced and renamed on the way out; removed after any failure or signal
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dpo_engine.errors import ConfigError, ExportError
from dpo_engine.model.files import sync

_SPARE = 64 * 2**20  # tokenizer, card, file system


def check_output(output: Path) -> None:
    """Raise a `ConfigError` if a folder cannot appear at `output`: something is there, or its parent cannot be written."""
    if output.is_dir():
        if any(output.iterdir()):
            raise ConfigError(f"output={output} is not empty; expected a new folder: choose another with --output")
    elif output.exists() or output.is_symlink():
        raise ConfigError(f"output={output} is a file; expected a new folder: choose another with --output")
    parent = _existing(output.parent)
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise ConfigError(f"output={output} cannot be written ({parent}); expected a folder you may write to")


def check_disk(output: Path, needed: int) -> None:
    """Raise an `ExportError` unless `needed` bytes, and a little for the rest, are free where `output` will be."""
    free = shutil.disk_usage(_existing(output.parent)).free
    if needed + _SPARE > free:
        raise ExportError(
            f"output={output}: the export takes {_gib(needed + _SPARE)}, and {_gib(free)} are free there; make room, choose "
            "another --output, or a smaller --dtype"
        )


def check_memory(needed: int, free: int) -> None:
    """Raise an `ExportError` unless `needed` bytes of memory are free."""
    if needed > free:
        raise ExportError(
            f"the merge is done in main memory and takes {_gib(needed)}, and {_gib(free)} are free; make room, or serve "
            "base and adapter as they are (without --merge the commands are printed)"
        )


def leftovers(output: Path) -> list[Path]:
    """Temporary folders of exports to `output` that were killed, or are still running."""
    return sorted(output.parent.glob(f".{glob.escape(output.name)}.*.partial")) if output.parent.is_dir() else []


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output`, which becomes `output` on the way out unless something was raised.

    SIGTERM ends the process through the same way out, with exit code 143.

    Raises:
        ExportError: the disk is full or failed.
    """
    with _sigterm_raises():
        partial = None
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
            yield partial
            _open_to_others(partial)
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            os.replace(partial, output)  # takes the place of an empty folder
            sync(output.parent)
        except OSError as error:
            raise ExportError(
                f"output={output} could not be written ({error}); nothing was kept there: make room or choose another --output"
            ) from error
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The same for a file that another program writes."""
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    with _sigterm_raises():
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        except OSError as error:
            raise ExportError(f"{path} could not be written ({error}); nothing was kept there") from error
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM as an exception, so that what is half written is cleared away. Only the main thread can arrange that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_to_others(folder: Path) -> None:
    """The modes that files made here usually have: temporary folders and safetensors are for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
