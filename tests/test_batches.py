from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from hfft.batches import GroupedByLength, TokenBatches
from hfft.errors import InputError


def log_normal(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Lengths of texts: mean 60, 512 at most."""
    random = np.random.default_rng(seed)
    return np.clip(random.lognormal(np.log(60) - 0.32, 0.8, count).astype(np.int64), 1, 512)


def batches_of(sampler: TokenBatches, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [512, 1000, 4096])
def test_every_example_comes_once_within_the_budget(budget: int, processes: int) -> None:
    lengths = log_normal(1000)
    sampler = TokenBatches(lengths, budget, seed=1, processes=processes)
    for epoch in range(3):
        batches = batches_of(sampler, epoch)
        assert sorted(n for batch in batches for n in batch) == list(range(1000))
        assert all(lengths[batch].max() * len(batch) <= budget for batch in batches)
        assert len(batches) == len(sampler)
        assert len(batches) % processes == 0


def test_little_of_a_batch_is_padding() -> None:
    lengths = log_normal(5000)
    batches = batches_of(TokenBatches(lengths, 4096, seed=0), 0)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert lengths.sum() / padded > 0.96
    assert lengths.sum() / (len(batches) * 4096) > 0.9  # and the budget is used


def test_epochs_differ_in_order_and_company_and_repeat_from_their_number() -> None:
    lengths = log_normal(500)
    one, other = (TokenBatches(lengths, 1024, seed=3) for _ in range(2))
    first, second = batches_of(one, 0), batches_of(one, 1)
    assert first != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    batches_of(other, 4)
    assert batches_of(other, 1) == second
    assert batches_of(TokenBatches(lengths, 1024, seed=4), 0) != first


def test_order_of_batches_does_not_follow_length() -> None:
    lengths = log_normal(2000)
    longest = [lengths[b].max() for b in batches_of(TokenBatches(lengths, 1024, seed=0), 0)]
    ranks = np.corrcoef(np.arange(len(longest)), longest)[0, 1]
    assert abs(ranks) < 0.2


def test_example_longer_than_the_budget_is_named() -> None:
    with pytest.raises(InputError, match="batch_tokens: 100 tokens hold no example of 130"):
        TokenBatches(np.array([4, 130, 7]), 100, seed=0)


def test_largest_batches_are_split_until_every_process_has_one() -> None:
    sampler = TokenBatches(np.full(8, 4), 1000, seed=0, processes=3)
    assert sorted(map(len, sampler)) == [2, 2, 4]
    with pytest.raises(InputError, match=r"1 batches of one example .* to 2 processes"):
        TokenBatches(np.array([4]), 1000, seed=0, processes=2)


def test_grouping_by_length_is_alike_in_every_process_and_repeats_after_a_resume() -> None:
    lengths = log_normal(400)
    one, other = (GroupedByLength(8, lengths, seed=5) for _ in range(2))
    orders = []
    for epoch in range(3):
        one.set_epoch(epoch)
        orders.append(list(one))
    assert sorted(orders[0]) == list(range(400))
    assert orders[0] != orders[1]
    other.set_epoch(2)
    assert list(other) == orders[2]
    widths = [np.ptp(lengths[orders[0][n : n + 8]]) for n in range(0, 400, 8)]
    assert np.mean(widths) < 30
