"""What works block by block and in place gives what the pure functions give."""

from __future__ import annotations

import pytest
import torch

from hfft.penalties.spaces import _BLOCK, Dense
from hfft.penalties.weights import cosine_of, euclidean_of, l2_sp_of, moments

from .test_weights import cosine, drawn, euclidean, fisher, l2_sp

# one beyond a block, so that the last block is a short one
SHAPES = [(3, 5), (), (4, 3, 3, 3), (_BLOCK["cpu"] + 7,), (257, 300)]
PURE = {
    "l2_sp": (l2_sp, l2_sp_of),
    "euclidean": (euclidean, euclidean_of),
    "cosine": (cosine, cosine_of),
}


@pytest.mark.parametrize(("pure", "rule"), PURE.values(), ids=PURE)
def test_gradients_added_in_place_are_the_pure_functions(pure, rule) -> None:  # type: ignore[no-untyped-def]
    theta, source = drawn(0, SHAPES), drawn(1, SHAPES)
    start = drawn(2, SHAPES)
    value, gradients = pure(theta, source)
    space = Dense(theta, source)
    found = rule(space.moments())
    targets = [t.clone() for t in start]
    space.add(targets, [0.3 * a for a in found.a], [0.3 * b for b in found.b])
    assert float(found.value) == pytest.approx(float(value), rel=1e-12)
    for target, before, gradient in zip(targets, start, gradients, strict=True):
        torch.testing.assert_close(target, before + 0.3 * gradient, rtol=1e-12, atol=1e-12)


def test_moments_are_those_of_the_whole_tensors() -> None:
    theta, source = drawn(0, SHAPES), drawn(1, SHAPES)
    own, pure = Dense(theta, source).moments(), moments(theta, source)
    for name in ("dd", "td", "tt", "ss"):
        torch.testing.assert_close(getattr(own, name), getattr(pure, name))


def test_the_weights_themselves_can_be_the_target() -> None:
    theta, source = drawn(0, SHAPES), drawn(1, SHAPES)
    before = [t.clone() for t in theta]
    Dense(theta, source).add(theta, [0.2] * len(theta), [-0.5] * len(theta))
    for after, t, s in zip(theta, before, source, strict=True):
        torch.testing.assert_close(after, t + 0.2 * t - 0.5 * (t - s))


def test_importance_weighs_each_element() -> None:
    theta, source, weight = drawn(0, SHAPES), drawn(1, SHAPES), [t.abs() for t in drawn(3, SHAPES)]
    value, gradients = fisher(theta, source, weight)
    space = Dense(theta, source, weight)
    targets = [torch.zeros_like(t) for t in theta]
    space.add(targets, [0.0] * len(theta), [1.0] * len(theta))
    assert float(l2_sp_of(space.moments()).value) == pytest.approx(float(value))
    torch.testing.assert_close(targets, gradients)


def test_a_weight_without_a_source_is_drawn_to_zero() -> None:
    theta = drawn(0, [(3, 2)])
    target = [torch.zeros_like(theta[0])]
    space = Dense(theta, [None])
    space.add(target, [0.0], [1.0])
    torch.testing.assert_close(target, theta)
    assert float(space.moments().ss) == 0


def test_channels_last_weights_are_updated_in_their_own_layout() -> None:
    theta = [drawn(0, [(64, 64, 7, 7)])[0].to(memory_format=torch.channels_last)]
    source = drawn(1, [(64, 64, 7, 7)])
    target = [torch.zeros_like(theta[0])]
    Dense(theta, source).add(target, [0.0], [1.0])
    torch.testing.assert_close(target[0], theta[0] - source[0])
    assert target[0].is_contiguous(memory_format=torch.channels_last)


def test_what_has_no_gradient_is_left_alone() -> None:
    theta, source = drawn(0, [(2,), (3,)]), drawn(1, [(2,), (3,)])
    target = torch.zeros(3, dtype=torch.float64)
    Dense(theta, source).add([None, target], [0.0, 0.0], [1.0, 1.0])
    torch.testing.assert_close(target, theta[1] - source[1])


def test_a_bfloat16_copy_costs_accuracy_and_no_more() -> None:
    source = [t.float() for t in drawn(0, [(100, 100)])]
    theta = [s + 1e-2 * t.float() for s, t in zip(source, drawn(1, [(100, 100)]), strict=True)]
    target = [torch.zeros_like(theta[0])]
    Dense(theta, [s.bfloat16() for s in source]).add(target, [0.0], [1.0])
    true = theta[0] - source[0]
    error = float((target[0] - true).norm() / true.norm())
    assert target[0].dtype == torch.float32
    assert 1e-3 < error < 0.3  # relative to a difference of 1 % of the weights


def test_the_source_is_shared_where_it_need_not_be_moved() -> None:
    source = drawn(1, [(3, 2)])
    assert Dense(drawn(0, [(3, 2)]), source).source[0].data_ptr() == source[0].data_ptr()  # type: ignore[union-attr]
