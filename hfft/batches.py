"""Batches of texts of like lengths, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from hfft.errors import InputError

_BUCKET = 2
"""Lengths are rounded up to a multiple of it: texts of one bucket change places in each epoch."""


class TokenBatches(Sampler[list[int]]):
    """Yields batches whose number of examples times their longest is within a budget.

    The field calls it bucketing; fairseq's `--max-tokens` is the same budget. Which lengths meet
    in a batch is fixed, so that every epoch has as many batches; which examples of a length do,
    and in which order batches come, is drawn anew in each epoch from its number and the seed
    alone, alike in every process. accelerate deals the batches out to processes; their number is
    a multiple of that of processes.

    Args:
        lengths: (N,) tokens of each example.
        budget: tokens of a batch, padding included.
        seed: of the draws.
        processes: that share the batches.

    Raises:
        InputError: an example is longer than the budget.
    """

    # Read by accelerate: no two batches need be of one size, and none is left out.
    batch_size: int | None = None
    drop_last = False

    def __init__(
        self, lengths: npt.NDArray[np.int64], budget: int, *, seed: int, processes: int = 1
    ) -> None:
        if (most := int(lengths.max())) > budget:
            raise InputError(
                f"batch_tokens: {budget} tokens hold no example of {most}; give at least {most}, "
                f"or lower task.max_length"
            )
        self._rounded = np.minimum(-(-lengths // _BUCKET) * _BUCKET, budget)
        self._sizes = _sizes(np.sort(self._rounded)[::-1], budget, processes)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the number of passes completed."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch, of all processes together."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the places of each batch's examples."""
        random = np.random.default_rng((self._seed, self._epoch))
        order = np.lexsort((random.random(len(self._rounded)), -self._rounded))
        batches = np.split(order, np.cumsum(self._sizes)[:-1])
        for number in random.permutation(len(batches)):
            yield batches[number].tolist()


class GroupedByLength(LengthGroupedSampler):
    """transformers' sampler, but alike in every process and in every resumed run.

    Args:
        batch_size: examples of an optimizer step.
        lengths: (N,) tokens of each example.
        seed: of the draws.
    """

    def __init__(self, batch_size: int, lengths: npt.NDArray[np.int64], *, seed: int) -> None:
        self._seed = seed
        super().__init__(batch_size, lengths=lengths.tolist(), generator=torch.Generator())
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the number of passes completed."""
        seed = np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0]
        self.generator.manual_seed(int(seed))


def _sizes(descending: npt.NDArray[np.int64], budget: int, processes: int) -> list[int]:
    """Return how many examples, from the longest on, each batch takes."""
    sizes: list[int] = []
    start = 0
    while start < len(descending):
        sizes.append(min(budget // int(descending[start]), len(descending) - start))
        start += sizes[-1]
    while len(sizes) % processes:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[largest] == 1:
            raise InputError(
                f"batch_tokens: {len(sizes)} batches of one example can't be dealt out to "
                f"{processes} processes; give more data, or fewer processes"
            )
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [sizes[largest] - half, half]
    return sizes
