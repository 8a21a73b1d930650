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
    """

    def __init__(
        self, rows: Rows, transform: Callable[[Mapping[str, Any]], dict[str, Any]], seed: int = 0
    ) -> None:
        self.rows = rows
        self.transform = transform
        self.seed = seed
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
        with seeded(self.seed, int(self._epoch), index):
            return self.transform(self.rows[index])


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
