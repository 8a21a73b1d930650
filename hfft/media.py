"""Files that examples are made of, images or sounds: found in folders, named in tables, checked."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from hfft.columns import described, replace_column
from hfft.errors import InputError

SPLIT_NAMES = frozenset({"train", "validation", "val", "valid", "dev", "test"})
"""Names by which a folder or a table says that it is a split."""

_UNDECODED = pa.struct({"bytes": pa.binary(), "path": pa.string()})

_ROWS_AT_ONCE = 256
"""Rows held in memory by the check, for data sets that keep the encoded files in their rows."""


@dataclass(frozen=True)
class Medium:
    """A kind of file.

    Attributes:
        role: the usual name of a column of them.
        noun: what one is called.
        endings: returns file-name endings, lower case with the dot, of the known formats.
        feature: of an undecoded column: `{"path", "bytes"}` a row.
    """

    role: str
    noun: str
    endings: Callable[[], frozenset[str]]
    feature: Any

    def find(self, folder: Path) -> Iterator[Path]:
        """Those at any depth in `folder`, in a fixed order; links are followed, loops are not."""

        def stop(error: OSError) -> None:
            raise error

        seen: set[tuple[int, int]] = set()
        for root, folders, files in os.walk(folder, onerror=stop, followlinks=True):
            status = os.stat(root)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(filter(_visible, folders))
            yield from (Path(root, name) for name in sorted(files) if self._known(name))

    def given(self, given: Sequence[str]) -> list[Path]:
        """Files as they are given, and all in folders.

        Raises:
            InputError: a folder holds none.
        """
        files: list[Path] = []
        for path in map(Path, given):
            found = list(self.find(path)) if path.is_dir() else [path]
            if not found:
                raise InputError(f"{path}: the folder holds no {self.noun}s")
            files += found
        return files

    def lie_in(self, folder: Path) -> bool:
        """Whether one lies directly in `folder`, not in a folder further down."""
        return any(entry.is_file() and self._known(entry.name) for entry in folder.iterdir())

    def splits(self, folder: Path) -> dict[str, Path]:
        """Split name to the folder that holds its class folders; empty if there isn't a file.

        A folder "train" or "test" is a split if it holds folders and no files of the kind; else it
        is a class, as it may well be among pictures of vehicles.
        """
        if next(self.find(folder), None) is None:
            return {}
        folders = visible_folders(folder)
        parted = any(
            child.name.lower() in SPLIT_NAMES and visible_folders(child) and not self.lie_in(child)
            for child in folders
        )
        if not parted:
            return {"train": folder}
        return {n: child for child in folders if (n := child.name.lower()) in SPLIT_NAMES}

    def classes(self, folder: Path) -> dict[str, list[str]]:
        """Class name to the files in FOLDER/CLASS, at any depth; a class may have none.

        Raises:
            InputError: files lie in `folder` itself, so that their class is anybody's guess.
        """
        if self.lie_in(folder):
            raise InputError(
                f'{self.noun}s lie directly in "{folder}", outside any class; move each into the '
                f"folder of its class ({folder.name}/CLASS/{self.noun.upper()})"
            )
        return {entry.name: [str(p) for p in self.find(entry)] for entry in visible_folders(folder)}

    def as_column(
        self, dataset: datasets.Dataset, column: str, base: Path | None
    ) -> datasets.Dataset:
        """Turns paths, bytes or files of the kind into undecoded ones: `{"path", "bytes"}` a row.

        Args:
            dataset: any.
            column: its column to turn.
            base: the folder that relative paths in a table are relative to.

        Raises:
            InputError: the column holds something else.
        """
        feature = dataset.features[column]
        kind = feature.dtype if isinstance(feature, datasets.Value) else ""
        if kind in {"string", "large_string", "null"}:
            paths = [_under(base, path) for path in dataset.with_format(None)[:][column]]
            files = undecoded(pa.array(paths, pa.string()))
            return replace_column(dataset, column, files, self.feature)
        struct = isinstance(feature, dict) and {"bytes", "path"} >= set(feature)
        if struct or kind in {"binary", "large_binary"} or isinstance(feature, type(self.feature)):
            return dataset.cast_column(column, self.feature)
        held = described(feature)
        raise InputError(f"holds {held}, not {self.noun}s or paths of {self.noun}s")

    def _known(self, name: str) -> bool:
        return _visible(name) and Path(name).suffix.lower() in self.endings()


def visible_folders(folder: Path) -> list[Path]:
    """Folders directly in `folder`, by name, without the hidden ones and macOS's archive litter."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and _visible(entry.name))


def undecoded(paths: Any, contents: Any = None) -> Any:
    """Arrow arrays of paths, and bytes if there are any, as values of an undecoded column.

    Unlike the features' own encoders, it needs no decoder, and copies nothing.
    """
    if contents is None:
        contents = pa.nulls(len(paths), pa.binary())
    table = pa.table({"bytes": contents, "path": paths})
    return pa.chunked_array([batch.to_struct_array() for batch in table.to_batches()], _UNDECODED)


def stats(dataset: datasets.Dataset, column: str) -> Iterator[tuple[str, os.stat_result]]:
    """Path and status of each value of an undecoded column that is a file, in row order."""
    rows = dataset.with_format(None).select_columns([column])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        for value in rows[start : start + _ROWS_AT_ONCE][column]:
            if value and value["path"] and value["bytes"] is None:
                with suppress(OSError, ValueError):
                    yield value["path"], os.stat(value["path"])


def check(
    dataset: datasets.Dataset, column: str, flaw: Callable[[Mapping[str, Any] | None], str]
) -> list[tuple[int, str, str]]:
    """Looks at every value of an undecoded column, on as many threads as there are processors.

    A file that many rows name is looked at once.

    To share the work among processes, give each its own `dataset.shard(...)`; the indices are
    then the shard's.

    Args:
        dataset: any.
        column: its column to check.
        flaw: returns what is wrong with a value, or "".

    Returns:
        (row, path, flaw) of each value with one, in row order.
    """
    rows = dataset.with_format(None).select_columns([column])
    bad: list[tuple[int, str, str]] = []
    known: dict[str, str] = {}

    def flaw_once(value: Mapping[str, Any] | None) -> str:
        if not value or not value["path"] or value["bytes"] is not None:
            return flaw(value)
        if value["path"] not in known:
            known[value["path"]] = flaw(value)
        return known[value["path"]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            values = rows[start : start + _ROWS_AT_ONCE][column]
            flaws = pool.map(flaw_once, values)
            bad.extend(
                (row, name_of(value), found)
                for row, value, found in zip(count(start), values, flaws, strict=False)
                if found
            )
    return bad


def name_of(value: Mapping[str, Any] | None) -> str:
    """The file name of an undecoded value, for messages."""
    return str((value or {}).get("path") or "(no file name)")


def content_of(value: Mapping[str, Any] | None, noun: str) -> str | io.BytesIO:
    """What a decoder opens of an undecoded value: its bytes, where there are any, else its path.

    Raises:
        ValueError: there is nothing to decode; says why.
        OSError: its file can't be looked at.
    """
    path, content = str((value or {}).get("path") or ""), (value or {}).get("bytes")
    if content is None:
        if not path:
            raise ValueError(f"the row names no {noun}")
        if "://" in path:
            raise ValueError(
                f"it is a web address; download the {noun}s and name the files instead"
            )
        if os.path.isdir(path):
            raise ValueError("it is a folder")
    if not (os.path.getsize(path) if content is None else len(content)):
        raise ValueError("the file is empty")
    return path if content is None else io.BytesIO(content)


def cause(error: Exception) -> str:
    """What an error met in a file says, without the file's name."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in {"__MACOSX", "__pycache__"}


def _under(base: Path | None, path: str | None) -> str | None:
    return path if base is None or not path or "://" in path else str(base / path)
