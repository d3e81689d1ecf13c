"""Does the store of reference log-probs give back what was put into it, or nothing, whatever happened to its files?"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import resource
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_engine.errors import CacheError
from dpo_engine.reference.files import PART_TOKENS, entry_files
from dpo_engine.reference.store import ReferenceStore, damaged_files
from support.reference_entries import SPACE, entries, store, write


def only_file(folder: Path) -> Path:
    (path,) = entry_files(folder / SPACE)
    return path


def test_what_was_put_is_read_back_to_the_bit_by_another_store(tmp_path: Path) -> None:
    known = entries(300)
    assert max(map(len, known.values())) > 4 * PART_TOKENS
    store(tmp_path).put(known.items())
    assert store(tmp_path).get(list(known)) == known


def test_an_address_that_nobody_put_is_not_found(tmp_path: Path) -> None:
    assert store(tmp_path).get(list(entries(3))) == {}
    store(tmp_path).put(entries(3).items())
    assert store(tmp_path).get(list(entries(5))) == entries(3)


def test_a_store_reads_the_union_of_all_files_also_those_that_come_later(tmp_path: Path) -> None:
    reader, first, second = store(tmp_path), store(tmp_path), store(tmp_path)
    first.put(entries(5).items())
    assert reader.get(list(entries(20))) == entries(5)
    second.put(entries(10, first=3).items())
    first.put(entries(5, first=15).items())
    assert reader.get(list(entries(20))) == entries(13) | entries(5, first=15)
    assert len(entry_files(tmp_path / SPACE)) == 2


def test_a_file_of_another_space_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = "f" * 32
    store(tmp_path).put(entries(4).items())
    (tmp_path / other).mkdir()
    shutil.copy(only_file(tmp_path), tmp_path / other)
    assert store(tmp_path, other).get(list(entries(4))) == {}
    assert "is damaged (it says schema 1 of space 0123456789abcdef" in caplog.text


def test_storage_is_less_than_five_bytes_a_token_and_a_small_constant_a_row(tmp_path: Path) -> None:
    draw = random.Random(0)
    for tokens in (30, 350, 700, 1500, 3000, 4100):  # 1500 and 3000 are those that fit badly into a page
        folder = tmp_path / str(tokens)
        count = max(20, 60_000 // tokens)
        put = {draw.randbytes(16): draw.randbytes(4 * tokens) for _ in range(count)}
        store(folder).put(put.items())
        used = only_file(folder).stat().st_size - 64 * 1024  # an empty file and half-filled last pages
        assert used / count <= 5 * tokens + 120, tokens


def damaged_copy(source: Path, folder: Path, content: bytes) -> ReferenceStore:
    """A store whose only file has this content."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / SPACE).mkdir(parents=True)
    (folder / SPACE / source.name).write_bytes(content)
    return store(folder)


def test_a_flipped_bit_never_comes_back_as_a_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    known = entries(60)
    store(tmp_path / "whole").put(known.items())
    source = only_file(tmp_path / "whole")
    whole = source.read_bytes()
    draw, noticed = random.Random(1), 0
    for _ in range(150):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        opened = damaged_copy(source, tmp_path / "flipped", bytes(content))
        found = opened.get(list(known))
        assert all(known[address] == values for address, values in found.items())
        # An index that lost an address is a miss, which a full check then tells from an absence.
        assert opened.bad > 0 or found == known or store(tmp_path / "flipped").check()[1] > 0
        noticed += opened.bad > 0
        # What was lost is computed again, and then all is there.
        opened.put((address, values) for address, values in known.items() if address not in found)
        assert store(tmp_path / "flipped").get(list(known)) == known
    assert noticed > 20  # the rest hit what no value depends on


def truncations(length: int, every: int) -> list[int]:
    return sorted({*range(0, length, every), 1, 15, 16, 99, 100, 4096, 16383, 16384, length - 1})


@pytest.mark.parametrize("every", [1009, pytest.param(7, marks=pytest.mark.slow)])
def test_every_truncation_is_noticed_and_what_is_lost_can_be_put_again(
    tmp_path: Path, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    known = entries(60)
    store(tmp_path / "whole").put(known.items())
    source = only_file(tmp_path / "whole")
    whole = source.read_bytes()
    for length in truncations(len(whole), every):
        opened = damaged_copy(source, tmp_path / "cut", whole[:length])
        found = opened.get(list(known))
        assert opened.bad > 0, length
        assert all(known[address] == values for address, values in found.items())
        assert len(damaged_files(tmp_path / "cut" / SPACE)) == 1
        opened.put((address, values) for address, values in known.items() if address not in found)
        assert store(tmp_path / "cut").get(list(known)) == known


def test_a_damaged_file_is_set_aside_once_and_its_sound_entries_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = entries(40)
    store(tmp_path).put(known.items())
    path = only_file(tmp_path)
    victim = next(address for address, values in known.items() if len(values) > 40)
    content = path.read_bytes()
    at = content.index(known[victim])
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    opened = store(tmp_path)
    assert opened.get(list(known)) == {address: values for address, values in known.items() if address != victim}
    assert opened.bad == 1
    assert "39 entries of it are sound and kept" in caplog.text and ".damaged" in caplog.text
    again = store(tmp_path)
    assert len(again.get(list(known))) == 39 and again.bad == 0
    assert again.check() == (39, 0)


def test_check_finds_what_nobody_asked_for(tmp_path: Path) -> None:
    store(tmp_path).put(entries(40).items())
    path = only_file(tmp_path)
    content = path.read_bytes()
    values = entries(1, first=8)[next(iter(entries(1, first=8)))]
    path.write_bytes(content.replace(values, bytes(len(values))))
    assert store(tmp_path).check() == (39, 1)


def _child(folder: str, first: int) -> None:
    write(Path(folder), 40, 8, first)


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_child, args=(str(tmp_path), 40 * (number // 2))) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert store(tmp_path).get(list(entries(80))) == entries(80)
    assert store(tmp_path).check() == (80, 0)


def test_a_fork_writes_a_file_of_its_own(tmp_path: Path) -> None:
    opened = store(tmp_path)
    opened.put(entries(4).items())
    if os.fork() == 0:
        opened.put(entries(4, first=4).items())
        os._exit(0 if opened.get(list(entries(8))) == entries(8) else 1)
    assert os.wait()[1] == 0
    assert opened.get(list(entries(8))) == entries(8)
    assert len(entry_files(tmp_path / SPACE)) == 2


def test_merging_leaves_one_file_with_each_entry_once(tmp_path: Path) -> None:
    for first in (0, 10, 20):
        store(tmp_path).put(entries(15, first=first).items())
    assert store(tmp_path).merge() == (3, 35)
    assert len(entry_files(tmp_path / SPACE)) == 1
    assert store(tmp_path).get(list(entries(35))) == entries(35)
    with sqlite3.connect(only_file(tmp_path)) as connection:
        assert connection.execute("SELECT count(DISTINCT address) FROM entries").fetchone() == (35,)


def test_a_writer_whose_file_was_merged_away_goes_on_in_another(tmp_path: Path) -> None:
    writer = store(tmp_path)
    writer.put(entries(5).items())
    store(tmp_path).put(entries(5, first=5).items())
    store(tmp_path).merge()
    writer.put(entries(5, first=10).items())
    assert store(tmp_path).get(list(entries(15))) == entries(15)
    assert writer.get(list(entries(15))) == entries(15)


def test_writers_lose_nothing_while_others_merge_set_aside_and_prune(tmp_path: Path) -> None:
    """Between any two commits of a writer its file is merged away; then the whole folder is removed."""
    writer = store(tmp_path)
    for first in range(0, 40, 8):
        writer.put(entries(8, first=first).items())
        store(tmp_path).merge()
    assert store(tmp_path).get(list(entries(40))) == entries(40)
    shutil.rmtree(tmp_path / SPACE)
    writer.put(entries(8, first=40).items())
    assert store(tmp_path).get(list(entries(48))) == entries(8, first=40)


def test_two_who_merge_and_one_who_writes_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write, args=(tmp_path, 200, 4))
    mergers = [context.Process(target=_merge, args=(str(tmp_path),)) for _ in range(2)]
    for child in (writer, *mergers):
        child.start()
    for child in (writer, *mergers):
        child.join(120)
        assert child.exitcode == 0
    assert store(tmp_path).get(list(entries(200))) == entries(200)


def _merge(folder: str) -> None:
    for _ in range(15):
        store(Path(folder)).merge()
        time.sleep(0.05)


def test_a_folder_or_a_dangling_link_named_like_a_file_of_entries_is_left_alone(tmp_path: Path) -> None:
    opened = store(tmp_path)
    opened.put(entries(3).items())
    (tmp_path / SPACE / "folder.sqlite").mkdir()
    (tmp_path / SPACE / "link.sqlite").symlink_to("/nowhere")
    assert store(tmp_path).get(list(entries(3))) == entries(3)
    assert store(tmp_path).merge() == (1, 3)


def test_another_thread_may_go_on_with_a_store(tmp_path: Path) -> None:
    opened = store(tmp_path)
    opened.put(entries(3).items())
    assert opened.get(list(entries(3))) == entries(3)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(opened.put, entries(3, first=3).items()).result()
        assert pool.submit(opened.get, list(entries(6))).result() == entries(6)
    assert opened.bad == 0


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_was_committed(tmp_path: Path) -> None:
    opened = store(tmp_path)
    opened.put(entries(40).items())
    size = only_file(tmp_path).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, limits[1]))
    try:
        with pytest.raises(CacheError, match=r"cannot be written to .*\.sqlite .*make room"):
            opened.put(entries(400, first=40).items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert store(tmp_path).get(list(entries(440))) == entries(40)
    opened.put(entries(400, first=40).items())
    assert store(tmp_path).get(list(entries(440))) == entries(440)


def test_a_folder_that_cannot_be_made_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file/.* give another folder with --reference_cache"):
        store(tmp_path / "file").put(entries(1).items())
