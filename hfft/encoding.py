"""A split as the model reads it: texts become token ids once a run, in parallel, kept on disk."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PretrainedConfig

from hfft import contrastive, text
from hfft.errors import InputError
from hfft.features.keys import digest, model_config, processor_identity
from hfft.identities import file_identities
from hfft.labels import counted
from hfft.task import Encode, Split, Task

Lengths = npt.NDArray[np.int64]

_FILES = ("image", "audio")  # kinds of column
_LIBRARIES = ("hfft", "transformers", "tokenizers", "datasets")
_ROWS_A_PROCESS = 10_000  # below, starting one costs more than it gains
_MOST_PROCESSES = 16
TRUNCATED = "truncated"
"""The column of `encode` that says whether tokens were cut off."""
ROW = "row"
"""The column of `encode` that says which example an encoded one goes on reading."""


@dataclass(frozen=True)
class Examples:
    """A split's examples, ready to be transformed one by one.

    Attributes:
        rows: what is indexed: encoded examples, with their originals where they ask for them, or
            several packed.
        split: what scores are computed from; in the order of `rows`.
        lengths: (N,) tokens of each of the rows; None: they are no texts.
        notes: sentences for the user.
    """

    rows: Any
    split: Split
    lengths: Lengths | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)


@dataclass(frozen=True)
class Encoder:
    """Encodes the splits of one task for one model.

    Attributes:
        task: the task.
        processor: of the model.
        config: of the model.
        labels: class names; none for a task without.
    """

    task: Task
    processor: Any
    config: PretrainedConfig
    labels: Sequence[str] = ()
    _identity: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Digest what decides the result, before tokenizing changes the tokenizer's state."""
        identity = {
            "task": self.task.name,
            "code": _code(self.task),
            "options": self.task.options.model_dump(mode="json"),
            "processor": processor_identity(self.processor),
            "model": model_config(self.config),
            "labels": list(self.labels),
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        object.__setattr__(self, "_identity", identity)

    def __call__(
        self, rows: datasets.Dataset, *, place: str, training: bool, fingerprint: str | None = None
    ) -> Examples:
        """Encode a split; evaluation data come out by length, the longest first.

        Args:
            rows: its examples, by role.
            place: what messages begin with.
            training: whether it is trained on, and may be packed.
            fingerprint: of the rows; default: datasets' own.

        Raises:
            InputError: an example is too long and may not be cut, or none is left.
        """
        encode = self.task.encode(self.processor, self.config)
        if encode is None:
            return Examples(rows, Split(rows, rows, self.labels, self.processor))
        encoded = self._encoded(encode, rows, fingerprint or rows._fingerprint)
        encoded, notes = self._checked(encoded, len(rows), place)
        lengths = _lengths(encoded)
        if not training:  # batches of like lengths need little padding; too long ones fail at once
            order = np.argsort(-lengths, kind="stable")
            encoded, lengths = encoded.select(order), lengths[order]
        packs = self.task.pack(lengths, self.config) if training else None
        split = Split(rows, encoded, self.labels, self.processor)
        if packs is None:
            beside = ROW in encoded.column_names
            indexed = RowsBeside(encoded, rows) if beside else encoded
            return Examples(indexed, split, lengths, notes)
        sums = np.array([lengths[members].sum() for members in packs], dtype=np.int64)
        return Examples(PackedRows(encoded, packs), split, sums, notes)

    def _encoded(
        self, encode: Encode, rows: datasets.Dataset, fingerprint: str
    ) -> datasets.Dataset:
        key = digest({**self._identity, "data": fingerprint})
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "hfft-encoded"
        folder.mkdir(parents=True, exist_ok=True)
        kinds = {role: column.kind for role, column in self.task.columns.items()}
        files = [role for role in rows.column_names if kinds.get(role) in _FILES]
        encoded = rows.with_format("arrow").map(
            _Indexed(encode, tuple(files)),
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            num_proc=_processes(len(rows)),
            new_fingerprint=key,
            cache_file_name=str(folder / f"{key}.arrow"),
            desc="encoding",
        )
        if (backend := getattr(self.processor, "backend_tokenizer", None)) is not None:
            backend.no_truncation()  # tokenizing sets it, and it would be saved with the model
        return encoded.with_format(None)

    def _checked(
        self, encoded: datasets.Dataset, examples: int, place: str
    ) -> tuple[datasets.Dataset, tuple[str, ...]]:
        """Count what was cut short, and leave out what came to nothing."""
        notes: list[str] = []
        total = len(encoded)
        if TRUNCATED in encoded.column_names:
            cut = sum(encoded.select_columns([TRUNCATED])[:][TRUNCATED])
            encoded = encoded.remove_columns(TRUNCATED)
            among = total if ROW in encoded.column_names else examples
            said = f"{place}: {counted(cut)} of {among} longer than the limit"
            if cut and not self.task.truncates:
                raise InputError(
                    f"{said}; shorten them, raise task.max_length, or cut them with "
                    f"task.overlong: truncate"
                )
            notes += [f"{said}: truncated."] if cut else []
        kept = np.flatnonzero(_lengths(encoded)) if total else np.array([], dtype=np.int64)
        if not len(kept):
            raise InputError(
                f"{place}: nothing to learn from is left of {counted(total)} within "
                f"task.max_length; raise it, or look at the data"
            )
        if len(kept) < total:
            notes.append(
                f"{place}: {counted(total - len(kept))} of {total} left out: within "
                f"task.max_length there is nothing to learn from."
            )
            encoded = encoded.select(kept)
        return encoded, tuple(notes)


class RowsBeside:
    """Encoded examples, each with what it was made of, an image say, which isn't kept twice.

    Args:
        encoded: the examples; their `row` is one of the others.
        rows: the originals.
    """

    def __init__(self, encoded: datasets.Dataset, rows: datasets.Dataset) -> None:
        self.encoded, self.rows = encoded, rows

    def __len__(self) -> int:
        """Return the number of encoded examples."""
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the columns of an encoded example and of its original; of one name, the first."""
        encoded = self.encoded[index]
        return {**self.rows[encoded[ROW]], **encoded}

    @property
    def originals(self) -> datasets.Dataset:
        """The originals that anything was made of, each once."""
        return self.rows.select(self._distinct[0])

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """(N,): which of these each example was made of."""
        return self._distinct[1]

    @cached_property
    def _distinct(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        rows = np.asarray(self.encoded.with_format("numpy")[ROW][:])
        found, places = np.unique(rows, return_inverse=True)
        return found, places


class PackedRows:
    """Encoded examples, several in a row.

    Args:
        encoded: the examples.
        packs: which of them make up each row.
    """

    def __init__(self, encoded: datasets.Dataset, packs: Sequence[npt.NDArray[np.int64]]) -> None:
        self.encoded, self.packs = encoded, packs

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `{"packed": [example, ...]}`."""
        columns = self.encoded[self.packs[index].tolist()]
        names = list(columns)
        rows = zip(*columns.values(), strict=True)
        return {"packed": [dict(zip(names, row, strict=True)) for row in rows]}


@dataclass(frozen=True)
class _Indexed:
    """Hands an encode function what it reads; a class, since it is sent to processes.

    That is the examples' values and places; of images and sounds, whose bytes are many, only
    which they are.
    """

    encode: Encode
    files: tuple[str, ...]

    def __call__(self, batch: pa.Table, indices: list[int]) -> Mapping[str, list[Any]]:
        values = batch.drop_columns(list(self.files)).to_pydict()
        known = {role: file_identities(batch.column(role)) for role in self.files}
        return self.encode({**values, **known, "index": indices})


def _lengths(encoded: datasets.Dataset) -> Lengths:
    """Return how many tokens each example has, without making lists of them."""
    table = encoded.select_columns(["input_ids"]).with_format("arrow")[:]
    counts = [np.diff(chunk.offsets.to_numpy()) for chunk in table.column(0).chunks if len(chunk)]
    return np.concatenate(counts).astype(np.int64) if counts else np.zeros(0, dtype=np.int64)


def _code(task: Task) -> str:
    """Return a digest of the task's file, and of ours that read and encode."""
    shared = [Path(text.__file__).parent, Path(contrastive.__file__).parent]
    files = [Path(inspect.getfile(type(task)))]
    for folder in (*shared, shared[0].parent):
        files += sorted(folder.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _processes(rows: int) -> int | None:
    """Return how many processes encode; tokenizers' own threads do for small data."""
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    wanted = min(processors, rows // _ROWS_A_PROCESS, _MOST_PROCESSES)
    return wanted if wanted > 1 else None
