"""Which stages of a trial store features: an estimate of time and space, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfft.features.cut import Cut
from hfft.processes import has_accelerator

# Orders of magnitude, which is all that the choice depends on.
_FLOPS = 2e13  # per second, of a GPU
_FLOPS_OF_A_CORE = 2.5e10
_DECODING = 25e-9  # seconds a value of an image, after it is resized
_WRITING = 4e8  # bytes a second
_READING = 2e9  # most of it from the page cache


@dataclass(frozen=True)
class Candidate:
    """A stage that could store features, and what that would come to.

    Attributes:
        cut: of the model.
        frozen: names of the parameters below the cut.
        lower: why the cut is not where the learning part begins; empty: it is.
        splits: that can be stored.
        visits: examples that the stage runs in all.
        examples: different ones among them.
        seconds: to prepare an example and run it up to the cut.
        bytes: stored of an example.
    """

    cut: Cut
    frozen: frozenset[str]
    lower: str
    splits: tuple[str, ...]
    visits: float
    examples: int
    seconds: float
    bytes: float

    @property
    def passes(self) -> float:
        """How often each example would be run."""
        return self.visits / self.examples

    @property
    def size(self) -> int:
        """Bytes of all examples."""
        return math.ceil(self.bytes * self.examples)


def seconds_of(flops: float, batch: Mapping[str, Tensor], cut: Cut) -> float:
    """Return roughly what it takes to prepare an example and to run it up to the cut."""
    rate = _FLOPS if has_accelerator() else _FLOPS_OF_A_CORE * torch.get_num_threads()
    decoded = sum(batch[name][0].numel() for name in cut.inputs)
    return flops / rate + decoded * _DECODING


def choose(candidates: Mapping[int, Candidate], nested: Sequence[frozenset[str]]) -> set[int]:
    """Choose the stages that store features, so that the run takes least time.

    Args:
        candidates: by stage.
        nested: what each stage of the trial keeps frozen: a pass serves a later stage whose layers
            below the cut stay as they are until then.
    """
    best = chosen = set(candidates)
    while chosen:  # one by one, past what looks worse at first
        left_out = [chosen - {n} for n in sorted(chosen)]
        chosen = min(left_out, key=lambda some: _cost(candidates, nested, some))
        if _cost(candidates, nested, chosen) <= _cost(candidates, nested, best):
            best = chosen
    return best


def fitting(
    candidates: Mapping[int, Candidate],
    nested: Sequence[frozenset[str]],
    worth: set[int],
    limit: int,
) -> set[int]:
    """Return those of the stages that have room in `limit` bytes, by what they save a byte."""
    chosen = set(worth)
    while chosen and stored_bytes(candidates, chosen) > limit:
        gains = {
            n: (_cost(candidates, nested, chosen - {n}) - _cost(candidates, nested, chosen))
            / max(1, candidates[n].size)
            for n in chosen
        }
        chosen.remove(min(chosen, key=lambda n: gains[n]))
    return chosen


def stored_bytes(candidates: Mapping[int, Candidate], chosen: set[int]) -> int:
    """Return the bytes of what some stages store; those with one cut store it once."""
    largest: dict[frozenset[str], int] = {}
    for n in chosen:
        one = candidates[n]
        largest[one.frozen] = max(one.size, largest.get(one.frozen, 0))
    return sum(largest.values())


def servers(
    candidates: Mapping[int, Candidate], nested: Sequence[frozenset[str]], chosen: set[int]
) -> dict[int, int]:
    """Return by stage whose pass over the data makes its features: its own, or an earlier one's."""
    found: dict[int, int] = {}
    for number in sorted(chosen):
        below = candidates[number].frozen
        found[number] = next(
            (
                earlier
                for earlier, server in found.items()
                if server == earlier
                and below <= candidates[earlier].frozen
                and all(below <= nested[between] for between in range(earlier, number))
            ),
            number,
        )
    return found


def _cost(
    candidates: Mapping[int, Candidate], nested: Sequence[frozenset[str]], chosen: set[int]
) -> float:
    """Return the seconds that frozen layers take in all stages."""
    total = stored_bytes(candidates, chosen) / _WRITING
    made_by = servers(candidates, nested, chosen)
    for number, one in candidates.items():
        if number not in chosen:
            total += one.visits * one.seconds
            continue
        total += one.visits * one.bytes / _READING
        if made_by[number] == number:
            total += one.examples * one.seconds
    return total


def describe(size: float) -> str:
    """Write a number of bytes for people."""
    power = min(4, int(math.log10(max(1, size)) // 3))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
