"""Where examples come from: folders, tables, saved datasets, the Hub; their splits and slices.

Nothing here knows of tasks, roles and classes. Folders of images are read by our own reader:
datasets' imagefolder assigns splits by words in file names and sorts classes 1, 10, 2.
"""

from __future__ import annotations

import csv
import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from hfft import labels as labelling
from hfft.errors import InputError
from hfft.images import SPLIT_NAMES, class_folders, image_splits, visible_folders
from hfft.labels import listing

_TABLES = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"
}  # fmt: skip
_READERS = {**_TABLES, ".txt": "text"}
_ABOUT = {"readme", "license", "licence"}
"""Text files that speak of the data."""
_VALIDATION = ("validation", "val", "valid", "dev")


@dataclass(frozen=True)
class Read:
    """A split as its reader returns it, where it stands, and what tells it from another."""

    dataset: datasets.Dataset
    place: str
    identity: list[str]
    base: Path | None = None


@dataclass(frozen=True)
class Source:
    """The splits of one place, each read only when it is asked for."""

    place: str
    readers: Mapping[str, Callable[[], Read]]
    folder: Path | None = None

    def find(self, name: str) -> str | None:
        """The split's own name for `name`: itself, an equivalent (val), or the only one there."""
        if name in self.readers:
            return name
        if name in _VALIDATION:
            return next((other for other in _VALIDATION if other in self.readers), None)
        only = next(iter(self.readers)) if len(self.readers) == 1 else None
        return only if name == "train" and only not in SPLIT_NAMES else None


def find_source(path: str, key: str, subset: str | None = None) -> Source:
    """The splits at a path, of this machine or of the Hub; each is read when it is chosen.

    Args:
        path: a file, a folder or a Hub id.
        key: the config's key or the flag that named it, for messages.
        subset: the configuration of a dataset of the Hub.

    Raises:
        InputError: there is nothing, or nothing that can be read; names the nearest neighbour.
    """
    if not path.strip():
        raise InputError(f"{key}: is empty; name a file, a folder or a dataset of the Hub")
    local = Path(path).expanduser()
    try:
        if subset is not None and local.exists():
            raise InputError(
                f'data.subset: "{path}" is on this machine, and only datasets of the Hub have '
                "subsets; leave it out"
            )
        if local.is_dir():
            return _folder_source(local, key)
        if local.is_file():
            readers = {"train": cache(partial(_read_table, [local], key))}
            return Source(path, readers, local.parent)
    except OSError as error:
        raise InputError(f'{key}: can\'t read "{path}": {_cause(error)}') from error
    near = did_you_mean(local.name, (entry.name for entry in _entries(local.parent)))
    looked = f'{key}: there is no file or folder "{path}"{near}'
    meant = (len(local.parts) > 1 and bool(near)) or local.suffix in _READERS
    if meant or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise InputError(looked)
    try:
        found = datasets.load_dataset(path, subset)
    except Exception as error:
        if there := _subsets(error):
            raise InputError(
                f'{key}: "{path}" has several subsets, {listing(there)}; choose one with '
                "data.subset: NAME"
                if subset is None
                else f'data.subset: "{path}" has no "{subset}"{did_you_mean(subset, there)}; it '
                f"has {listing(there)}"
            ) from error
        raise InputError(f"{looked}, nor could it be had from the Hub: {_cause(error)}") from error
    return _dataset_source(path, found)


def _subsets(error: BaseException) -> list[str]:
    """The names in datasets' error about a configuration that is missing or unknown."""
    about = "Config name is missing" in str(error) or "BuilderConfig" in str(error)
    names = re.search(r"[Aa]vailable[^\[]*\[(.*?)\]", str(error)) if about else None
    return re.findall(r"'([^']*)'", names[1]) if names else []


def _folder_source(folder: Path, key: str) -> Source:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            return _dataset_source(str(folder), datasets.load_from_disk(str(folder)), folder)
        except IndexError as error:  # no row, no file of rows
            raise InputError(f'{key}: "{folder}" holds no example') from error
        except Exception as error:
            raise InputError(f'{key}: can\'t load "{folder}": {_cause(error)}') from error
    tables = _tables(folder, _TABLES)
    described = SPLIT_NAMES & tables.keys() or (tables and len(visible_folders(folder)) < 2)
    folders = {} if described else image_splits(folder)
    readers = {name: partial(_read_folder, child, key) for name, child in folders.items()} or {
        name: partial(_read_table, files, key) for name, files in (tables or _texts(folder)).items()
    }
    if not readers:
        raise InputError(
            f'{key}: "{folder}" holds neither folders of images (CLASS/IMAGE or '
            "train/CLASS/IMAGE), nor tables (train.csv, .tsv, .json, .jsonl, .parquet), nor texts "
            "(train.txt), nor a saved dataset"
        )
    return Source(str(folder), {name: cache(reader) for name, reader in readers.items()}, folder)


def _dataset_source(
    place: str, found: datasets.Dataset | datasets.DatasetDict, folder: Path | None = None
) -> Source:
    splits = found if isinstance(found, dict) else {"train": found}
    return Source(
        place,
        {
            name: partial(Read, split, f'"{place}" ({name})', [split._fingerprint], folder)
            for name, split in splits.items()
        },
        folder,
    )


def _read_folder(folder: Path, key: str) -> Read:
    try:
        classes = class_folders(folder)
    except InputError as error:
        raise InputError([f"{key}: {message}" for message in error.messages]) from None
    names = labelling.natural_sort(classes)
    rows = {
        "image": [path for name in names for path in classes[name]],
        "label": [number for number, name in enumerate(names) for _ in classes[name]],
    }
    image, label = datasets.Image(decode=False), datasets.ClassLabel(names=names)
    features = datasets.Features({"image": image, "label": label})
    return Read(datasets.Dataset.from_dict(rows, features=features), f'"{folder}"', [])


def _tables(folder: Path, endings: Collection[str]) -> dict[str, list[Path]]:
    """Split name to its file, or its shards."""
    tables: dict[str, list[Path]] = {}
    for entry in _entries(folder):
        if entry.suffix.lower() in endings and entry.is_file() and entry.name[0] != ".":
            name = re.sub(r"-\d{5}-of-\d{5}$", "", entry.stem)
            tables.setdefault(name.lower() if name.lower() in SPLIT_NAMES else name, []).append(
                entry
            )
    return tables


def _texts(folder: Path) -> dict[str, list[Path]]:
    """Split name to its files of plain text; where none has a split's name, all are one split."""
    texts = {n: f for n, f in _tables(folder, {".txt"}).items() if n.lower() not in _ABOUT}
    if not texts or SPLIT_NAMES & texts.keys():
        return texts
    return {"train": [file for files in texts.values() for file in files]}


def _read_table(files: list[Path], key: str) -> Read:
    """Reads a file, or the shards of one split, through datasets' own cache.

    CSV is read as text throughout. Guessing would turn the class "007" into 7 and "NA" into
    nothing, and would fail where a column looks like numbers for the first 10,000 rows only.
    """
    place = f'"{files[0]}"' + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1 or not kinds <= _READERS.keys():
        reason = f"{place} is of no single kind out of {', '.join(_READERS)}; keep or name one file"
        raise InputError(f"{key}: {reason}")
    reader = _READERS[suffix := kinds.pop()]
    options: dict[str, Any] = {"encoding": "utf-8-sig"} if reader == "text" else {}
    try:
        if reader == "csv":
            options = _csv_options(files[0], "\t" if suffix == ".tsv" else ",")
        names = [glob.escape(str(file)) for file in files]
        with _unlogged():
            dataset = datasets.load_dataset(reader, data_files=names, split="train", **options)
    except Exception as error:
        if "no data" in str(error) or not any(file.stat().st_size for file in files):
            raise InputError(f"{key}: {place} holds no example") from error
        raise InputError(f"{key}: can't read {place}: {_cause(error)}") from error
    if reader == "text":
        dataset = _without_blanks(dataset)
    return Read(dataset, place, [stamp(str(f), f.stat()) for f in files], files[0].parent)


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


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The nearest of the names, for a message in the middle of a sentence; "" if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def _cause(error: BaseException) -> str:
    """The first line of what lies under a library's wrapped errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"it is not written in UTF-8 ({error}); save it as UTF-8"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def choose(source: Source, choice: str, key: str) -> tuple[Read, list[tuple[str, int, int]]]:
    """The rows that a choice names (a split, a slice, a sum of these, a file, a folder).

    Returns:
        The rows; for each piece of them its place, its first row there and the row after its last.

    Raises:
        InputError: there are no such rows.
    """
    asked = (
        [choice] if source.find(choice) else [p.split("[")[0].strip() for p in choice.split("+")]
    )
    found = {name: split for name in asked if (split := source.find(name))}
    if len(found) < len(set(asked)):
        return _choose_file(source, choice, key)
    reads = {name: source.readers[split]() for name, split in found.items()}
    sizes = {name: len(read.dataset) for name, read in reads.items()}
    first = reads[asked[0]]
    if choice in reads:
        return first, [(first.place, 0, sizes[choice])]
    try:
        spans = datasets.ReadInstruction.from_spec(choice).to_absolute(sizes)
        pieces = [reads[s.splitname].dataset.select(range(s.from_, s.to)) for s in spans]
        dataset = datasets.concatenate_datasets(pieces) if len(pieces) > 1 else pieces[0]
    except (AssertionError, IndexError, ValueError) as error:
        raise InputError(f'{key}: can\'t take "{choice}" of {sizes}: {_cause(error)}') from error
    identity = [line for read in reads.values() for line in read.identity]
    ranges = [(reads[s.splitname].place, s.from_, s.to) for s in spans]
    return replace(first, dataset=dataset, identity=identity), ranges


def _choose_file(source: Source, choice: str, key: str) -> tuple[Read, list[tuple[str, int, int]]]:
    bare, bracket, rest = choice.partition("[")
    folders = [source.folder] if source.folder else []
    for path in [*(folder / bare for folder in folders), Path(bare).expanduser()]:
        if bare and path.exists():
            inner = find_source(str(path), key)
            if len(inner.readers) > 1:
                there = f"several splits ({listing(inner.readers)}); name the folder or file of one"
                raise InputError(f'{key}: "{path}" holds {there}')
            return choose(inner, next(iter(inner.readers)) + bracket + rest, key)
    there = f"the splits {listing(source.readers)}, and there is no such file or folder"
    raise InputError(f'{key}: "{source.place}" has no split "{bare}"; it has {there}')


def default_split(source: Source) -> str:
    """Test, else validation, else the only split there is.

    Raises:
        InputError: it has several others.
    """
    for name in ("test", "validation"):
        if source.find(name):
            return name
    if len(source.readers) == 1:
        return next(iter(source.readers))
    raise InputError(f'--split: "{source.place}" has {listing(source.readers)}; name one of them')


def stamp(path: str, status: os.stat_result) -> str:
    """What changes with a file: path, size in bytes, time of change."""
    return f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
