"""Data: found, read, split, checked and named as the task wants it.

Everything that can be wrong with the data is found here, before any weight is loaded, and as
much of it as possible is reported at once. Folders of images are read by our own reader:
datasets' imagefolder assigns splits by words in file names and sorts classes 1, 10, 2.
"""

from __future__ import annotations

import csv
import difflib
import glob
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import datasets
import numpy as np

from hfft import labels as labelling
from hfft.errors import InputError
from hfft.images import (
    SPLIT_NAMES,
    as_image_column,
    check_images,
    class_folders,
    image_files,
    image_splits,
    visible_folders,
)
from hfft.labels import Ids, LabelColumn, counted, listing

if TYPE_CHECKING:
    from hfft.config import DataConfig

T = TypeVar("T")

HELD_OUT = 0.1
"""The share of every class that is held out where the config names no validation data."""

_TABLES = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"
}  # fmt: skip
_VALIDATION = ("validation", "val", "valid", "dev")
_SHOWN = 10
"""How many bad files or columns a message lists before it only counts the rest."""


@dataclass(frozen=True)
class Column:
    """A column that a task needs.

    Attributes:
        kind: what it has to hold.
        names: what it is usually called; tried in order, case aside.
    """

    kind: Literal["image", "label", "text"]
    names: tuple[str, ...]


@dataclass(frozen=True)
class LoadedData:
    """Checked data.

    Attributes:
        splits: "train", "validation" and, if asked for, "test"; columns named by their roles.
        labels: class names in the model's order; None for a task without a label column.
        notes: sentences for the user: what was held out, what was left out, what looks odd.
        skipped: the undecodable files that were left out.
        fingerprint: changes with the files (path, size, time of change) and with the choice.
    """

    splits: datasets.DatasetDict
    labels: list[str] | None
    notes: list[str]
    skipped: list[str]
    fingerprint: str


@dataclass(frozen=True)
class _Request:
    """What is wanted of every split, and what was found wrong so far."""

    columns: Mapping[str, Column]
    chosen: Mapping[str, str]
    skip: bool
    problems: list[str]

    @property
    def label(self) -> str | None:
        return next((role for role, c in self.columns.items() if c.kind == "label"), None)

    def collect(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Calls the function; the user's errors in it are kept for later."""
        try:
            return function(*arguments)
        except InputError as error:
            self.problems.extend(error.messages)
            return None

    def lose(self, part: _Part, rows: Mapping[int, str], said: str) -> None:
        """Leaves bad rows out, if that was asked for; else they are an error."""
        if rows and self.skip:
            part.bad.update({row: path or part.bad.get(row, "") for row, path in rows.items()})
        elif rows:
            self.problems.append(said + "; or leave them out with data.on_bad_example: skip")


@dataclass
class _Part:
    """A chosen split, all its rows, and what is known about them."""

    dataset: datasets.Dataset
    place: str
    identity: list[str]
    ranges: list[tuple[str, int, int]]
    bad: dict[int, str] = field(default_factory=dict)
    files: dict[tuple[int, int], str] = field(default_factory=dict)
    labels: LabelColumn | None = None
    ids: Ids | None = None

    @property
    def good(self) -> Ids:
        """Rows that aren't bad, ascending."""
        return np.setdiff1d(np.arange(len(self.dataset)), np.array([*self.bad], dtype=np.int64))


def load_data(config: DataConfig, columns: Mapping[str, Column], *, seed: int) -> LoadedData:
    """Finds, reads, splits and checks the data that a config names.

    Args:
        config: the config's `data` section.
        columns: role to what the task needs there.
        seed: decides which examples are held out where `config.validation` is left out.

    Raises:
        InputError: all that is wrong with the data, as far as it can be told at once.
    """
    _quiet()
    problems: list[str] = []
    request = _Request(columns, config.columns, config.on_bad_example == "skip", problems)
    _check_roles(request)
    source = request.collect(_find_source, config.path, "data.path")
    choices = {"train": config.train, "validation": config.validation, "test": config.test}
    asked = {name: choice for name, choice in choices.items() if choice is not None and source}
    read = {
        name: request.collect(_read_part, source, choice, f"data.{name}", request)
        for name, choice in asked.items()
    }
    parts = {name: part for name, part in read.items() if part}
    rows = {name: part.good for name, part in parts.items()}
    names = _agree_on_labels(parts, rows, problems)
    notes = _oddities(parts, names or [])
    skipped = [path for part in parts.values() for path in part.bad.values() if path]
    if config.validation is None and "train" in parts and not problems:
        rows["train"], rows["validation"] = _hold_out(parts["train"], names, seed, problems)
        notes.append(_held_out_note(source, rows, names))
        parts["validation"] = parts["train"]
    if problems:
        raise InputError(dict.fromkeys(problems))
    chosen = {name: (parts[name], rows[name]) for name in choices if name in parts}
    splits = {n: _finish(part, request.label, names).select(r) for n, (part, r) in chosen.items()}
    fingerprint = _fingerprint(chosen, names)
    return LoadedData(datasets.DatasetDict(splits), names, notes, skipped, fingerprint)


def load_split(
    path: str,
    split: str | None,
    columns: Mapping[str, Column],
    *,
    labels: list[str] | None,
    chosen: Mapping[str, str] | None = None,
    on_bad_example: Literal["error", "skip"] = "error",
) -> datasets.Dataset:
    """Reads one split for a trained model, by the same rules as its training data.

    Args:
        path: as `data.path`.
        split: as `data.test`; None: test, else validation, else the only split there is.
        columns: role to what the task needs there.
        labels: the model's classes, by whose order the label column is encoded; None leaves it
            as it is.
        chosen: role to column, as `data.columns`.
        on_bad_example: as `data.on_bad_example`.

    Raises:
        InputError: as for `load_data`, and for labels that the model doesn't have.
    """
    _quiet()
    problems: list[str] = []
    request = _Request(columns, chosen or {}, on_bad_example == "skip", problems)
    _check_roles(request)
    source = _find_source(path, "--data")
    part = _read_part(source, split or _default_split(source), "--split", request)
    if part.labels and labels is not None:
        part.ids = labelling.recode(part.labels, labels)
        if not set(part.labels.names) & set(labels):
            problems.append(
                f"--data: no label in {part.place} ({listing(part.labels.names)}) is one of the "
                f"model's ({listing(labels)}); the two must name their classes alike"
            )
        else:
            problems += labelling.unknown_problems(part.labels, part.ids, "the model", part.place)
    if problems:
        raise InputError(dict.fromkeys(problems))
    return _finish(part, request.label, labels).select(part.good)


def _quiet() -> None:
    """Bars are for terminals; in a log file each of their steps is a line."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _check_roles(request: _Request) -> None:
    for role in request.chosen.keys() - request.columns.keys():
        request.problems.append(
            f"data.columns.{role}: the task has no such column{_nearest(role, request.columns)}"
        )


def _read_part(source: _Source, choice: str, key: str, request: _Request) -> _Part:
    read, ranges = _choose(source, choice, key)
    if not len(read.dataset):
        raise InputError(f'{key}: "{choice}" of {read.place} holds no example')
    dataset, found = _by_role(read, request)
    part = _Part(dataset, f"{key}, {read.place}", list(read.identity), ranges)
    take = {"image": _take_images, "text": _take_text, "label": _take_labels}
    for role, column in request.columns.items():
        try:
            take[column.kind](part, role, read.base, request)
        except InputError as error:
            column_there = f'column "{found[role]}" of {read.place}'
            request.problems.append(f"data.columns.{role}: {column_there} {error}")
    if len(part.bad) == len(dataset):
        raise InputError(f"{part.place}: no usable example is left, all are left out")
    return part


def _by_role(read: _Read, request: _Request) -> tuple[datasets.Dataset, dict[str, str]]:
    """Keeps the columns that have a role, under its name; role to old name."""
    there = read.dataset.column_names
    folded = {name.strip().casefold(): name for name in reversed(there)}
    found: dict[str, str] = {}
    problems: list[str] = []
    for role, column in request.columns.items():
        usual = (folded[name.casefold()] for name in column.names if name.casefold() in folded)
        wanted = request.chosen.get(role) or next(usual, None)
        if wanted and wanted in there:
            found[role] = wanted
            continue
        lacks = f'"{wanted}"' if wanted else f"column for it ({', '.join(column.names)})"
        near = _nearest(wanted or column.names[0], there)
        problems.append(
            f"data.columns.{role}: {read.place} has no {lacks}{near}; its columns are "
            f"{listing(there)}. Map the right one: `data.columns.{role}: NAME`"
        )
    if len(set(found.values())) < len(found):
        problems.append(f"data.columns: one column of {read.place} can't serve twice: {found}")
    if problems:
        raise InputError(problems)
    chosen = read.dataset.select_columns(list(found.values()))
    return chosen.rename_columns({old: role for role, old in found.items()}), found


def _take_images(part: _Part, role: str, base: Path | None, request: _Request) -> None:
    part.dataset = as_image_column(part.dataset, role, base)
    flaws = check_images(part.dataset, role)
    lines = [f"\n  {path}: {reason}" for _, path, reason in flaws[:_SHOWN]]
    rest = f"\n  and {len(flaws) - _SHOWN} more" if len(flaws) > _SHOWN else ""
    said = f"{part.place}: {len(flaws)} of {len(part.dataset)} images can't be decoded:"
    request.lose(
        part,
        {row: path for row, path, _ in flaws},
        f"{said}{''.join(lines)}{rest}\n  Mend or remove them",
    )
    for path, status in image_files(part.dataset, role):
        part.files[status.st_dev, status.st_ino] = path
        part.identity.append(_stamp(path, status))


def _take_text(part: _Part, role: str, base: Path | None, request: _Request) -> None:
    feature = part.dataset.features[role]
    if not isinstance(feature, datasets.Value) or "binary" in feature.dtype:
        raise InputError(f"holds {getattr(feature, 'dtype', feature)}, not text")
    if feature.dtype != "string":
        part.dataset = part.dataset.cast_column(role, datasets.Value("string"))
    column = part.dataset.select_columns([role]).with_format("arrow")[:].column(0)
    _lose_missing(part, role, np.flatnonzero(column.is_null()), request)


def _take_labels(part: _Part, role: str, base: Path | None, request: _Request) -> None:
    part.labels = labelling.read_labels(part.dataset, role)
    _lose_missing(part, role, np.flatnonzero(part.labels.ids == labelling.MISSING), request)


def _lose_missing(part: _Part, role: str, rows: Ids, request: _Request) -> None:
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
    share = f"{len(rows)} of {len(part.dataset)} examples have no {role}"
    said = f"{part.place}: {share}: rows {shown} (the first is 0). Give them one"
    request.lose(part, dict.fromkeys(rows.tolist(), ""), said)


def _agree_on_labels(
    parts: Mapping[str, _Part], rows: Mapping[str, Ids], problems: list[str]
) -> list[str] | None:
    columns = {name: part.labels for name, part in parts.items() if part.labels}
    if "train" not in columns:
        return None
    names, ids, wrong = labelling.agree(
        columns, rows, {name: part.place for name, part in parts.items()}
    )
    problems += wrong
    for name, numbers in ids.items():
        parts[name].ids = numbers
    return names


def _oddities(parts: Mapping[str, _Part], names: list[str]) -> list[str]:
    """What is no error and yet worth a sentence."""
    notes = [
        f"{part.place}: left out {len(part.bad)} of {len(part.dataset)} examples, which are "
        "undecodable or incomplete."
        for part in parts.values()
        if part.bad
    ]
    for one, other in combinations(parts, 2):
        a, b = parts[one], parts[other]
        shared = sum(
            max(0, min(to, end) - max(start, begin))
            for place, start, to in a.ranges
            for where, begin, end in b.ranges
            if place == where
        )
        files = [] if shared else [path for key, path in b.files.items() if key in a.files]
        if shared or files:
            first = "" if shared else f' (the first is "{files[0]}")'
            notes.append(
                f"data.{one} and data.{other} share {counted(shared or len(files))}{first}: "
                f"scores on data.{other} will look better than they are."
            )
    return notes + [
        f"The classes {listing(group)} differ only in case or spaces: are they one?"
        for group in labelling.lookalikes(names)
    ]


def _hold_out(
    part: _Part, names: list[str] | None, seed: int, problems: list[str]
) -> tuple[Ids, Ids]:
    rows = part.good
    ids = None if part.ids is None else part.ids[rows]
    if ids is not None:
        problems += labelling.lone_problems(ids, names or [], part.place)
    elif len(rows) < 2:
        problems.append(f"{part.place}: a single example, so none can be held out for validation")
    if problems:
        return rows, rows
    kept, out = labelling.hold_out(ids, len(rows), HELD_OUT, seed)
    return rows[kept], rows[out]


def _held_out_note(source: _Source | None, rows: Mapping[str, Ids], names: list[str] | None) -> str:
    there = source.find("validation") if source else None
    held, total = len(rows["validation"]), len(rows["validation"]) + len(rows["train"])
    said = f"data.validation is left out: held out {held} of the {total} training examples"
    said += ", the same share of every class." if names else "."
    return said + (f" The data has a split for that: data.validation: {there}" if there else "")


def _finish(part: _Part, label: str | None, names: list[str] | None) -> datasets.Dataset:
    if label is None or names is None or part.ids is None:
        return part.dataset
    return labelling.encode(part.dataset, label, part.ids, names)


def _stamp(path: str, status: os.stat_result) -> str:
    return f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"


def _fingerprint(chosen: Mapping[str, tuple[_Part, Ids]], names: list[str] | None) -> str:
    digest = hashlib.sha256(repr(names).encode())
    for name, (part, rows) in chosen.items():
        spans = [(start, end) for _, start, end in part.ranges]
        digest.update(
            "\n".join([name, repr(spans), *part.identity]).encode(errors="surrogateescape")
        )
        digest.update(rows.tobytes() + (b"" if part.ids is None else part.ids.tobytes()))
    return digest.hexdigest()


# Where the examples come from: everything below knows nothing of tasks, roles and classes.


@dataclass(frozen=True)
class _Read:
    """A split as its reader returns it, where it stands, and what tells it from another."""

    dataset: datasets.Dataset
    place: str
    identity: list[str]
    base: Path | None = None


@dataclass(frozen=True)
class _Source:
    """The splits of one place, each read only when it is asked for."""

    place: str
    readers: Mapping[str, Callable[[], _Read]]
    folder: Path | None = None

    def find(self, name: str) -> str | None:
        """The split's own name for `name`: itself, an equivalent (val), or the only one there."""
        if name in self.readers:
            return name
        if name in _VALIDATION:
            return next((other for other in _VALIDATION if other in self.readers), None)
        only = next(iter(self.readers)) if len(self.readers) == 1 else None
        return only if name == "train" and only not in SPLIT_NAMES else None


def _find_source(path: str, key: str) -> _Source:
    if not path.strip():
        raise InputError(f"{key}: is empty; name a file, a folder or a dataset of the Hub")
    local = Path(path).expanduser()
    try:
        if local.is_dir():
            return _folder_source(local, key)
        if local.is_file():
            readers = {"train": cache(partial(_read_table, [local], key))}
            return _Source(path, readers, local.parent)
    except OSError as error:
        raise InputError(f'{key}: can\'t read "{path}": {_cause(error)}') from error
    near = _nearest(local.name, (entry.name for entry in _entries(local.parent)))
    looked = f'{key}: there is no file or folder "{path}"{near}'
    meant = (len(local.parts) > 1 and bool(near)) or local.suffix in _TABLES
    if meant or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise InputError(looked)
    try:
        found = datasets.load_dataset(path)
    except Exception as error:
        raise InputError(f"{looked}, nor could it be had from the Hub: {_cause(error)}") from error
    return _dataset_source(path, found)


def _folder_source(folder: Path, key: str) -> _Source:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            return _dataset_source(str(folder), datasets.load_from_disk(str(folder)), folder)
        except IndexError as error:  # no row, no file of rows
            raise InputError(f'{key}: "{folder}" holds no example') from error
        except Exception as error:
            raise InputError(f'{key}: can\'t load "{folder}": {_cause(error)}') from error
    tables = _tables(folder)
    described = SPLIT_NAMES & tables.keys() or (tables and len(visible_folders(folder)) < 2)
    folders = {} if described else image_splits(folder)
    readers = {name: partial(_read_folder, child, key) for name, child in folders.items()} or {
        name: partial(_read_table, files, key) for name, files in tables.items()
    }
    if not readers:
        raise InputError(
            f'{key}: "{folder}" holds neither folders of images (CLASS/IMAGE or '
            "train/CLASS/IMAGE), nor tables (train.csv, .tsv, .json, .jsonl, .parquet), nor a "
            "saved dataset"
        )
    return _Source(str(folder), {name: cache(reader) for name, reader in readers.items()}, folder)


def _dataset_source(
    place: str, found: datasets.Dataset | datasets.DatasetDict, folder: Path | None = None
) -> _Source:
    splits = found if isinstance(found, dict) else {"train": found}
    return _Source(
        place,
        {
            name: partial(_Read, split, f'"{place}" ({name})', [split._fingerprint], folder)
            for name, split in splits.items()
        },
        folder,
    )


def _read_folder(folder: Path, key: str) -> _Read:
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
    return _Read(datasets.Dataset.from_dict(rows, features=features), f'"{folder}"', [])


def _tables(folder: Path) -> dict[str, list[Path]]:
    """Split name to its file, or its shards; only files with a split's name, if there are any."""
    tables: dict[str, list[Path]] = {}
    for entry in _entries(folder):
        if entry.suffix.lower() in _TABLES and entry.is_file() and entry.name[0] != ".":
            name = re.sub(r"-\d{5}-of-\d{5}$", "", entry.stem)
            tables.setdefault(name.lower() if name.lower() in SPLIT_NAMES else name, []).append(
                entry
            )
    return tables


def _read_table(files: list[Path], key: str) -> _Read:
    """Reads a file, or the shards of one split, through datasets' own cache.

    CSV is read as text throughout. Guessing would turn the class "007" into 7 and "NA" into
    nothing, and would fail where a column looks like numbers for the first 10,000 rows only.
    """
    place = f'"{files[0]}"' + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1 or not kinds <= _TABLES.keys():
        reason = f"{place} is of no single kind out of {', '.join(_TABLES)}; keep or name one file"
        raise InputError(f"{key}: {reason}")
    options: dict[str, Any] = {}
    try:
        if _TABLES[suffix := kinds.pop()] == "csv":
            options = _csv_options(files[0], "\t" if suffix == ".tsv" else ",")
        names = [glob.escape(str(file)) for file in files]
        with _unlogged():
            dataset = datasets.load_dataset(
                _TABLES[suffix], data_files=names, split="train", **options
            )
    except Exception as error:
        if "no data" in str(error) or not any(file.stat().st_size for file in files):
            raise InputError(f"{key}: {place} holds no example") from error
        raise InputError(f"{key}: can't read {place}: {_cause(error)}") from error
    return _Read(dataset, place, [_stamp(str(f), f.stat()) for f in files], files[0].parent)


def _csv_options(file: Path, separator: str) -> dict[str, Any]:
    """Text for every column that the header names.

    Raises:
        ValueError: the first row is longer than the header, which pandas takes for a column of
            row names, so that every value would stand under its neighbour's name.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = filter(None, csv.reader(lines, delimiter=separator))
        header = next(rows, [])
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


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def _cause(error: BaseException) -> str:
    """The first line of what lies under a library's wrapped errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _choose(source: _Source, choice: str, key: str) -> tuple[_Read, list[tuple[str, int, int]]]:
    """The rows that a choice names (a split, a slice, a sum of these, a file, a folder)."""
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


def _choose_file(
    source: _Source, choice: str, key: str
) -> tuple[_Read, list[tuple[str, int, int]]]:
    bare, bracket, rest = choice.partition("[")
    folders = [source.folder] if source.folder else []
    for path in [*(folder / bare for folder in folders), Path(bare).expanduser()]:
        if bare and path.exists():
            inner = _find_source(str(path), key)
            if len(inner.readers) > 1:
                there = f"several splits ({listing(inner.readers)}); name the folder or file of one"
                raise InputError(f'{key}: "{path}" holds {there}')
            return _choose(inner, next(iter(inner.readers)) + bracket + rest, key)
    there = f"the splits {listing(source.readers)}, and there is no such file or folder"
    raise InputError(f'{key}: "{source.place}" has no split "{bare}"; it has {there}')


def _default_split(source: _Source) -> str:
    for name in ("test", "validation"):
        if source.find(name):
            return name
    if len(source.readers) == 1:
        return next(iter(source.readers))
    raise InputError(f'--split: "{source.place}" has {listing(source.readers)}; name one of them')
