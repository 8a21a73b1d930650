from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hfft.features.store import Column, Entry, open_entry

KEY = "0123456789abcdef"
COLUMNS = (
    Column("pixels", torch.float32, (4, 3)),
    Column("tokens", torch.bfloat16, (5,), varies=True),
    Column("label", torch.int64, ()),
)
EXAMPLES = 23
PROCESSES = multiprocessing.get_context("fork")  # torch is there at once


def opened(root: Path, key: str = KEY, **changes: Any) -> Entry:
    """Six chunks: five of four rows, one of three."""
    settings: dict[str, Any] = {
        "examples": EXAMPLES,
        "columns": COLUMNS,
        "rows_per_chunk": 4,
        "description": {"model": "a", "split": "train"},
    }
    return open_entry(root, key, **settings | changes)


def row(index: int) -> dict[str, Tensor]:
    """Texts have 0, 1, 2, 3, 0, ... tokens."""
    made = torch.Generator().manual_seed(index)
    return {
        "pixels": torch.randn(4, 3, generator=made),
        "tokens": torch.randn(index % 4, 5, generator=made).bfloat16(),
        "label": torch.tensor(index),
    }


def write(entry: Entry, chunk: int) -> None:
    entry.write(chunk, [row(index) for index in entry.rows(chunk)])


def complete(entry: Entry) -> None:
    for chunk in entry.missing():
        write(entry, chunk)


def assert_right(entry: Entry) -> None:
    assert entry.missing() == []
    rows = entry.read()
    assert len(rows) == EXAMPLES
    for index in range(EXAMPLES):
        expected = row(index)
        assert rows[index].keys() == expected.keys()
        for name, value in rows[index].items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])


@pytest.fixture
def start() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """Start a function in a process of its own, which does not outlive the test."""
    started = []

    def begin(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
        process = PROCESSES.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def test_rows_come_back_bit_for_bit_with_lengths_from_0(tmp_path: Path) -> None:
    with opened(tmp_path) as entry:
        assert entry.chunks == 6
        assert [list(entry.rows(chunk)) for chunk in (0, 5)] == [[0, 1, 2, 3], [20, 21, 22]]
        assert entry.missing() == list(range(6))
        complete(entry)
        assert_right(entry)
        assert entry.read()[4]["tokens"].shape == (0, 5)
        assert entry.bytes == sum(path.stat().st_size for path in entry.folder.iterdir())
        assert list(entry.folder.glob("*.partial")) == []


def test_a_chunk_of_empty_texts_only_is_whole(tmp_path: Path) -> None:
    columns = (Column("tokens", torch.float16, (5,), varies=True),)
    with opened(tmp_path, columns=columns) as entry:
        entry.write(5, [{"tokens": torch.empty(0, 5, dtype=torch.float16)}] * 3)
        assert entry.missing() == [0, 1, 2, 3, 4]
        assert entry.read()[22]["tokens"].shape == (0, 5)


@pytest.mark.parametrize("index", [-1, EXAMPLES])
def test_a_row_that_is_not_there_is_an_index_error(tmp_path: Path, index: int) -> None:
    with opened(tmp_path) as entry, pytest.raises(IndexError):
        entry.read()[index]


def test_chunks_are_a_multiple_of_the_batch(tmp_path: Path) -> None:
    with opened(tmp_path, rows_per_chunk=15) as entry:
        assert len(entry.rows(0)) == 15


def test_the_first_maker_decides_on_chunks_and_description(tmp_path: Path) -> None:
    with opened(tmp_path) as first:
        text = (first.folder / "manifest.json").read_text()
        with opened(tmp_path, rows_per_chunk=7, description={}) as second:
            assert second.rows(1) == first.rows(1)
            assert (first.folder / "manifest.json").read_text() == text


@pytest.mark.parametrize(
    "changes", [{"examples": 22}, {"columns": COLUMNS[:2]}, {"columns": COLUMNS[::-1]}]
)
def test_an_entry_of_other_rows_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    opened(tmp_path).close()
    with pytest.raises(ValueError, match=r"23 examples of pixels F32 \[4, 3\], tokens BF16"):
        opened(tmp_path, **changes)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', '{"format": 1}', None])
def test_a_damaged_or_foreign_entry_is_made_anew(tmp_path: Path, text: str | None) -> None:
    with opened(tmp_path) as entry:
        complete(entry)
        path = entry.folder / "manifest.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with opened(tmp_path) as entry:
        assert len(entry.missing()) == 6
        complete(entry)
        assert_right(entry)
    assert {path.name for path in (tmp_path / "features").iterdir()} == {KEY, ".lock"}


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    foreign = tmp_path / "features" / KEY / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    with pytest.raises(FileExistsError):
        opened(tmp_path)
    assert foreign.read_text() == "years of work"


@pytest.mark.parametrize("key", ["", "..", "ABCDEF0123", "0123/4567"])
def test_a_key_is_hexadecimal(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        opened(tmp_path, key)


def wrong_rows() -> dict[str, Callable[[list[dict[str, Tensor]]], object]]:
    return {
        "too few": lambda rows: rows.pop(),
        "a column too few": lambda rows: rows[1].pop("label"),
        "a column too many": lambda rows: rows[1].update(more=torch.zeros(1)),
        "another type": lambda rows: rows[1].update(pixels=torch.zeros(4, 3).double()),
        "another shape": lambda rows: rows[1].update(pixels=torch.zeros(3, 4)),
        "no length": lambda rows: rows[1].update(tokens=torch.zeros(5).bfloat16()),
        "empty of another shape": lambda rows: rows[1].update(tokens=torch.zeros(0).bfloat16()),
    }


@pytest.mark.parametrize("what", wrong_rows())
def test_wrong_rows_are_refused(tmp_path: Path, what: str) -> None:
    with opened(tmp_path) as entry:
        rows = [row(index) for index in entry.rows(0)]
        wrong_rows()[what](rows)
        with pytest.raises(ValueError, match=r"chunk 0|column"):
            entry.write(0, rows)
        assert len(entry.missing()) == 6


def damages() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda data: b"",
        "cut short": lambda data: data[:-1],
        "cut in the header": lambda data: data[:20],
        "too long": lambda data: data + b"\0",
        "no safetensors": lambda data: b"\xff" * len(data),
        "another type": lambda data: data.replace(b'"I64","shape":[4]', b'"F64","shape":[4]'),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_chunk_is_noticed_and_rewritten(tmp_path: Path, damage: str) -> None:
    with opened(tmp_path) as entry:
        complete(entry)
        path = entry.folder / "chunk-00002.safetensors"
        whole = path.read_bytes()
        path.write_bytes(damages()[damage](whole))
        assert path.read_bytes() != whole
        assert entry.missing() == [2]
        complete(entry)
        assert_right(entry)


def test_a_chunk_of_another_place_is_noticed(tmp_path: Path) -> None:
    with opened(tmp_path) as entry:
        complete(entry)
        (entry.folder / "chunk-00005.safetensors").replace(entry.folder / "chunk-00001.safetensors")
        assert entry.missing() == [1, 5]


@pytest.mark.parametrize("call", [(os, "fsync"), (Path, "replace")])
def test_a_full_disk_leaves_nothing_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[object, str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path) as entry:
        write(entry, 0)
        before = sorted(entry.folder.iterdir())
        with monkeypatch.context() as patched:
            patched.setattr(*call, full)
            with pytest.raises(OSError, match="No space left"):
                write(entry, 1)
        assert sorted(entry.folder.iterdir()) == before
        complete(entry)
        assert_right(entry)


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as entry:
        before = sorted(entry.folder.iterdir())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes
        try:
            with pytest.raises(OSError, match="File too large"):
                write(entry, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(entry.folder.iterdir()) == before


def write_two_and_hang(root: Path, arrived: Any) -> None:
    entry = opened(root)
    write(entry, 0)
    write(entry, 3)

    def hang(_: int) -> None:
        arrived.set()
        time.sleep(60)

    os.fsync = hang
    write(entry, 4)


def test_a_kill_in_mid_chunk_loses_that_chunk_only(tmp_path: Path, start: Any) -> None:
    arrived = PROCESSES.Event()
    writer = start(write_two_and_hang, tmp_path, arrived)
    assert arrived.wait(30)
    folder = tmp_path / "features" / KEY
    (partial,) = folder.glob("*.partial")
    opened(tmp_path).close()
    assert partial.exists()  # its writer lives
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    with opened(tmp_path) as entry:
        assert not partial.exists()
        assert entry.missing() == [1, 2, 4, 5]
        complete(entry)
        assert_right(entry)


def write_for_ever(root: Path) -> None:
    entry = opened(root)
    for chunk in itertools.cycle(range(entry.chunks)):
        write(entry, chunk)


def test_kills_at_any_moment_leave_whole_chunks_only(tmp_path: Path, start: Any) -> None:
    for turn in range(8):
        writer = start(write_for_ever, tmp_path)
        time.sleep(0.02 + 0.013 * turn)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        with opened(tmp_path) as entry:
            present = {path.name for path in entry.folder.glob("chunk-*")}
            absent = {f"chunk-{chunk:05d}.safetensors" for chunk in entry.missing()}
            assert not present & absent
            assert len(present) + len(absent) == entry.chunks
    with opened(tmp_path) as entry:
        complete(entry)
        assert_right(entry)


def make_and_write(root: Path, rows_per_chunk: int, barrier: Any) -> None:
    barrier.wait()
    with opened(root, rows_per_chunk=rows_per_chunk) as entry:
        layout = entry.rows(0)
        barrier.wait()
        for chunk in range(entry.chunks):
            write(entry, chunk)
            assert entry.rows(0) == layout
            assert chunk not in entry.missing()
        assert_right(entry)


def test_processes_that_write_at_once_agree(tmp_path: Path, start: Any) -> None:
    barrier = PROCESSES.Barrier(3)
    writers = [start(make_and_write, tmp_path, size, barrier) for size in (1, 2, 3)]
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    with opened(tmp_path) as entry:
        assert_right(entry)
        names = {path.name for path in entry.folder.iterdir()}
    assert len(names) == entry.chunks + 3  # manifest, lock, used


def test_a_day_old_partial_file_goes_whosever_it_is(tmp_path: Path) -> None:
    with opened(tmp_path) as entry:
        paths = [
            entry.folder / f"chunk-00000.safetensors.other-host.7.0123456{n}.partial"
            for n in range(2)
        ]
    for path in paths:
        path.touch()
    os.utime(paths[0], (0, 0))
    opened(tmp_path).close()
    assert [path.exists() for path in paths] == [False, True]


def test_pickled_rows_read_the_same_files(tmp_path: Path) -> None:
    with opened(tmp_path) as entry:
        complete(entry)
        rows = entry.read()
        before = rows[7]
    data = pickle.dumps(rows)
    assert len(data) < 2_000
    copy = pickle.loads(data)
    assert torch.equal(copy[7]["pixels"], before["pixels"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_what_the_process_reads(tmp_path: Path, context: str) -> None:
    with opened(tmp_path) as entry:
        complete(entry)
        rows = entry.read()
    rows[3]
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context=context)
    labels = [int(row["label"]) for row in loader]
    assert labels == list(range(EXAMPLES))


def test_rows_are_mapped_without_descriptors(tmp_path: Path) -> None:
    columns = (Column("x", torch.float32, (1024,)),)
    settings = {"columns": columns, "examples": 8192, "rows_per_chunk": 1024}
    with opened(tmp_path, **settings) as entry:
        assert entry.chunks == 8
        for chunk in range(entry.chunks):
            entry.write(chunk, [{"x": torch.full((1024,), float(chunk))}] * 1024)
        rows = entry.read()
    before, descriptors = own_memory(), len(os.listdir("/proc/self/fd"))
    assert sum(int(rows[index]["x"][0]) for index in range(8192)) == 1024 * sum(range(8))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert own_memory() - before < 8 * 2**20  # of 32 MiB read


def own_memory() -> int:
    """Bytes that this process shares with nobody."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(kib) * 1024


def test_writing_on_a_row_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    with opened(tmp_path) as entry:
        complete(entry)
        entry.read()[0]["pixels"].zero_()
        assert_right(entry)
