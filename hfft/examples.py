"""Examples become model inputs the same way in every process, worker and resumed run."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset


class Rows(Protocol):
    """What is indexed: a `datasets.Dataset`, or anything like it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@runtime_checkable
class Beside(Rows, Protocol):
    """Rows of two halves: what was made of an original, and the original, which several share."""

    @property
    def encoded(self) -> Rows:
        """What was made."""

    @property
    def originals(self) -> Rows:
        """The originals, each once."""

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """(N,): which of the originals each was made of."""


Transform = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Turns one example into model inputs."""


class Parts:
    """A transform whose inputs are made in parts that don't depend on one another.

    Of a pair of an image and a text either half can then be made without the other, and an image
    once for all of its texts.

    Args:
        parts: name to the transform that makes a part of the inputs.
        random: names of the parts that draw random numbers.
        originals: names of the parts that read, of rows of two halves, the originals; the others
            read what was made of these.
    """

    def __init__(
        self,
        parts: Mapping[str, Transform],
        random: Iterable[str] = (),
        originals: Iterable[str] = (),
    ) -> None:
        self.parts = dict(parts)
        self.random = frozenset(random)
        self.originals = frozenset(originals)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return an example's inputs."""
        return {name: value for part in self.parts.values() for name, value in part(row).items()}

    def only(self, names: Collection[str]) -> Parts:
        """Return the transform to some parts of the inputs."""
        kept = {name: part for name, part in self.parts.items() if name in names}
        return Parts(kept, self.random & kept.keys(), self.originals & kept.keys())

    def given(self, inputs: Mapping[str, dict[str, Any]]) -> Parts:
        """Return the transform with some parts that are the same whatever the example is."""
        same = {name: partial(_given, own) for name, own in inputs.items()}
        return Parts({**self.parts, **same}, self.random, self.originals)


def _given(inputs: dict[str, Any], _row: Mapping[str, Any]) -> dict[str, Any]:
    return inputs


def parts_of(transform: Transform) -> dict[str, Transform]:
    """Return a transform's parts; of one that has none, itself."""
    return transform.parts if isinstance(transform, Parts) else {"": transform}


class ExampleDataset(Dataset[dict[str, Any]]):
    """Transforms one example at a time, each under a seed of its own.

    Random augmentation depends on the seed, the epoch and the example's index alone. How many
    processes and workers there are, what was prefetched when a run was killed, and where it was
    resumed make no difference; and the model's own random numbers (dropout) are left untouched.
    Nor does it make a difference to one of a transform's parts whether the others are made too.

    Args:
        rows: the examples.
        transform: turns one into model inputs.
        seed: of the augmentation.
        views: in how many ways each example is augmented; each epoch draws one of them for each.
            None: in another way in each epoch.
        split: what scores are computed from.
    """

    def __init__(
        self,
        rows: Rows,
        transform: Transform,
        seed: int = 0,
        views: int | None = None,
        split: Any = None,
    ) -> None:
        self.rows = rows
        self.transform = transform
        self.seed = seed
        self.views = views
        self.split = split
        self._places: npt.NDArray[np.int64] | None = None
        # in shared memory, so that workers that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Take the number of passes completed; EpochCallback calls this."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example's inputs."""
        return self.version(index, self.drawn(index))

    def drawn(self, index: int) -> int:
        """Return which version of an example this epoch sees."""
        epoch = int(self._epoch)
        if self.views is None:
            return epoch
        keys = (self.seed, epoch, index)
        return int(np.random.SeedSequence(keys).generate_state(1)[0]) % self.views

    def version(self, index: int, number: int) -> dict[str, Any]:
        """Return an example's inputs as augmented the given time."""
        row, found = self.rows[index], dict[str, Any]()
        for part in parts_of(self.transform).values():
            with seeded(self.seed, number, index):
                found |= part(row)
        return found

    def only(self, names: Collection[str]) -> ExampleDataset:
        """Return the examples with some parts of their inputs, which come in the same versions.

        Where none of them is random, there is one version; and where they read originals alone,
        one example of each original: see `place`.
        """
        if not isinstance(self.transform, Parts):
            return self
        transform, rows = self.transform.only(names), self.rows
        if isinstance(rows, Beside):
            if not transform.originals:
                return self._with(transform, rows.encoded)
            if transform.originals == transform.parts.keys() and not transform.random:
                return self._with(transform, rows.originals, rows.places)
        return self._with(transform, rows)

    def with_stand_ins(self, names: Collection[str]) -> ExampleDataset:
        """Return what `only` does with all inputs; those of the other parts are the first one's."""
        own = self.only(names)
        if not isinstance(self.transform, Parts) or not isinstance(own.transform, Parts):
            return self
        others = self.transform.parts.keys() - set(names)
        first = {name: self.only({name}).version(0, 0) for name in others}
        return self._with(own.transform.given(first), own.rows, own._places)

    def place(self, index: int) -> int:
        """Return where that is, among examples that `only` returned, which had this index."""
        return index if self._places is None else int(self._places[index])

    def _with(
        self, transform: Parts, rows: Rows, places: npt.NDArray[np.int64] | None = None
    ) -> ExampleDataset:
        views = self.views if transform.random else None
        found = ExampleDataset(rows, transform, self.seed, views, self.split)
        found._epoch, found._places = self._epoch, places
        return found


def unlike(examples: ExampleDataset, among: int = 16) -> list[dict[str, Any]]:
    """Return two examples; of texts the shortest and the longest of the first few."""
    found = [examples.version(n, 0) for n in (0, min(1, len(examples) - 1))]
    if "input_ids" not in found[0]:
        return found
    found += [examples.version(n, 0) for n in range(2, min(among, len(examples)))]
    found.sort(key=lambda example: len(example["input_ids"]))
    return [found[0], found[-1]]


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators from `keys`; put them back after."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(keys).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
