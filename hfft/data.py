"""Data: found, read, split, checked and named as the task wants it.

Everything that can be wrong with the data is found here, before any weight is loaded, and as
much of it as possible is reported at once.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import datasets

from hfft import labels as labelling
from hfft.data_sources import Source, default_split, find_source
from hfft.data_splits import Part, Request, read_part
from hfft.errors import InputError
from hfft.labels import Ids, counted, listing
from hfft.roles import Column, Needs, unknown_roles

if TYPE_CHECKING:
    from hfft.sections import DataConfig

__all__ = ["Column", "LoadedData", "Needs", "load_data", "load_scored", "load_split"]

HELD_OUT = 0.1
"""The share of every class that is held out where the config names no validation data."""


@dataclass(frozen=True)
class LoadedData:
    """Checked data.

    Attributes:
        splits: "train", "validation" and, if asked for, "test"; columns named by their roles.
        labels: class names in the model's order; None for a task without a label column.
        notes: sentences for the user: what was held out, what was left out, what looks odd.
        skipped: the undecodable files that were left out.
        fingerprints: of each split; changes with its files (path, size, time of change), with the
            choice of rows, and with their labels.
    """

    splits: datasets.DatasetDict
    labels: list[str] | None
    notes: list[str]
    skipped: list[str]
    fingerprints: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """Of all splits together."""
        return hashlib.sha256(repr(sorted(self.fingerprints.items())).encode()).hexdigest()


def load_data(config: DataConfig, needs: Needs, *, seed: int) -> LoadedData:
    """Finds, reads, splits and checks the data that a config names.

    Args:
        config: the config's `data` section.
        needs: what the task wants of it.
        seed: decides which examples are held out where `config.validation` is left out.

    Raises:
        InputError: all that is wrong with the data, as far as it can be told at once.
    """
    _quiet()
    problems: list[str] = []
    request = Request(needs, config.columns, config.on_bad_example == "skip", problems)
    problems += unknown_roles(needs, config.columns)
    source = request.collect(find_source, config.path, "data.path", config.subset)
    choices = {"train": config.train, "validation": config.validation, "test": config.test}
    asked = {name: choice for name, choice in choices.items() if choice is not None and source}
    read = {
        name: request.collect(read_part, source, choice, f"data.{name}", request)
        for name, choice in asked.items()
    }
    parts = {name: part for name, part in read.items() if part}
    rows = {name: part.good for name, part in parts.items()}
    problems += _differing_roles(parts)
    names = _agree_on_labels(parts, rows, problems)
    notes = _oddities(parts, names or [])
    skipped = [path for part in parts.values() for path in part.bad.values() if path]
    if config.validation is None and "train" in parts and not problems:
        rows["train"], rows["validation"] = _hold_out(parts["train"], names, seed, problems)
        notes.append(_held_out_note(source, rows, parts["train"].classes is not None))
        parts["validation"] = parts["train"]
    if problems:
        raise InputError(dict.fromkeys(problems))
    chosen = {name: (parts[name], rows[name]) for name in choices if name in parts}
    splits = {n: _finish(part, request.label, names).select(r) for n, (part, r) in chosen.items()}
    fingerprints = {name: _fingerprint(*one, names) for name, one in chosen.items()}
    return LoadedData(datasets.DatasetDict(splits), names, notes, skipped, fingerprints)


def load_scored(config: DataConfig, needs: Needs, known: Sequence[str]) -> LoadedData:
    """Reads and checks data that a model is scored on, and that nothing is trained on.

    Args:
        config: a `data` section. Its split is `validation`, or `test`; left out: validation, else
            test, else the only one there is.
        needs: what the task wants of it.
        known: the classes to go by, if all that are found are among them; else by those found.

    Returns:
        The split, as "validation".

    Raises:
        InputError: as for `load_data`.
    """
    _quiet()
    problems: list[str] = []
    request = Request(needs, config.columns, config.on_bad_example == "skip", problems)
    problems += unknown_roles(needs, config.columns)
    source = find_source(config.path, "data.path", config.subset)
    key = "data.validation" if config.test is None else "data.test"
    choice = config.validation or config.test
    choice = choice or default_split(source, key, ("validation", "test"))
    part = read_part(source, choice, key, request)
    names = _own_classes(part, known) if part.labels else None
    if problems:
        raise InputError(dict.fromkeys(problems))
    return LoadedData(
        splits=datasets.DatasetDict(
            {"validation": _finish(part, request.label, names).select(part.good)}
        ),
        labels=names,
        notes=_oddities({"validation": part}, names or []),
        skipped=[path for path in part.bad.values() if path],
        fingerprints={"validation": _fingerprint(part, part.good, names)},
    )


def load_split(
    path: str,
    split: str | None,
    needs: Needs,
    *,
    labels: list[str] | None,
    open_classes: bool = False,
    chosen: Mapping[str, str] | None = None,
    on_bad_example: Literal["error", "skip"] = "error",
) -> datasets.Dataset:
    """Reads one split for a trained model, by the same rules as its training data.

    Args:
        path: as `data.path`.
        split: as `data.test`; None: test, else validation, else the only split there is.
        needs: what the task wants of it.
        labels: the model's classes, by whose order the label column is encoded; None leaves it
            as it is.
        open_classes: whether the data may have other classes, by whose order it is encoded then.
        chosen: role to column, as `data.columns`.
        on_bad_example: as `data.on_bad_example`.

    Raises:
        InputError: as for `load_data`, and for labels that the model doesn't have.
    """
    _quiet()
    problems: list[str] = []
    request = Request(needs, chosen or {}, on_bad_example == "skip", problems)
    problems += unknown_roles(needs, request.chosen)
    source = find_source(path, "--data")
    part = read_part(source, split or default_split(source, "--split"), "--split", request)
    if part.labels and open_classes:
        labels = _own_classes(part, labels or ())
    elif part.labels and labels is not None:
        part.ids = labelling.recode(part.labels, labels)
        if part.labels.names and not set(part.labels.names) & set(labels):
            problems.append(
                f"--data: no label in {part.place} ({listing(part.labels.names)}) is one of the "
                f"model's ({listing(labels)}); the two must name their classes alike"
            )
        else:
            problems += labelling.unknown_problems(part.labels, part.ids, "the model", part.place)
    if problems:
        raise InputError(dict.fromkeys(problems))
    return _finish(part, request.label, labels).select(part.good)


def _own_classes(part: Part, known: Sequence[str]) -> list[str]:
    """Encode labels by the known classes, if all that are found are among them; else by those."""
    assert part.labels is not None
    found = labelling.classes_of(part.labels, part.good)
    names = list(known) if set(found) <= {*known} else found
    part.ids = labelling.recode(part.labels, names)
    return names


def _quiet() -> None:
    """Bars are for terminals; in a log file each of their steps is a line."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _differing_roles(parts: Mapping[str, Part]) -> list[str]:
    """Splits of other roles than the training split's, which a model would find unlike it."""
    problems = []
    for name in parts.keys() - {"train"} if "train" in parts else ():
        here, taught = parts[name].dataset.column_names, parts["train"].dataset.column_names
        if {*here} != {*taught}:
            problems.append(
                f"{parts[name].place}: has columns for {', '.join(here)}, but data.train for "
                f"{', '.join(taught)}; give both the same, or map them in data.columns"
            )
    return problems


def _agree_on_labels(
    parts: Mapping[str, Part], rows: Mapping[str, Ids], problems: list[str]
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


def _oddities(parts: Mapping[str, Part], names: list[str]) -> list[str]:
    """What is no error and yet worth a sentence."""
    notes = [
        f"{part.place}: left out {len(part.bad)} of {len(part.dataset)} examples, which are "
        "undecodable or incomplete."
        for part in parts.values()
        if part.bad
    ] + [note for part in parts.values() for note in part.notes]
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
    part: Part, names: list[str] | None, seed: int, problems: list[str]
) -> tuple[Ids, Ids]:
    rows = part.good
    ids = None if part.classes is None else part.classes[rows]
    if ids is not None:
        problems += labelling.lone_problems(ids, names or [], part.place)
    elif len(rows) < 2:
        problems.append(f"{part.place}: a single example, so none can be held out for validation")
    if problems:
        return rows, rows
    kept, out = labelling.hold_out(ids, len(rows), HELD_OUT, seed)
    return rows[kept], rows[out]


def _held_out_note(source: Source | None, rows: Mapping[str, Ids], by_class: bool) -> str:
    there = source.find("validation") if source else None
    held, total = len(rows["validation"]), len(rows["validation"]) + len(rows["train"])
    said = f"data.validation is left out: held out {held} of the {total} training examples"
    said += ", the same share of every class." if by_class else "."
    return said + (f" The data has a split for that: data.validation: {there}" if there else "")


def _finish(part: Part, label: str | None, names: list[str] | None) -> datasets.Dataset:
    if label is None or names is None or part.labels is None or part.ids is None:
        return part.dataset
    return labelling.encode(part.dataset, label, part.ids, names, part.labels.lengths)


def _fingerprint(part: Part, rows: Ids, names: list[str] | None) -> str:
    spans = [(start, end) for _, start, end in part.ranges]
    identity = "\n".join([repr(names), repr(spans), *part.identity])
    digest = hashlib.sha256(identity.encode(errors="surrogateescape"))
    for numbers in (rows, part.ids, part.labels.lengths if part.labels else None):
        digest.update(b"" if numbers is None else numbers.tobytes())
    return digest.hexdigest()
