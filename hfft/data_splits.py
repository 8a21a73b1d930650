"""One split, checked: its columns by the roles a task gives them, and the rows that are bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import numpy as np

from hfft import labels as labelling
from hfft.data_sources import Read, Source, choose, did_you_mean, stamp
from hfft.errors import InputError
from hfft.images import as_image_column, check_images, image_files
from hfft.labels import Ids, LabelColumn, listing

T = TypeVar("T")

_SHOWN = 10
"""How many bad files or rows a message lists before it only counts the rest."""


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
class Request:
    """What is wanted of every split, and what was found wrong so far."""

    columns: Mapping[str, Column]
    chosen: Mapping[str, str]
    skip: bool
    problems: list[str]

    @property
    def label(self) -> str | None:
        """The role of the label column, for a task that has one."""
        return next((role for role, c in self.columns.items() if c.kind == "label"), None)

    def collect(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Calls the function; the user's errors in it are kept for later."""
        try:
            return function(*arguments)
        except InputError as error:
            self.problems.extend(error.messages)
            return None

    def lose(self, part: Part, rows: Mapping[int, str], said: str) -> None:
        """Leaves bad rows out, if that was asked for; else they are an error."""
        if rows and self.skip:
            part.bad.update({row: path or part.bad.get(row, "") for row, path in rows.items()})
        elif rows:
            self.problems.append(said + "; or leave them out with data.on_bad_example: skip")


@dataclass
class Part:
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


def check_roles(request: Request) -> None:
    """Notes the roles that the config maps and the task doesn't have."""
    for role in request.chosen.keys() - request.columns.keys():
        request.problems.append(
            f"data.columns.{role}: the task has no such column{did_you_mean(role, request.columns)}"
        )


def read_part(source: Source, choice: str, key: str, request: Request) -> Part:
    """Reads and checks one split, every example of it; bad ones go to the request.

    Args:
        source: where the splits are.
        choice: the split, slice, file or folder.
        key: the config's key or the flag that chose it, for messages.
        request: the columns that are wanted.

    Raises:
        InputError: there is no such split, it has no example, or it lacks a column.
    """
    read, ranges = choose(source, choice, key)
    if not len(read.dataset):
        raise InputError(f'{key}: "{choice}" of {read.place} holds no example')
    dataset, found = _by_role(read, request)
    part = Part(dataset, f"{key}, {read.place}", [*read.identity, repr(found)], ranges)
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


def _by_role(read: Read, request: Request) -> tuple[datasets.Dataset, dict[str, str]]:
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
        near = did_you_mean(wanted or column.names[0], there)
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


def _take_images(part: Part, role: str, base: Path | None, request: Request) -> None:
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
        part.identity.append(stamp(path, status))


def _take_text(part: Part, role: str, base: Path | None, request: Request) -> None:
    feature = part.dataset.features[role]
    if not isinstance(feature, datasets.Value) or "binary" in feature.dtype:
        raise InputError(f"holds {getattr(feature, 'dtype', feature)}, not text")
    if feature.dtype != "string":
        part.dataset = part.dataset.cast_column(role, datasets.Value("string"))
    column = part.dataset.select_columns([role]).with_format("arrow")[:].column(0)
    _lose_missing(part, role, np.flatnonzero(column.is_null()), request)


def _take_labels(part: Part, role: str, base: Path | None, request: Request) -> None:
    part.labels = labelling.read_labels(part.dataset, role)
    _lose_missing(part, role, np.flatnonzero(part.labels.ids == labelling.MISSING), request)


def _lose_missing(part: Part, role: str, rows: Ids, request: Request) -> None:
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
    share = f"{len(rows)} of {len(part.dataset)} examples have no {role}"
    said = f"{part.place}: {share}: rows {shown} (the first is 0). Give them one"
    request.lose(part, dict.fromkeys(rows.tolist(), ""), said)
