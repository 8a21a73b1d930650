"""Where examples come from: folders, tables, saved datasets, the Hub; their splits and slices.

Nothing here knows of tasks, roles and classes. Folders of images and sounds are read by our own
reader: datasets' imagefolder assigns splits by words in file names and sorts classes 1, 10, 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import datasets

from hfft.audio import SOUNDS
from hfft.data_readers import (
    READERS,
    TABLES,
    Read,
    cause,
    expand,
    read_folder,
    read_table,
    shards,
    tables,
    texts,
)
from hfft.errors import InputError
from hfft.images import IMAGES
from hfft.labels import listing
from hfft.media import SPLIT_NAMES, visible_folders

_MEDIA = (IMAGES, SOUNDS)
_VALIDATION = ("validation", "val", "valid", "dev")


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
        files = [local] if local.is_file() else [Path(one) for one in expand(str(local))]
        if local.is_file() or len(files) > 1:
            if lost := [file for file in files if not file.is_file()]:
                raise InputError(
                    f'{key}: "{path}" stands for {len(files)} files, and {len(lost)} of them are '
                    f'not there (the first is "{lost[0]}")'
                )
            return Source(path, {"train": cache(partial(read_table, files, key))}, local.parent)
    except OSError as error:
        raise InputError(f'{key}: can\'t read "{path}": {cause(error)}') from error
    near = did_you_mean(local.name, (entry.name for entry in _entries(local.parent)))
    looked = f'{key}: there is no file or folder "{path}"{near}'
    meant = (len(local.parts) > 1 and bool(near)) or local.suffix in READERS
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
        raise InputError(f"{looked}, nor could it be had from the Hub: {cause(error)}") from error
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
            raise InputError(f'{key}: can\'t load "{folder}": {cause(error)}') from error
    readers = _class_readers(folder, key) if not (files := _described(folder)) else {}
    files = files or shards(folder) or tables(folder, TABLES) or texts(folder)
    readers = readers or {name: partial(read_table, own, key) for name, own in files.items()}
    if not readers:
        raise InputError(
            f'{key}: "{folder}" holds neither folders of images or sounds (CLASS/IMAGE or '
            "train/CLASS/IMAGE), nor tables (train.csv, .tsv, .json, .jsonl, .parquet), nor shards "
            "(train-0000.tar), nor texts (train.txt), nor a saved dataset"
        )
    return Source(str(folder), {name: cache(reader) for name, reader in readers.items()}, folder)


def _described(folder: Path) -> dict[str, list[Path]]:
    """Split name to its tables or shards, where these, not folders of classes, are the data."""
    found, packed = tables(folder, TABLES), shards(folder)
    named = (SPLIT_NAMES | {"captions"}) & found.keys()
    if named or (found and not packed and _are_beside_files(folder)):
        return found
    return {
        child.name.lower(): [file for group in own.values() for file in group]
        for child in visible_folders(folder)
        if child.name.lower() in SPLIT_NAMES
        and _are_beside_files(child)
        and (own := shards(child) or tables(child, TABLES))
    }


def _are_beside_files(folder: Path) -> bool:
    """Whether a folder's tables speak of the files that lie beside them, or in one folder there."""
    return len(visible_folders(folder)) < 2 or any(medium.lie_in(folder) for medium in _MEDIA)


def _class_readers(folder: Path, key: str) -> dict[str, Callable[[], Read]]:
    """Split name to the reader of its class folders."""
    for medium in _MEDIA:
        if splits := medium.splits(folder):
            return {name: partial(read_folder, medium, own, key) for name, own in splits.items()}
    return {}


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


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The nearest of the names, for a message in the middle of a sentence; "" if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


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
        raise InputError(f'{key}: can\'t take "{choice}" of {sizes}: {cause(error)}') from error
    identity = [line for read in reads.values() for line in read.identity]
    ranges = [(reads[s.splitname].place, s.from_, s.to) for s in spans]
    return replace(first, dataset=dataset, identity=identity), ranges


def _choose_file(source: Source, choice: str, key: str) -> tuple[Read, list[tuple[str, int, int]]]:
    bare, bracket, rest = choice.partition("[")
    folders = [source.folder] if source.folder else []
    for path in [*(folder / bare for folder in folders), Path(bare).expanduser()]:
        if bare and any(Path(one).exists() for one in (str(path), *expand(str(path)))):
            inner = find_source(str(path), key)
            if len(inner.readers) > 1:
                there = f"several splits ({listing(inner.readers)}); name the folder or file of one"
                raise InputError(f'{key}: "{path}" holds {there}')
            return choose(inner, next(iter(inner.readers)) + bracket + rest, key)
    there = f"the splits {listing(source.readers)}, and there is no such file or folder"
    raise InputError(f'{key}: "{source.place}" has no split "{bare}"; it has {there}')


def default_split(source: Source, key: str, names: Iterable[str] = ("test", "validation")) -> str:
    """The first of the names that there is, else the only split there is.

    Args:
        source: where the splits are.
        key: the flag or the config's key that would choose another, for messages.
        names: of splits.

    Raises:
        InputError: it has several others.
    """
    for name in names:
        if source.find(name):
            return name
    if len(source.readers) == 1:
        return next(iter(source.readers))
    raise InputError(f'{key}: "{source.place}" has {listing(source.readers)}; name one of them')
