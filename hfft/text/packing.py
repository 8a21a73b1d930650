"""Several texts in one row, so that hardly anything is padding, and none of them sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig

from hfft.text.inputs import IGNORED, Padding

Integers = npt.NDArray[np.int64]


def pack(lengths: npt.ArrayLike, capacity: int) -> list[Integers]:
    """Return which texts make up each row; the same lengths make up the same rows.

    From the longest to the shortest, each goes where it leaves the least room, else into a row of
    its own (best-fit decreasing). Lengths are few, so all texts of one length are placed at once in
    rows of one size: a million take a second.

    Args:
        lengths: (N,) tokens of each text, 1 or more.
        capacity: the tokens that a row holds.

    Raises:
        ValueError: a text is empty, or longer than a row.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.size == 0:
        return []
    if tokens.min() < 1 or tokens.max() > capacity:
        raise ValueError(
            f"lengths from {tokens.min()} to {tokens.max()} don't fit into rows of {capacity}"
        )
    row_of = np.empty(tokens.size, dtype=np.int64)
    rows = _Rows(capacity)
    longest_first = np.argsort(-tokens, kind="stable")
    sizes, counts = np.unique(tokens, return_counts=True)
    start = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        row_of[longest_first[start : start + count]] = rows.place(size, count)
        start += count
    return np.split(np.argsort(row_of, kind="stable"), np.cumsum(np.bincount(row_of))[:-1])


def join_examples(examples: Sequence[Mapping[str, Any]]) -> dict[str, Integers]:
    """Return one row of several examples: (T,) `input_ids`, `labels` and `position_ids`.

    Positions start anew with each example.
    """
    row = _joined(examples, ("input_ids", "labels"))
    lengths = [len(example["input_ids"]) for example in examples]
    return row | {"position_ids": np.concatenate([np.arange(length) for length in lengths])}


@dataclass(frozen=True)
class RowCollator:
    """Batches rows of one example each, or of several, told apart by `position_ids` alone.

    transformers' attention masks separate examples where positions start anew, but only without an
    attention mask and without a cache. Padding has position 0 throughout there: each of its tokens
    is an example of its own. Flash attention does so in a single row only, without padding.

    Attributes:
        single: pads rows of one example.
        several: pads rows of several.
        flat: whether rows of several are joined to one.
    """

    single: Padding
    several: Padding
    flat: bool

    @classmethod
    def of(cls, pad: int, config: PretrainedConfig) -> RowCollator:
        """Pad on the right, whatever the tokenizer does: positions count from the left."""
        attention = str(getattr(config, "_attn_implementation", None))
        return cls(
            single=Padding("right", {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}),
            several=Padding("right", {"input_ids": pad, "labels": IGNORED, "position_ids": 0}),
            flat="flash" in attention,
        )

    def __call__(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return tensors of shape (B, T); B is 1 for rows joined to one."""
        if "position_ids" not in inputs[0]:
            return dict(self.single(inputs))
        rows = [_joined(inputs, tuple(self.several.values))] if self.flat else inputs
        return {**self.several(rows), "use_cache": False}


def _joined(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Integers]:
    return {name: np.concatenate([row[name] for row in rows]) for name in names}


class _Rows:
    """Rows by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._number = 0
        self._by_room: dict[int, list[Integers]] = {}
        self._rooms: list[int] = []  # those with rows, ascending

    def place(self, size: int, count: int) -> Integers:
        """Place `count` texts of one size; return the (count,) rows that take them."""
        taken = [np.empty(0, dtype=np.int64)]
        while count:
            nearest = bisect_left(self._rooms, size)
            if nearest < len(self._rooms):
                room = self._rooms[nearest]
                rows = self._take(room)
            else:
                room = self._capacity
                rows = self._new(-(-count // (room // size)))
            each = room // size  # a row that a text fits best, its equals fit best until it is full
            full, rest = divmod(min(count, each * len(rows)), each)
            taken += [np.repeat(rows[:full], each), np.repeat(rows[full : full + 1], rest)]
            count -= each * full + rest
            self._put(room - each * size, rows[:full])
            self._put(room - rest * size, rows[full : full + 1])
            self._put(room, rows[full + 1 :])
        return np.concatenate(taken)

    def _new(self, count: int) -> Integers:
        self._number += count
        return np.arange(self._number - count, self._number)

    def _take(self, room: int) -> Integers:
        self._rooms.remove(room)
        return np.concatenate(self._by_room.pop(room))

    def _put(self, room: int, rows: Integers) -> None:
        if not len(rows) or not room:
            return
        if room not in self._by_room:
            insort(self._rooms, room)
        self._by_room.setdefault(room, []).append(rows)
