from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from hfft.features.room import Hold, NoRoomError, list_entries, locked, make_room, remove
from hfft.features.store import Column, open_entry

KEYS = [letter * 8 for letter in "abc"]  # the order in which they were last used
USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three entries of a bit more than 100 kB each, and what is nobody's business."""
    for age, key in enumerate(KEYS):
        with open_entry(
            tmp_path,
            key,
            examples=2,
            columns=[Column("x", torch.uint8, (50_000,))],
            rows_per_chunk=2,
            description={},
        ) as entry:
            entry.write(0, [{"x": torch.zeros(50_000, dtype=torch.uint8)}] * 2)
        os.utime(entry.folder / "used", (1_000 + age, 1_000 + age))
    (tmp_path / "features" / "notes").mkdir()
    (tmp_path / "features" / "notes" / "mine.txt").touch()
    (tmp_path / "features" / ("d" * 8)).mkdir()
    (tmp_path / "features" / ("d" * 8) / "mine.txt").touch()
    return tmp_path


def keys(root: Path) -> list[str]:
    return [entry.key for entry in list_entries(root)]


def hold_elsewhere(folder: Path) -> subprocess.Popen[str]:
    code = (
        "import sys, time; from pathlib import Path; from hfft.features.room import Hold\n"
        "hold = Hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "held\n"
    return started


def test_nothing_goes_while_there_is_room(root: Path) -> None:
    make_room(root, 100_000, 500_000)
    assert keys(root) == KEYS


def test_the_least_recently_used_goes_first(root: Path) -> None:
    make_room(root, 100_000, 310_000)
    assert keys(root) == KEYS[1:]
    Hold(root / "features" / KEYS[1]).close()
    make_room(root, 100_000, 210_000)
    assert keys(root) == [KEYS[1]]
    assert (root / "features" / "notes" / "mine.txt").exists()
    assert (root / "features" / ("d" * 8) / "mine.txt").exists()


def test_no_more_goes_than_must(root: Path) -> None:
    make_room(root, 150_000, 310_000)
    assert keys(root) == KEYS[2:]


def test_what_is_to_be_kept_stays(root: Path) -> None:
    make_room(root, 100_000, 310_000, keep=KEYS[:1])
    assert keys(root) == [KEYS[0], KEYS[2]]


def test_a_full_disk_makes_room_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, 10_000))
    make_room(root, 50_000, 10**9)
    assert keys(root) == KEYS[1:]
    with pytest.raises(NoRoomError, match="the disk has"):
        make_room(root, 10**6, 10**9)


def test_without_room_nothing_goes_and_the_error_says_what_to_do(root: Path) -> None:
    with pytest.raises(NoRoomError) as caught:
        make_room(root, 3 * 2**30, 2 * 2**30)
    assert keys(root) == KEYS
    message = str(caught.value)
    for part in (str(root / "features"), "3.00 GiB more", "at most 2.00 GiB", "HFFT_CACHE"):
        assert part in message
    assert isinstance(caught.value, OSError)


def test_an_entry_that_a_process_uses_stays_until_it_is_killed(root: Path) -> None:
    holder = hold_elsewhere(root / "features" / KEYS[0])
    os.utime(root / "features" / KEYS[0] / "used", (0, 0))
    try:
        make_room(root, 100_000, 310_000)
        assert keys(root) == [KEYS[0], KEYS[2]]
        with pytest.raises(NoRoomError):
            make_room(root, 300_000, 310_000)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    make_room(root, 300_000, 310_000)
    assert keys(root) == []


def test_an_open_entry_and_its_rows_keep_it(root: Path) -> None:
    settings = {"rows_per_chunk": 2, "description": {}}
    columns = [Column("x", torch.uint8, (50_000,))]
    entry = open_entry(root, KEYS[0], examples=2, columns=columns, **settings)
    folder = entry.folder
    with locked(root):
        assert not remove(folder)
        rows = entry.read()
        entry.close()
        assert not remove(folder)
        del rows
        gc.collect()
        assert remove(folder)
    assert not folder.exists()


def test_a_pickled_hold_holds_by_itself(root: Path) -> None:
    hold = Hold(root / "features" / KEYS[0])
    copy = pickle.loads(pickle.dumps(hold))
    hold.close()
    with locked(root):
        assert not remove(copy.folder)
        copy.close()
        assert remove(copy.folder)
    with pytest.raises(FileNotFoundError):
        Hold(copy.folder)


def test_a_hold_that_waited_out_a_removal_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "features" / KEYS[0]

    def removed_first(_lock: int, _operation: int) -> None:
        monkeypatch.undo()
        with locked(root):
            assert remove(folder)

    monkeypatch.setattr("fcntl.flock", removed_first)
    with pytest.raises(FileNotFoundError):
        Hold(folder)
    assert not folder.exists()


def test_a_removal_that_was_killed_leaves_no_entry_and_is_finished_later(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "features" / KEYS[0]
    with monkeypatch.context() as patched, locked(root):
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove(folder)
    assert keys(root) == KEYS[1:]
    (left,) = folder.parent.glob(".rm-*")
    assert (left / "chunk-00000.safetensors").exists()
    make_room(root, 0, 10**9)
    assert not left.exists()


def test_an_entry_that_was_never_finished_can_go(root: Path) -> None:
    partial = root / "features" / ("e" * 8)
    partial.mkdir()
    (partial / "lock").touch()
    os.utime(partial, (1, 1))
    assert keys(root) == ["e" * 8, *KEYS]
    make_room(root, 100_000, 310_000)
    assert not partial.exists()


def test_a_link_is_no_entry(root: Path) -> None:
    elsewhere = root / "elsewhere"
    (root / "features" / KEYS[0]).rename(elsewhere)
    (root / "features" / KEYS[0]).symlink_to(elsewhere)
    assert keys(root) == KEYS[1:]
