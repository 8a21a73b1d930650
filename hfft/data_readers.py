"""What readers make of files: tables, texts, shards of tar files, folders of files by class."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hfft import labels as labelling
from hfft.audio import SOUNDS
from hfft.errors import InputError
from hfft.labels import listing
from hfft.media import SPLIT_NAMES, Medium, undecoded

TABLES = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"
}  # fmt: skip
READERS = {**TABLES, ".txt": "text", ".tar": "webdataset"}
_SHARDS = {".tar"}
_ABOUT = {"readme", "license", "licence"}
"""Text files that speak of the data."""


@dataclass(frozen=True)
class Read:
    """A split as its reader returns it, where it stands, and what tells it from another."""

    dataset: datasets.Dataset
    place: str
    identity: list[str]
    base: Path | None = None


def tables(folder: Path, endings: Collection[str]) -> dict[str, list[Path]]:
    """Split name to its file, or its shards."""
    found: dict[str, list[Path]] = {}
    for entry in _files(folder, endings):
        name = re.sub(r"-\d{5}-of-\d{5}$", "", entry.stem)
        found.setdefault(name.lower() if name.lower() in SPLIT_NAMES else name, []).append(entry)
    return found


def texts(folder: Path) -> dict[str, list[Path]]:
    """Split name to its files of plain text; where none has a split's name, all are one split."""
    found = {n: f for n, f in tables(folder, {".txt"}).items() if n.lower() not in _ABOUT}
    if not found or SPLIT_NAMES & found.keys():
        return found
    return {"train": [file for files in found.values() for file in files]}


def shards(folder: Path) -> dict[str, list[Path]]:
    """Split name to its tar files, numbered as in train-0000.tar, laion-val-17.tar, 00.tar."""
    found: dict[str, list[Path]] = {}
    for entry in _files(folder, _SHARDS):
        name = re.sub(r"[-_.]?\d+(-of-\d+)?$", "", entry.stem)
        last = re.split(r"[-_.]", name.lower())[-1]
        found.setdefault(last if last in SPLIT_NAMES else name or "train", []).append(entry)
    return found


def expand(pattern: str) -> list[str]:
    """The paths that braces stand for, {0000..0099} or {a,b}, as a shell has it; else the one."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        parts = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        parts = words.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for part in parts for path in expand(before + part + after)]


def read_folder(medium: Medium, folder: Path, key: str) -> Read:
    """Reads a folder of class folders; classes in the order in which people number them."""
    try:
        classes = medium.classes(folder)
    except InputError as error:
        raise InputError([f"{key}: {message}" for message in error.messages]) from None
    names = labelling.natural_sort(classes)
    ids = [number for number, name in enumerate(names) for _ in classes[name]]
    features = datasets.Features({"label": datasets.ClassLabel(names=names)})
    labels = datasets.Dataset.from_dict({"label": ids}, features=features)
    paths = pa.array([path for name in names for path in classes[name]], pa.string())
    dataset = labels.add_column(medium.role, undecoded(paths), feature=medium.feature)
    return Read(dataset.select_columns([medium.role, "label"]), f'"{folder}"', [])


def read_table(files: list[Path], key: str) -> Read:
    """Reads a file, or the shards of one split, through datasets' own cache.

    CSV is read as text throughout. Guessing would turn the class "007" into 7 and "NA" into
    nothing, and would fail where a column looks like numbers for the first 10,000 rows only.
    """
    place = f'"{files[0]}"' + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1 or not kinds <= READERS.keys():
        reason = f"{place} is of no single kind out of {', '.join(READERS)}; keep or name one file"
        raise InputError(f"{key}: {reason}")
    reader = READERS[suffix := kinds.pop()]
    options: dict[str, Any] = {"encoding": "utf-8-sig"} if reader == "text" else {}
    try:
        if reader == "csv":
            options = _csv_options(files[0], "\t" if suffix == ".tsv" else ",")
        names = [glob.escape(str(file)) for file in files]
        with _unlogged():
            dataset = (
                _read_shards(names)
                if suffix in _SHARDS
                else datasets.load_dataset(reader, data_files=names, split="train", **options)
            )
    except Exception as error:
        if "no data" in str(error) or not any(file.stat().st_size for file in files):
            raise InputError(f"{key}: {place} holds no example") from error
        raise InputError(f"{key}: can't read {place}: {cause(error)}") from error
    if reader == "text":
        dataset = _without_blanks(dataset)
    return Read(dataset, place, [stamp(str(f), f.stat()) for f in files], files[0].parent)


class _Shards(WebDataset):  # type: ignore[misc]  # datasets ships no types
    """datasets' own reader of tar files, whose samples it gives a little more to.

    Files of one name, `0001.jpg` and `0001.txt`, are a row; columns are named as they end. The
    fields of `.json` files are columns too, those of a tar file's first sample. Sounds stay as
    they are, since datasets' encoder of them needs torchcodec, though there is nothing to encode.
    """

    AUDIO_EXTENSIONS: ClassVar[list[str]] = []

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        fields: list[str] | None = None
        for sample in super()._get_pipeline_from_tar(tar_path, tar_iterator):
            for name in sample:
                if f".{name.rpartition('.')[2].lower()}" in SOUNDS.endings():
                    path = f"{sample['__key__']}.{name}"
                    sample[name] = {"bytes": sample[name], "path": path}
            about = sample.pop("json") if isinstance(sample.get("json"), dict) else {}
            fields = [*about] if fields is None else fields
            yield {field: about.get(field) for field in fields} | sample


def _read_shards(names: list[str]) -> datasets.Dataset:
    builder = _Shards(dataset_name="shards", data_files=names)
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def _without_blanks(dataset: datasets.Dataset) -> datasets.Dataset:
    """Lines with something in them: the others part texts, and are none."""
    texts = dataset.with_format("arrow")[:].column("text")
    return dataset.select(np.flatnonzero(pc.not_equal(pc.utf8_trim_whitespace(texts), "")))


def _csv_options(file: Path, separator: str) -> dict[str, Any]:
    """Text for every column that the header names.

    Raises:
        ValueError: two columns have one name, or the first row is longer than the header, which
            pandas takes for a column of row names, so that every value would stand under its
            neighbour's name.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = filter(None, csv.reader(lines, delimiter=separator))
        header = next(rows, [])
        if twice := [name for name, count in Counter(header).items() if name and count > 1]:
            raise ValueError(f"the header names {listing(twice)} more than once; rename one")
        with suppress(csv.Error):  # a text beyond this module's limit, not pandas'
            if len(first := next(rows, [])) > len(header):
                raise ValueError(f"the header has {len(header)} fields, the first row {len(first)}")
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]  # as pandas' own
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"sep": separator, "features": features, "keep_default_na": False, "index_col": False}


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps datasets from logging an error that is about to be reported."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def _files(folder: Path, endings: Collection[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.suffix.lower() in endings and entry.is_file() and entry.name[0] != ".":
            yield entry


def cause(error: BaseException) -> str:
    """The first line of what lies under a library's wrapped errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"it is not written in UTF-8 ({error}); save it as UTF-8"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stamp(path: str, status: os.stat_result) -> str:
    """What changes with a file: path, size in bytes, time of change."""
    return f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
