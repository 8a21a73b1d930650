"""One split, checked: its columns by the roles a task gives them, and the rows that are bad."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from hfft import labels as labelling
from hfft import texts
from hfft.audio import SOUNDS, check_sounds
from hfft.data_readers import stamp
from hfft.data_sources import Source, choose
from hfft.errors import InputError
from hfft.images import IMAGES, check_images
from hfft.labels import Ids, LabelColumn
from hfft.media import Medium, stats
from hfft.roles import Kind, Needs, match_roles

T = TypeVar("T")

_SHOWN = 10
"""How many bad files or rows a message lists before it only counts the rest."""

_LABELS: Collection[Kind] = ("label", "labels", "tags")
"""Kinds of column that hold names of classes."""

_OUTSIDE = "O"
"""The tag of words that are part of nothing."""

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Request:
    """What is wanted of every split, and what was found wrong so far."""

    needs: Needs
    chosen: Mapping[str, str]
    skip: bool
    problems: list[str]

    @property
    def label(self) -> str | None:
        """The role of the label column, for a task that has one."""
        columns = self.needs.columns.items()
        return next((role for role, column in columns if column.kind in _LABELS), None)

    def collect(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Calls the function; the user's errors in it are kept for later."""
        try:
            return function(*arguments)
        except InputError as error:
            self.problems.extend(error.messages)
            return None

    def lose(self, part: Part, rows: Mapping[int, str], said: str) -> None:
        """Leaves bad rows out, if that was asked for; else they are an error."""
        part.flawed.update(rows)
        if rows and self.skip:
            part.bad.update({row: path or part.bad.get(row, "") for row, path in rows.items()})
        elif rows:
            self.problems.append(said + "; or leave them out with data.on_bad_example: skip")


@dataclass
class Part:
    """A chosen split, all its rows, and what is known about them.

    Attributes:
        dataset: its columns by role.
        place: the key that chose it and where it is, to begin messages with.
        identity: lines that tell it from another.
        ranges: for each piece of it, as `choose` returns them.
        base: the folder that paths in it are relative to.
        flawed: rows with something wrong.
        bad: those of them that are left out, and their file, if one was undecodable.
        files: its images and sounds, by device and inode.
        labels: its label column.
        ids: each label's number by the classes agreed upon.
        notes: what is no error and yet worth a sentence.
    """

    dataset: datasets.Dataset
    place: str
    identity: list[str]
    ranges: list[tuple[str, int, int]]
    base: Path | None = None
    flawed: set[int] = field(default_factory=set)
    bad: dict[int, str] = field(default_factory=dict)
    files: dict[tuple[int, int], str] = field(default_factory=dict)
    labels: LabelColumn | None = None
    ids: Ids | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> Ids:
        """Rows that aren't left out, ascending."""
        return self._without(self.bad)

    @property
    def sound(self) -> Ids:
        """Rows with nothing wrong, ascending."""
        return self._without(self.flawed)

    @property
    def classes(self) -> Ids | None:
        """(N,) each example's class, where it has just one."""
        return self.ids if self.labels and self.labels.lengths is None else None

    def _without(self, rows: Collection[int]) -> Ids:
        return np.setdiff1d(np.arange(len(self.dataset)), np.array([*rows], dtype=np.int64))


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
    needs = request.needs
    found = match_roles(needs, request.chosen, read.dataset.column_names, read.place)
    chosen = read.dataset.select_columns(list(found.values()))
    dataset = chosen.rename_columns({old: role for role, old in found.items()})
    identity = [*read.identity, repr(found)]
    part = Part(dataset, f"{key}, {read.place}", identity, ranges, read.base)
    fits = True
    for role, old in found.items():
        try:
            _TAKE[needs.columns[role].kind](part, role, request)
        except InputError as error:
            fits = False
            place = f'data.columns.{role}: column "{old}" of {read.place}'
            request.problems.extend(f"{place} {message}" for message in error.messages)
    if fits and needs.flaws is not None:
        _look_through(part, needs.flaws, request)
    if len(part.bad) == len(dataset):
        raise InputError(f"{part.place}: no usable example is left, all are left out")
    return part


def _take_images(part: Part, role: str, request: Request) -> None:
    part.dataset = IMAGES.as_column(part.dataset, role, part.base)
    _lose_undecodable(part, role, IMAGES, check_images(part.dataset, role), request)


def _take_sounds(part: Part, role: str, request: Request) -> None:
    part.dataset = SOUNDS.as_column(part.dataset, role, part.base)
    flaws, heard = check_sounds(part.dataset, role)
    _lose_undecodable(part, role, SOUNDS, flaws, request)
    rates, limit = heard.rates, request.needs.columns[role].seconds
    if limit is not None and (longer := [s for s in heard.seconds if s > limit]):
        part.notes.append(
            f"{part.place}: {len(longer)} of {len(heard.seconds)} sounds last longer than "
            f"task.max_seconds ({limit:g}), up to {max(longer):.1f} s: truncated."
        )
    if len(rates) > 1:
        part.notes.append(
            f"{part.place}: sounds of {min(rates):,} to {max(rates):,} samples a second; all are "
            f"brought to the model's rate, but those of a lower one have nothing above half of it."
        )


def _lose_undecodable(
    part: Part, role: str, medium: Medium, flaws: list[tuple[int, str, str]], request: Request
) -> None:
    said = f"{part.place}: {len(flaws)} of {len(part.dataset)} {medium.noun}s can't be decoded:"
    lines = _lines(f"{path}: {reason}" for _, path, reason in flaws)
    rows = {row: path for row, path, _ in flaws}
    request.lose(part, rows, f"{said}{lines}\n  Mend or remove them")
    for path, status in stats(part.dataset, role):
        part.files[status.st_dev, status.st_ino] = path
        part.identity.append(stamp(path, status))


def _take_text(part: Part, role: str, request: Request) -> None:
    blank = request.needs.columns[role].blank
    part.dataset, flaws = texts.as_text_column(part.dataset, role, blank=blank)
    _lose_missing(part, role, flaws, request)


def _take_label(part: Part, role: str, request: Request) -> None:
    part.labels = labelling.read_labels(part.dataset, role)
    _lose_missing(part, role, part.labels.missing.tolist(), request)


def _take_labels(part: Part, role: str, request: Request) -> None:
    part.labels = labelling.read_label_lists(part.dataset, role)
    if labelling.is_multi_hot(part.labels):
        raise InputError(
            "holds lists of 0 and 1 for every class, not lists of the names of those that apply; "
            'name them, as in ["action", "comedy"]'
        )
    _lose_missing(part, role, part.labels.missing.tolist(), request)


def _take_tags(part: Part, role: str, request: Request) -> None:
    part.labels = labelling.read_label_lists(part.dataset, role, first=_OUTSIDE)
    empty = np.flatnonzero(part.labels.lengths == 0)
    _lose_missing(part, role, np.union1d(part.labels.missing, empty).tolist(), request)


def _take_formed(
    form: Callable[[datasets.Dataset, str], texts.Formed],
) -> Callable[[Part, str, Request], None]:
    def take(part: Part, role: str, request: Request) -> None:
        part.dataset, flaws = form(part.dataset, role)
        _lose_flawed(part, f"have no usable {role}", flaws, request)

    return take


_TAKE: Mapping[Kind, Callable[[Part, str, Request], None]] = {
    "image": _take_images,
    "audio": _take_sounds,
    "text": _take_text,
    "label": _take_label,
    "labels": _take_labels,
    "tags": _take_tags,
    "captions": _take_formed(texts.as_captions_column),
    "number": _take_formed(texts.as_number_column),
    "words": _take_formed(texts.as_words_column),
    "answers": _take_formed(texts.as_answers_column),
    "messages": _take_formed(texts.as_messages_column),
}


def _look_through(
    part: Part, find: Callable[[Mapping[str, list[Any]]], list[str]], request: Request
) -> None:
    """Has the task look at every example in which nothing is wrong so far."""
    rows, values = part.sound, part.dataset.with_format(None)
    flaws: dict[int, str] = {}
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        index = rows[start : start + _ROWS_AT_ONCE].tolist()
        found = find(values[index] | {"index": index})
        flaws.update({row: flaw for row, flaw in zip(index, found, strict=True) if flaw})
    _lose_flawed(part, "can't be used", flaws, request)


def _lose_missing(part: Part, role: str, rows: Collection[int], request: Request) -> None:
    shown = ", ".join(map(str, [*rows][:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
    share = f"{len(rows)} of {len(part.dataset)} examples have no {role}"
    said = f"{part.place}: {share}: rows {shown} (the first is 0). Give them one"
    request.lose(part, dict.fromkeys(rows, ""), said)


def _lose_flawed(part: Part, what: str, flaws: Mapping[int, str], request: Request) -> None:
    said = f"{part.place}: {len(flaws)} of {len(part.dataset)} examples {what}:"
    lines = _lines(f"row {row} {flaw}" for row, flaw in flaws.items())
    said += f"{lines}\n  (the first row is 0). Mend or remove them"
    request.lose(part, dict.fromkeys(flaws, ""), said)


def _lines(said: Iterable[str]) -> str:
    """The first few, each on a line of its own, and how many more there are."""
    every = list(said)
    lines = [f"\n  {one}" for one in every[:_SHOWN]]
    return "".join(lines) + (f"\n  and {len(every) - _SHOWN} more" if every[_SHOWN:] else "")
