"""An entry of the feature cache: one row of tensors per example, in files of many rows.

Any number of processes may write an entry at once, and be killed at it: each file is written under
a name of its own and renamed when it is whole, and all write the same rows. Readers map the files,
so that processes of one machine share one copy in memory.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from hfft.features import manifest
from hfft.features.manifest import Manifest, manifest_text, read_manifest
from hfft.features.room import (
    Hold,
    bytes_of,
    chunk_name,
    clear_partial,
    entry_folder,
    is_entry,
    locked,
    partial_name,
    remove,
)

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Fixed columns and varying ones: name, tensor and where each row begins.
_Chunk = tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor, list[int]]]]


@dataclass(frozen=True)
class Column:
    """One tensor of each example.

    Args:
        name: what it is called in a row.
        dtype: its type; floating point, an integer or bool.
        shape: its shape, without the first dimension where that varies.
        varies: examples have a first dimension of their own length, such as tokens. They are stored
            end to end, without padding.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    varies: bool = False

    @property
    def offsets(self) -> str:
        """The tensor that says where in a chunk each example of a varying column begins."""
        return f"{self.name}.offsets"


class Entry:
    """One entry in use: nobody removes it before `close`; see `open_entry`.

    Args:
        hold: the use of its folder.
        layout: its manifest.
        columns: its columns.
    """

    def __init__(self, hold: Hold, layout: Manifest, columns: tuple[Column, ...]) -> None:
        self._hold = hold
        self._layout = layout
        self.folder = hold.folder
        self.columns = columns
        self.examples = layout.examples
        self.chunks = layout.chunks

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the use of the entry; rows that were read from it end theirs by themselves."""
        self._hold.close()

    @property
    def bytes(self) -> int:
        """The entry's size on disk."""
        return bytes_of(self.folder)

    def rows(self, chunk: int) -> range:
        """Return which examples a chunk covers."""
        if not 0 <= chunk < self.chunks:
            raise IndexError(f"chunk {chunk} of {self.chunks}")
        size = self._layout.rows_per_chunk
        return range(chunk * size, min((chunk + 1) * size, self.examples))

    def missing(self) -> list[int]:
        """Return the chunks that are yet to be written: those absent, cut short or otherwise wrong.

        A wrong file stays until it is replaced: another process may just have done so.
        """
        return [chunk for chunk in range(self.chunks) if not self._is_whole(chunk)]

    def write(self, chunk: int, rows: Sequence[Mapping[str, Tensor]]) -> None:
        """Write a chunk, whole or not at all.

        Args:
            chunk: its number.
            rows: the columns of each of its examples, in order; a varying column's are
                (length, *shape), the others' (*shape).

        Raises:
            ValueError: these are not the chunk's rows, or not the entry's columns.
            OSError: the disk is full, or failed.
        """
        expected = len(self.rows(chunk))
        if len(rows) != expected:
            raise ValueError(f"chunk {chunk} has {expected} rows, not {len(rows)}")
        names = {column.name for column in self.columns}
        if any(row.keys() != names for row in rows):
            raise ValueError(f"a row does not have the columns {', '.join(sorted(names))}")
        tensors: dict[str, Tensor] = {}
        for column in self.columns:
            tensors |= _joined(column, [row[column.name] for row in rows])
        name = chunk_name(chunk)
        partial = self.folder / partial_name(name)
        try:
            with partial.open("xb") as file:
                file.write(save(tensors))
                file.flush()
                os.fsync(file.fileno())  # else the name may outlive a power cut, and the rows not
            partial.replace(self.folder / name)
        finally:
            partial.unlink(missing_ok=True)

    def read(self) -> StoredRows:
        """Return the rows; a chunk is opened when a row of it is first read."""
        return StoredRows(Hold(self.folder), self._layout, self.columns)

    def _is_whole(self, chunk: int) -> bool:
        rows = len(self.rows(chunk))
        expected: dict[str, tuple[str, list[int]]] = {}
        try:
            with safe_open(self.folder / chunk_name(chunk), "pt") as file:  # checks the file's size
                for column in self.columns:
                    length = rows
                    if column.varies:
                        expected[column.offsets] = ("I64", [rows + 1])
                        length = int(file.get_tensor(column.offsets)[-1])
                    expected[column.name] = (_CODES[column.dtype], [length, *column.shape])
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
        except (OSError, SafetensorError, IndexError):
            return False
        return found == expected


class StoredRows(Dataset[dict[str, Tensor]]):
    """The rows of a complete entry, mapped from its files.

    A row's tensors are views of the mapping: to write on one changes what this process reads, never
    the file. Copies of the object, in a `DataLoader`'s workers too, map the same files.

    Args:
        hold: the use of the entry's folder.
        layout: its manifest.
        columns: its columns.
    """

    def __init__(self, hold: Hold, layout: Manifest, columns: tuple[Column, ...]) -> None:
        self._hold = hold
        self._layout = layout
        self._columns = columns
        self._open: dict[int, _Chunk] = {}

    def __len__(self) -> int:
        return self._layout.examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._layout.examples:
            raise IndexError(f"row {index} of {self._layout.examples}")
        number, row = divmod(index, self._layout.rows_per_chunk)
        chunk = self._open.get(number)
        if chunk is None:
            chunk = self._open[number] = self._opened(number)
        fixed, varying = chunk
        values = {name: tensor[row] for name, tensor in fixed}
        for name, tensor, offsets in varying:
            values[name] = tensor[offsets[row] : offsets[row + 1]]
        return values

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a mapping would travel as its bytes

    def _opened(self, chunk: int) -> _Chunk:
        # The tensors keep the file mapped, without a descriptor: any number may be open.
        with safe_open(self._hold.folder / chunk_name(chunk), "pt") as file:
            fixed = [(c.name, file.get_tensor(c.name)) for c in self._columns if not c.varies]
            varying = [
                (c.name, file.get_tensor(c.name), file.get_tensor(c.offsets).tolist())
                for c in self._columns
                if c.varies
            ]
        return fixed, varying


def open_entry(
    root: Path,
    key: str,
    *,
    examples: int,
    columns: Sequence[Column],
    rows_per_chunk: int,
    description: Mapping[str, Any],
) -> Entry:
    """Open an entry, and make it where there is none or a damaged one.

    Args:
        root: the cache's root folder.
        key: the entry's name, a hexadecimal digest of all that its rows depend on.
        examples: how many rows it has.
        columns: what a row consists of.
        rows_per_chunk: of a new entry's files.
        description: a new entry's, for `hfft cache ls`.

    Returns:
        The entry; its chunks are the first maker's, whatever the last arguments say.

    Raises:
        ValueError: there is an entry of that key with other examples or columns.
        OSError: the folder can't be written, or can't be locked.
    """
    folder = entry_folder(root, key)
    wanted = Manifest(
        examples,
        rows_per_chunk,
        tuple(
            {"name": c.name, "dtype": _CODES[c.dtype], "shape": tuple(c.shape), "varies": c.varies}
            for c in columns
        ),
        description,
    )
    with locked(root):
        clear_partial(folder.parent)
        found = read_manifest(folder)
        if found is None:
            found = _make(folder, wanted)
        clear_partial(folder)
        hold = Hold(folder)
    if (found.examples, found.columns) != (wanted.examples, wanted.columns):
        hold.close()
        raise ValueError(
            f"{folder} has {found.examples} examples of {_named(found)}; expected "
            f"{wanted.examples} of {_named(wanted)}"
        )
    return Entry(hold, found, tuple(columns))


def _make(folder: Path, wanted: Manifest) -> Manifest:
    """Make an entry in place of what is there; return its manifest."""
    if folder.exists() and not (is_entry(folder) and remove(folder)):
        raise FileExistsError(f"{folder} is in the way: of another version and in use, or not ours")
    partial = folder.with_name(partial_name(folder.name))
    try:
        partial.mkdir()
        with (partial / manifest.NAME).open("x", encoding="utf-8") as file:
            file.write(manifest_text(wanted))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder)
    except OSError as error:  # another machine was first, on a file system whose locks are local
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_manifest(folder) or wanted


def _joined(column: Column, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Put the rows of a column together as they are stored."""
    for value in values:
        shape = value.shape[1:] if column.varies else value.shape
        if value.dtype != column.dtype or shape != column.shape or value.ndim < column.varies:
            raise ValueError(
                f"column {column.name}: a row is {value.dtype} {tuple(value.shape)}; expected "
                f"{column.dtype} {('length', *column.shape) if column.varies else column.shape}"
            )
    if not column.varies:
        return {column.name: torch.stack(list(values)).cpu()}
    lengths = torch.tensor([0, *(len(value) for value in values)])
    return {column.name: torch.cat(list(values)).cpu(), column.offsets: lengths.cumsum(0)}


def _named(layout: Manifest) -> str:
    return ", ".join(
        f"{c['name']} {c['dtype']} {['*', *c['shape']] if c['varies'] else list(c['shape'])}"
        for c in layout.columns
    )
