"""Made-up reference log-probs, stored and read back; and processes that do so."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

from dpo_engine.reference.store import ReferenceStore

SPACE = "0123456789abcdef" * 2


def entry(number: int) -> tuple[bytes, bytes]:
    """The address and the values of entry `number`: 1 to 40 tokens, every tenth 600 to 1300."""
    draw = random.Random(number)
    length = draw.randint(600, 1300) if number % 10 == 9 else draw.randint(1, 40)
    return struct.pack("<QQ", number, 7), struct.pack(f"<{length}f", *(draw.uniform(-20, 0) for _ in range(length)))


def entries(count: int, first: int = 0) -> dict[bytes, bytes]:
    """So many of them."""
    return dict(entry(number) for number in range(first, first + count))


def store(folder: Path, space: str = SPACE) -> ReferenceStore:
    return ReferenceStore(folder / space, space, {"device": "cpu"})


def write(folder: Path, count: int, batch: int = 8, first: int = 0) -> None:
    """Commit entries in batches, and say after each how many are on the disk."""
    opened = store(folder)
    for begin in range(first, first + count, batch):
        opened.put(entries(min(batch, first + count - begin), begin).items())
        print(begin + batch - first, flush=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
