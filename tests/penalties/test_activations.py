"""Penalties on activations: the papers' formulas, and gradients that are autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfft.penalties.activations import (
    attention,
    batch_spectral_shrinkage,
    behaviour,
    pooled,
    spread,
)

FLOAT64 = {"dtype": torch.float64}


def of_singular_values(values: list[float], rows: int, columns: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=random, **FLOAT64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=random, **FLOAT64))
    return u @ torch.diag(torch.tensor(values, **FLOAT64)) @ v.T


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 13), (13, 5), (6, 6)])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_shrinkage_is_the_sum_of_the_smallest_squares_with_autograds_gradient(
    shape: tuple[int, int], k: int
) -> None:
    torch.manual_seed(0)
    features = torch.randn(shape, **FLOAT64, requires_grad=True)
    expected = torch.linalg.svdvals(features)[-k:].square().sum()
    (by_autograd,) = torch.autograd.grad(expected, features)
    value, gradient = batch_spectral_shrinkage(features.detach(), k)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-6, atol=1e-6)


def test_shrinkage_gradient_is_twice_the_projection_on_the_smallest_directions() -> None:
    features = torch.randn(4, 9, **FLOAT64)
    u, _, _ = torch.linalg.svd(features)
    _, gradient = batch_spectral_shrinkage(features, 2)
    torch.testing.assert_close(gradient, 2 * u[:, 2:] @ u[:, 2:].T @ features)


def test_shrinking_more_values_than_there_are_is_the_squared_norm() -> None:
    features = torch.randn(4, 9, **FLOAT64)
    value, gradient = batch_spectral_shrinkage(features, 5)
    torch.testing.assert_close(value, features.square().sum())
    torch.testing.assert_close(gradient, 2 * features)


@pytest.mark.parametrize("values", [[3.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1.0, 0.0, 0.0], [0.0] * 3])
def test_equal_and_zero_singular_values_give_finite_gradients_and_autograds_where_there_is_one(
    values: list[float],
) -> None:
    features = of_singular_values(values, 3, 5).requires_grad_()
    expected = torch.linalg.svdvals(features)[-2:].square().sum()
    (by_autograd,) = torch.autograd.grad(expected, features)
    value, gradient = batch_spectral_shrinkage(features.detach(), 2)
    torch.testing.assert_close(value, expected.detach())
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-6, atol=1e-6)
    # Euler: R is homogeneous of degree two, at kinks too
    torch.testing.assert_close((gradient * features.detach()).sum(), 2 * value)


def test_small_singular_values_survive_float32_and_would_not_in_the_gram_matrix() -> None:
    exact = of_singular_values([1.0, 0.5, 0.3, 1e-4], 4, 50)
    value, gradient = batch_spectral_shrinkage(exact.float())
    assert float(value) == pytest.approx(1e-8, rel=0.01)
    _, expected = batch_spectral_shrinkage(exact)
    assert float((gradient - expected).norm() / expected.norm()) < 0.01
    single = exact.float()
    gram = float(torch.linalg.eigvalsh(single @ single.T)[0])
    assert abs(gram - 1e-8) > 0.3e-8


def test_features_that_are_not_finite_give_nan_and_no_error() -> None:
    features = torch.randn(3, 4)
    features[1, 1] = torch.inf
    value, gradient = batch_spectral_shrinkage(features)
    assert value.isnan()
    assert gradient.isnan().all()


def test_half_precision_is_computed_in_float32() -> None:
    features = torch.randn(3, 4).bfloat16()
    assert batch_spectral_shrinkage(features)[1].dtype == torch.float32
    assert behaviour(features, features)[1].dtype == torch.float32


def paper(maps: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """1/2 c w_j ||.||^2 / (h w), summed over channels; the mean over the batch."""
    if maps.ndim == 3:
        maps, source = maps.movedim(-1, 1), source.movedim(-1, 1)
    total = torch.zeros((), **FLOAT64)
    for b in range(maps.shape[0]):
        for j in range(maps.shape[1]):
            difference = maps[b, j] - source[b, j]
            total = total + 0.5 * maps.shape[1] * weights[j] * (
                difference.square().sum() / difference.numel()
            )
    return total / maps.shape[0]


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 1, 1), (3, 5, 4), (3, 4), (1, 1)])
@pytest.mark.parametrize("weighted", [True, False])
def test_behaviour_is_the_papers_sum_with_autograds_gradient(
    shape: tuple[int, ...], weighted: bool
) -> None:
    torch.manual_seed(0)
    maps = torch.randn(shape, **FLOAT64, requires_grad=True)
    source = torch.randn(shape, **FLOAT64)
    channels = shape[1] if len(shape) == 4 else shape[-1]
    weights = torch.randn(channels, **FLOAT64).softmax(0)
    uniform = torch.full((channels,), 1 / channels, **FLOAT64)
    expected = paper(maps, source, weights if weighted else uniform)
    (by_autograd,) = torch.autograd.grad(expected, maps)
    value, gradient = behaviour(maps.detach(), source, weights if weighted else None)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 5, 4), (3, 4)])
def test_no_difference_costs_nothing(shape: tuple[int, ...]) -> None:
    for maps in (torch.randn(shape, **FLOAT64), torch.zeros(shape, **FLOAT64)):
        value, gradient = behaviour(maps, maps.clone())
        assert value == 0
        assert not gradient.any()


def test_maps_of_other_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(1, 3\)"):
        behaviour(torch.randn(2, 3), torch.randn(1, 3))


def test_attention_adds_up_to_one_follows_the_increase_and_is_even_without_any() -> None:
    increase = torch.tensor([0.1, -0.2, 0.4, 0.0])
    weights = attention(increase)
    assert float(weights.sum()) == pytest.approx(1)
    assert torch.equal(weights.argsort(), increase.argsort())
    torch.testing.assert_close(weights, attention(1e-6 * increase))
    assert attention(torch.full((4,), 0.3)).tolist() == [0.25] * 4


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3), (2, 3, 4, 5)])
def test_gradient_of_the_pooled_features_is_spread_as_autograd_does(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, **FLOAT64, requires_grad=True)
    rows = pooled(features)
    assert rows.shape == (2, 3)
    outer = torch.randn(2, 3, **FLOAT64)
    (expected,) = torch.autograd.grad(rows, features, outer)
    torch.testing.assert_close(spread(outer, features), expected)
