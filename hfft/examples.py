"""Examples become model inputs the same way in every process, worker and resumed run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset


class Rows(Protocol):
    """What is indexed: a `datasets.Dataset`, or anything like it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class ExampleDataset(Dataset[dict[str, Any]]):
    """Transforms one example at a time, each under a seed of its own.

    Random augmentation depends on the seed, the epoch and the example's index alone. How many
    processes and workers there are, what was prefetched when a run was killed, and where it was
    resumed make no difference; and the model's own random numbers (dropout) are left untouched.

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
        transform: Callable[[Mapping[str, Any]], dict[str, Any]],
        seed: int = 0,
        views: int | None = None,
        split: Any = None,
    ) -> None:
        self.rows = rows
        self.transform = transform
        self.seed = seed
        self.views = views
        self.split = split
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
        with seeded(self.seed, number, index):
            return self.transform(self.rows[index])


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
