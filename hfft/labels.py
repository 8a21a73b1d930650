"""Class names: read from whatever a label column holds, sorted naturally, checked, encoded.

A class's number is its place in the list of names, and that list travels with the model. So the
order has to be one that people expect (1, 2, 10) and the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hfft.columns import described, replace_column
from hfft.errors import InputError

Ids = npt.NDArray[np.int64]

MISSING = -1
"""The number of an example without a label; the Hub's own convention for unlabelled tests."""

UNKNOWN = -2
"""The number of an example whose class isn't among the names."""

_SHOWN = 10
"""How many names a message lists before it only counts the rest."""


@dataclass(frozen=True)
class LabelColumn:
    """A label column as it was found.

    Attributes:
        names: its class names; in declared order for a `ClassLabel`, else naturally sorted.
        ids: (N,) each label's place in `names`, or `MISSING`; one after another for lists.
        declared: whether the data states its classes, even those without an example.
        lengths: of each example's list of labels, or `MISSING`; None: an example has one label.
    """

    names: list[str]
    ids: Ids
    declared: bool = False
    lengths: Ids | None = None

    @property
    def missing(self) -> Ids:
        """Examples that lack a label or, for lists, any part of them; ascending."""
        missing: Ids = self._examples[self.ids == MISSING]
        if self.lengths is not None:
            missing = np.union1d(missing, np.flatnonzero(self.lengths == MISSING))
        return missing

    def places(self, rows: Ids) -> Ids:
        """Where the labels of these examples stand in `ids`."""
        return rows if self.lengths is None else np.flatnonzero(np.isin(self._examples, rows))

    @property
    def _examples(self) -> Ids:
        """(L,) the example that each label is of."""
        lengths = np.ones_like(self.ids) if self.lengths is None else self.lengths
        return np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))


def natural_sort(names: Iterable[str]) -> list[str]:
    """Sorts names as people do: 1, 2, 10; upper and lower case together."""
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    if re.fullmatch(r"-?\d+", name):
        return [(0, int(name), "")], name
    pieces = [piece for piece in re.split(r"(\d+)", name.casefold()) if piece]
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces], name


def listing(names: Iterable[str]) -> str:
    """Names for a message, quoted; past the tenth they are only counted."""
    quoted = [f'"{name}"' for name in names]
    rest = len(quoted) - _SHOWN
    return ", ".join(quoted[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int) -> str:
    """A number of examples, for a message."""
    return f"{number} example" if number == 1 else f"{number} examples"


def read_labels(dataset: datasets.Dataset, column: str) -> LabelColumn:
    """Reads class names out of strings, integers, booleans, whole floats or a `ClassLabel`.

    Blank strings and NaN count as missing, since that is how tables write a missing label.

    Raises:
        InputError: the column holds something that isn't a class name; says what.
    """
    feature = dataset.features[column]
    if isinstance(feature, datasets.List | datasets.LargeList):
        raise InputError(
            f"holds {described(feature)}, not one name of a class; for several labels an example "
            "set task.problem_type: multi_label_classification"
        )
    remedy = "; for regression set task.problem_type: regression"
    return _read(_values(dataset, column), feature, of_fractions=remedy)


def read_label_lists(
    dataset: datasets.Dataset, column: str, first: str | None = None
) -> LabelColumn:
    """Reads lists of class names, as `read_labels` does single ones.

    Args:
        dataset: any.
        column: its column to read.
        first: the class that comes before the others where they aren't declared.

    Raises:
        InputError: the column holds something else.
    """
    feature = dataset.features[column]
    if not isinstance(feature, datasets.List | datasets.LargeList):
        raise InputError(
            f"holds {described(feature)}, not a list of names of classes an example (CSV holds no "
            "lists; JSON Lines and Parquet do)"
        )
    lists = _values(dataset, column)
    lengths = pc.fill_null(pc.list_value_length(lists), MISSING).to_numpy(zero_copy_only=False)
    found = _read(pc.list_flatten(lists), feature.feature)
    names, ids = found.names, found.ids
    if first in names and not found.declared:
        names = [first, *(name for name in names if name != first)]
        ids = recode(found, names)
    return LabelColumn(names, ids, found.declared, lengths.astype(np.int64))


def _values(dataset: datasets.Dataset, column: str) -> pa.Array:
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return table.column(0).combine_chunks()


def _read(values: pa.Array, feature: Any, *, of_fractions: str = "") -> LabelColumn:
    if isinstance(feature, datasets.ClassLabel):
        ids = values.fill_null(MISSING).to_numpy(zero_copy_only=False).astype(np.int64)
        return LabelColumn(list(feature.names), ids, declared=True)
    try:
        encoded = values.dictionary_encode()
    except NotImplementedError as error:  # nested, or datasets' column of mixed types
        raise InputError(f"holds {described(feature)}, not names of classes") from error
    distinct = encoded.dictionary.to_pylist()
    found = [_class_name(value, values.type, of_fractions) for value in distinct]
    names = natural_sort({name for name in found if name is not None})
    place = {name: number for number, name in enumerate(names)}
    codes = [MISSING if name is None else place[name] for name in found]
    indices = encoded.indices.fill_null(len(codes)).to_numpy(zero_copy_only=False)
    return LabelColumn(names, np.array([*codes, MISSING], dtype=np.int64)[indices])


def _class_name(value: object, kind: object, of_fractions: str) -> str | None:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float):
        if not value.is_integer():
            raise InputError(
                f"holds fractions such as {value}, which are quantities, not names of classes"
                f"{of_fractions}"
            )
        return str(int(value))
    if isinstance(value, str | int):
        return str(value)
    raise InputError(f"holds {kind}, not names of classes")


def classes_of(column: LabelColumn, rows: Ids) -> list[str]:
    """The classes that a training column teaches: those it declares, or those met in `rows`."""
    if column.declared:
        return column.names
    met = column.ids[column.places(rows)]
    return [column.names[number] for number in np.unique(met[met >= 0])]


def recode(column: LabelColumn, names: Sequence[str]) -> Ids:
    """Each label's place in `names`, with `MISSING` and `UNKNOWN` for the others."""
    place = {name: number for number, name in enumerate(names)}
    codes = [place.get(name, UNKNOWN) for name in column.names]
    return np.array([*codes, MISSING], dtype=np.int64)[column.ids]


def encode(
    dataset: datasets.Dataset, column: str, ids: Ids, names: list[str], lengths: Ids | None = None
) -> datasets.Dataset:
    """Replaces the column by a `ClassLabel` over `names`, or lists of these.

    Args:
        dataset: any.
        column: its column to replace.
        ids: each label's place in `names`; `UNKNOWN` becomes `MISSING`.
        names: the classes.
        lengths: of the lists, as in `LabelColumn`.
    """
    numbers, feature = np.where(ids < 0, MISSING, ids), datasets.ClassLabel(names=names)
    if lengths is None:
        return replace_column(dataset, column, numbers, feature)
    ends = np.cumsum([0, *np.maximum(lengths, 0)], dtype=np.int32)
    lists = pa.ListArray.from_arrays(ends, numbers)
    return replace_column(dataset, column, lists, datasets.List(feature))


def class_problems(ids: Ids, names: Sequence[str], place: str) -> list[str]:
    """What forbids to learn these classes from these examples: a class without any, or only one.

    Args:
        ids: (N,) the training examples' classes; negative ones are left out of account.
        names: every class.
        place: the config's key and where the examples are from, to begin each message with.
    """
    counts = np.bincount(ids[ids >= 0], minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if not counts.any():
        return [f"{place}: no labelled example is left"]
    if len(names) - len(empty) == 1:
        only = names[int(counts.argmax())]
        return [
            f'{place}: every example is of one class, "{only}"; there is nothing to tell apart. '
            "Add examples of another class, or choose another slice: sorted data starts with one"
        ]
    if empty:
        return [
            f"{place}: no example of {listing(empty)}, out of {len(names)} classes. Add some or "
            "remove the class; a slice of sorted data also loses whole classes: leave "
            "data.validation out and a share of every class is held out"
        ]
    return []


def list_problems(ids: Ids, names: Sequence[str], bare: int, place: str) -> list[str]:
    """What forbids to learn these classes from lists of them; rare ones may be without example.

    Args:
        ids: (L,) the training examples' labels; negative ones are left out of account.
        names: every class.
        bare: how many of the examples have no label, which is something to tell apart too.
        place: as for `class_problems`.
    """
    met = np.unique(ids[ids >= 0])
    if not met.size:
        return [f"{place}: no labelled example is left"]
    if met.size == 1 and not bare:
        return [
            f'{place}: every label is "{names[met[0]]}"; there is nothing to tell apart. Add '
            "examples of another class, or choose another slice"
        ]
    return []


def is_multi_hot(column: LabelColumn) -> bool:
    """Whether lists say 0 or 1 of every class, instead of naming those that apply."""
    said = (column._examples * len(column.names) + column.ids)[column.ids != MISSING]
    twice = len(np.unique(said)) < len(said)
    return twice and {*column.names} <= {"0", "1", "False", "True"}


def unknown_problems(column: LabelColumn, ids: Ids, known: str, place: str) -> list[str]:
    """Labels that aren't among the known classes, named, with how often each is there."""
    counts = np.bincount(column.ids[ids == UNKNOWN], minlength=len(column.names))
    unknown = [
        f'"{name}" ({counted(int(count)) if column.lengths is None else f"{count} times"})'
        for name, count in zip(column.names, counts, strict=True)
        if count
    ]
    if not unknown:
        return []
    rest = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return [f"{place}: labels that {known} doesn't have: {', '.join(unknown[:_SHOWN])}{rest}"]


def lone_problems(ids: Ids, names: Sequence[str], place: str) -> list[str]:
    """Classes with a single example, of which none can be held out for validation."""
    counts = np.bincount(ids, minlength=len(names))
    lone = [name for name, count in zip(names, counts, strict=True) if count == 1]
    if not lone:
        return []
    return [
        f"{place}: a single example of {listing(lone)}, so none can be held out for validation. "
        "Add examples, or name validation data in data.validation"
    ]


def agree(
    columns: Mapping[str, LabelColumn], rows: Mapping[str, Ids], places: Mapping[str, str]
) -> tuple[list[str], dict[str, Ids], list[str]]:
    """Settles the classes by the training split and numbers every split by them.

    Args:
        columns: split name to its labels; "train" is among them.
        rows: split name to the examples that count.
        places: split name to the config's key and where the examples are from.

    Returns:
        The classes; split name to the number of each of its labels; what is wrong.
    """
    train, place = columns["train"], places["train"]
    names = classes_of(train, rows["train"])
    ids = {split: recode(column, names) for split, column in columns.items()}
    taught = ids["train"][train.places(rows["train"])]
    if train.lengths is None:
        problems = class_problems(taught, names, place)
    else:
        bare = int(np.sum(train.lengths[rows["train"]] == 0))
        problems = list_problems(taught, names, bare, place)
    for split in columns.keys() - {"train"}:
        problems += unknown_problems(columns[split], ids[split], "data.train", places[split])
    return names, ids, problems


def lookalikes(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that differ in nothing but case and spaces: most often a slip."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(name.casefold().split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def hold_out(ids: Ids | None, count: int, share: float, seed: int) -> tuple[Ids, Ids]:
    """Parts `count` examples in two, at random but the same for the same seed.

    Args:
        ids: (count,) classes, each of which gives its share and at least one; None: no classes.
        count: how many examples there are.
        share: the fraction to hold out, between 0 and 1.
        seed: for numpy's generator.

    Returns:
        Rows kept and rows held out, both ascending.

    Raises:
        ValueError: a class, or the whole, has a single example.
    """
    random = np.random.default_rng(seed)
    classes = np.zeros(count, dtype=np.int64) if ids is None else ids
    held: list[Ids] = []
    for number in np.unique(classes):
        rows = np.flatnonzero(classes == number)
        if len(rows) < 2:
            raise ValueError("one example can't be parted in two")
        held.append(random.permutation(rows)[: max(1, round(share * len(rows)))])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(count), out, assume_unique=True), out
