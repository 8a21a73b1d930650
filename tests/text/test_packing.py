from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from transformers import GPT2Config
from transformers.masking_utils import find_packed_sequence_indices

from hfft.text.inputs import IGNORED
from hfft.text.packing import RowCollator, join_examples, pack


def lognormal(number: int, capacity: int) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(5, 1, number).astype(int)
    return np.clip(drawn, 1, capacity)


def fitted(lengths: np.ndarray, capacity: int) -> list[int]:
    """Best-fit decreasing, one text at a time: the rooms that are left."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [number for number, room in enumerate(rooms) if room >= length]
        best = min(fits, key=rooms.__getitem__, default=len(rooms))
        rooms[best : best + 1] = [(rooms[best] if fits else capacity) - length]
    return rooms


@pytest.mark.parametrize(("number", "capacity"), [(1, 7), (500, 400), (3000, 1024), (300, 8)])
def test_every_text_is_in_one_row_that_holds_it(number: int, capacity: int) -> None:
    lengths = lognormal(number, capacity)
    rows = pack(lengths, capacity)
    assert np.sort(np.concatenate(rows)).tolist() == list(range(number))
    assert max(lengths[row].sum() for row in rows) <= capacity


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_best_fit_decreasing(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 60, 300)
    rows = pack(lengths, 64)
    assert sorted(64 - lengths[row].sum() for row in rows) == sorted(fitted(lengths, 64))


def test_hardly_anything_is_padding() -> None:
    lengths = lognormal(20_000, 1024)
    assert lengths.sum() >= 0.99 * 1024 * len(pack(lengths, 1024))


def test_the_same_lengths_make_the_same_rows() -> None:
    lengths = lognormal(2000, 512)
    one, other = pack(lengths, 512), pack(lengths.tolist(), 512)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_million_texts_take_seconds() -> None:
    begun = time.perf_counter()
    pack(lognormal(10**6, 1024), 1024)
    assert time.perf_counter() - begun < 15  # about 0.6 on an idle processor


def test_no_texts_make_no_rows() -> None:
    assert pack([], 5) == []


@pytest.mark.parametrize("lengths", [[3, 0], [6, 2]])
def test_a_text_that_no_row_holds_is_an_error(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"don't fit into rows of 5"):
        pack(lengths, 5)


def example(*ids: int) -> dict[str, Any]:
    return {"input_ids": list(ids), "labels": [i + 1 for i in ids]}


def test_positions_start_anew_with_each_example_of_a_row() -> None:
    row = join_examples([example(5, 6, 7), example(8), example(9, 10)])
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 10]
    assert row["labels"].tolist() == [6, 7, 8, 9, 10, 11]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 0, 1]


def test_padding_is_of_no_example() -> None:
    rows = [join_examples([example(5, 6), example(7)]), join_examples([example(8)])]
    batch = RowCollator.of(0, GPT2Config())(rows)
    assert list(batch) == ["input_ids", "labels", "position_ids", "use_cache"]
    assert batch["use_cache"] is False
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, 8], [9, IGNORED, IGNORED]]
    assert find_packed_sequence_indices(batch["position_ids"]).tolist() == [[0, 0, 1], [0, 1, 2]]


def test_flash_attention_gets_one_row_without_padding() -> None:
    config = GPT2Config()
    config._attn_implementation_internal = "flash_attention_2"  # set, it would have to be there
    rows = [join_examples([example(5, 6), example(7)]), join_examples([example(8)])]
    batch = RowCollator.of(0, config)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0]]


def test_rows_of_one_example_have_an_attention_mask() -> None:
    batch = RowCollator.of(0, GPT2Config())([example(5, 6), example(7)])
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[6, 7], [8, IGNORED]]
