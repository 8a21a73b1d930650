"""Values and closed-form gradients against autograd, and where plain formulas break down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from hfft.penalties import cosine, euclidean, fisher, l2_sp, orthogonal

Pure = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
Plain = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

SHAPES = [(3, 5), (7,), (1,), (), (4, 3, 3, 2), (9, 2), (2, 9), (1, 1)]


def plain_l2_sp(theta: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    return sum(((t - s) ** 2).sum() for t, s in zip(theta, source, strict=True)) / 2  # type: ignore[return-value]


def plain_euclidean(theta: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    return (2 * plain_l2_sp(theta, source)).sqrt()


def plain_cosine(theta: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    pairs = [(t.flatten(), s.flatten()) for t, s in zip(theta, source, strict=True)]
    return sum(1 - (t @ s) / (t.norm() * s.norm()) for t, s in pairs)  # type: ignore[return-value]


def plain_orthogonal(theta: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    pairs = [(t.flatten(1), s.flatten(1)) for t, s in zip(theta, source, strict=True)]
    return sum(((t.T @ s) ** 2).sum() for t, s in pairs)  # type: ignore[return-value]


def information(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [t.abs() for t in drawn(7, shapes)]


def weighted(theta: Sequence[Tensor], source: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return fisher(theta, source, information([tuple(t.shape) for t in theta]))


def plain_weighted(theta: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    f = information([tuple(t.shape) for t in theta])
    return sum((w * (t - s) ** 2).sum() for w, t, s in zip(f, theta, source, strict=True)) / 2  # type: ignore[return-value]


def drawn(seed: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes]


def by_autograd(plain: Plain, theta: Sequence[Tensor], source: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in theta]
    return list(torch.autograd.grad(plain(leaves, source), leaves))


CASES = {
    "l2_sp": (l2_sp, plain_l2_sp, 0),
    "euclidean": (euclidean, plain_euclidean, 0),
    "cosine": (cosine, plain_cosine, 0),
    "fisher": (weighted, plain_weighted, 0),
    "orthogonal": (orthogonal, plain_orthogonal, 2),
}


@pytest.mark.parametrize(("pure", "plain", "least"), CASES.values(), ids=CASES)
def test_value_and_gradient_are_autograds_on_odd_shapes(
    pure: Pure, plain: Plain, least: int
) -> None:
    shapes = [shape for shape in SHAPES if len(shape) >= least]
    theta, source = drawn(0, shapes), drawn(1, shapes)
    value, gradients = pure(theta, source)
    assert float(value) == pytest.approx(float(plain(theta, source)), rel=1e-12)
    for own, other in zip(gradients, by_autograd(plain, theta, source), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("pure", "plain", "least"), CASES.values(), ids=CASES)
def test_a_tensor_that_two_layers_share_counts_as_autograd_counts_it(
    pure: Pure, plain: Plain, least: int
) -> None:
    tied = torch.nn.Linear(4, 4, bias=False, dtype=torch.float64)
    other = torch.nn.Linear(4, 4, bias=False, dtype=torch.float64)
    other.weight = tied.weight
    weights = [p.detach() for p in torch.nn.ModuleList([tied, other]).parameters()]
    assert len(weights) == 1
    source = drawn(2, [(4, 4)])
    _, gradients = pure(weights, source)
    torch.testing.assert_close(gradients, by_autograd(plain, weights, source), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("pure", "_plain", "least"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_source_and_at_zero_nothing_is_nan(
    pure: Pure, _plain: Plain, least: int, dtype: torch.dtype
) -> None:
    shapes = [shape for shape in SHAPES if len(shape) >= least]
    theta = [t.to(dtype) for t in drawn(0, shapes)]
    zero = [torch.zeros_like(t) for t in theta]
    for one, other in ((theta, theta), (zero, theta), (theta, zero), (zero, zero)):
        value, gradients = pure(one, other)
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in gradients)
    if pure is not orthogonal:
        value, gradients = pure(theta, theta)
        assert float(value) == 0
        assert all(not g.any() for g in gradients)


def test_zero_tensors_have_autograds_gradients_where_it_has_any() -> None:
    source = drawn(1, [(3, 2)])
    zero = [torch.zeros_like(source[0])]
    for pure, plain in ((l2_sp, plain_l2_sp), (euclidean, plain_euclidean)):
        _, gradients = pure(zero, source)
        torch.testing.assert_close(gradients, by_autograd(plain, zero, source))
    _, gradients = orthogonal(zero, source)
    torch.testing.assert_close(gradients, by_autograd(plain_orthogonal, zero, source))
    value, gradients = cosine(zero, source)  # autograd has NaN here: there is no direction
    assert float(value) == 0
    assert not gradients[0].any()


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4, 1e-5])
def test_cosine_in_float32_is_exact_near_the_source_where_the_plain_form_is_not(
    distance: float,
) -> None:
    source = [s.float() for s in drawn(0, [(64, 64)])]
    theta = [s + distance * d.float() for s, d in zip(source, drawn(1, [(64, 64)]), strict=True)]
    precise = [t.double() for t in theta], [s.double() for s in source]
    value, gradients = cosine(theta, source)
    # float64 of the stable form, itself equal to autograd's (above), is the truth here
    true_value, true_gradients = cosine(*precise)
    assert float(value) == pytest.approx(float(true_value), rel=1e-5)
    error = (gradients[0].double() - true_gradients[0]).norm() / true_gradients[0].norm()
    assert error < 1e-5
    if distance <= 1e-3:
        plain_error = abs(float(plain_cosine(theta, source)) / float(true_value) - 1)
        assert plain_error > 1e-2


def test_a_plain_norm_has_no_derivative_at_the_source() -> None:
    theta = drawn(0, [(3,)])
    assert by_autograd(plain_euclidean, theta, theta)[0].isnan().all()


def test_orthogonal_flattens_a_convolution_to_outputs_by_the_rest() -> None:
    theta, source = drawn(0, [(4, 3, 2, 2)]), drawn(1, [(4, 3, 2, 2)])
    flat = [theta[0].reshape(4, 12)], [source[0].reshape(4, 12)]
    assert float(orthogonal(theta, source)[0]) == pytest.approx(float(orthogonal(*flat)[0]))
    assert orthogonal(theta, source)[1][0].shape == (4, 3, 2, 2)
