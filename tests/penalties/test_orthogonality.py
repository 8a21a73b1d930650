"""Matrices take turns, and over a turn nothing is lost."""

from __future__ import annotations

import pytest
import torch

from hfft.penalties import Orthogonal, orthogonal
from hfft.penalties.orthogonality import _turns
from hfft.penalties.spaces import Dense

from .test_weights import drawn

SHAPES = [(3, 5), (7, 2), (4, 3, 3, 3), (30, 6), (6, 6)]


@pytest.mark.parametrize("interval", [1, 3, 4, 9])
def test_a_whole_turn_adds_the_gradient_interval_times(interval: int) -> None:
    theta, source = drawn(0, SHAPES), drawn(1, SHAPES)
    penalty = Orthogonal(Orthogonal.Options(interval=interval))
    bound = penalty.bind(Dense(theta, source))
    targets = [torch.zeros_like(t) for t in theta]
    for step in range(interval):
        bound.add(targets, [0.1] * len(theta), step)
    value, gradients = orthogonal(theta, source)
    assert bound.value() == pytest.approx(float(value))
    for target, gradient in zip(targets, gradients, strict=True):
        torch.testing.assert_close(target, interval * 0.1 * gradient)


def test_turns_cost_about_the_same() -> None:
    costs = [90, 10, 10, 10, 30, 30, 30, 80, 10]
    turns = _turns(costs, 3)
    totals = [sum(costs[n] for n in turn) for turn in turns]
    assert sorted(n for turn in turns for n in turn) == list(range(len(costs)))
    assert max(totals) - min(totals) <= 10


def test_vectors_are_not_covered() -> None:
    penalty = Orthogonal(Orthogonal.Options())
    assert penalty.covers("w", (3, 2))
    assert not penalty.covers("bias", (3,))
