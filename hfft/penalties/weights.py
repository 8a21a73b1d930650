"""Penalties on weights as pure functions: value and closed-form gradient.

Each takes the weights `theta` and their source values `source`, lists of tensors of the same
shapes in pairs, and returns R, a scalar, and its gradient with respect to each of `theta`.

Three of them depend on the weights through four sums a tensor only (`Moments`), and their gradient
is `a * theta + b * (theta - source)`. That is what makes them nearly free, right on shards (sums
add up) and right for LoRA (the sums need no dense product). With d = theta - source the formulas
stay accurate where theta is near its source, which is where fine-tuning takes place: written out
plainly, a float32 cosine is wrong by a third there, and a norm has no derivative at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
ALL = ("dd", "td", "tt", "ss")
"""The names of the sums in `Moments`."""


@dataclass(frozen=True)
class Moments:
    """Sums over the elements of each of N tensors; float64, each of shape (N,).

    Attributes:
        dd: <d, d>, of the difference d = theta - source.
        td: <theta, d>.
        tt: <theta, theta>.
        ss: <source, source>.
    """

    dd: Tensor
    td: Tensor
    tt: Tensor
    ss: Tensor


@dataclass(frozen=True)
class Value:
    """R, and the numbers that make its gradient: `a[i] * theta[i] + b[i] * d[i]`."""

    value: Tensor
    a: list[float]
    b: list[float]


def l2_sp_of(m: Moments) -> Value:
    """Return L2-SP of moments."""
    count = len(m.dd)
    return Value(m.dd.sum() / 2, [0.0] * count, [1.0] * count)


def euclidean_of(m: Moments) -> Value:
    """Return the Euclidean distance of moments; its gradient at distance 0 is 0."""
    distance = m.dd.sum().sqrt()
    count = len(m.dd)
    length = float(distance)
    return Value(distance, [0.0] * count, [1 / length if length > 0 else 0.0] * count)


def cosine_of(m: Moments) -> Value:
    """Return the cosine distance of moments; a tensor of zeros has no direction and no penalty."""
    theta, source = m.tt.sqrt(), m.ss.sqrt()
    has_direction = (theta > 0) & (source > 0)
    lengths = torch.where(has_direction, theta * source, 1)
    # |theta| - |source|, without the difference of two nearly equal numbers
    longer = (2 * m.td - m.dd) / torch.where(has_direction, theta + source, 1)
    values = (m.dd - longer**2) / (2 * lengths)
    b = torch.where(has_direction, 1 / lengths, 0)
    a = -b * m.td / torch.where(has_direction, m.tt, 1)
    return Value(torch.where(has_direction, values, 0).sum(), a.tolist(), b.tolist())


def l2_sp(theta: Tensors, source: Tensors) -> tuple[Tensor, list[Tensor]]:
    """R = 1/2 sum of squared differences (Li et al. 2018, "L2-SP")."""
    return _with_gradient(theta, source, l2_sp_of(moments(theta, source)))


def euclidean(theta: Tensors, source: Tensors) -> tuple[Tensor, list[Tensor]]:
    """R = the Euclidean norm of the difference, over all tensors together, not squared.

    The gradient where theta = source is 0, the subgradient of least norm.
    """
    return _with_gradient(theta, source, euclidean_of(moments(theta, source)))


def cosine(theta: Tensors, source: Tensors) -> tuple[Tensor, list[Tensor]]:
    """R = sum over tensors of 1 - cos(theta, source).

    A tensor that is zero, or whose source is, has no direction: it adds 0 with gradient 0.
    """
    return _with_gradient(theta, source, cosine_of(moments(theta, source)))


def fisher(theta: Tensors, source: Tensors, information: Tensors) -> tuple[Tensor, list[Tensor]]:
    """R = 1/2 sum of F * (theta - source)^2 (EWC, Kirkpatrick et al. 2017).

    Args:
        theta: the weights.
        source: their source values.
        information: the diagonal F of the Fisher information, a tensor of each one's shape.
    """
    differences = [t - s for t, s in zip(theta, source, strict=True)]
    gradients = [f * d for f, d in zip(information, differences, strict=True)]
    value = sum((g * d).sum() for g, d in zip(gradients, differences, strict=True)) / 2
    return torch.as_tensor(value), gradients


def orthogonal(theta: Tensors, source: Tensors) -> tuple[Tensor, list[Tensor]]:
    """R = sum over matrices of the squared Frobenius norm of theta^T source.

    A weight of shape (out, ...) counts as the matrix (out, rest): a convolution (out, in, h, w) is
    flattened to (out, in * h * w), so that theta^T source compares input directions. The gradient
    is 2 source source^T theta.
    """
    value = theta[0].new_zeros(()) if theta else torch.zeros(())
    gradients = []
    for t, s in zip(theta, source, strict=True):
        one, other = t.flatten(1), s.flatten(1)
        if len(one) > one.shape[1]:
            overlap = other.T @ one
            product = other @ overlap
            value = value + (overlap * overlap).sum()
        else:
            product = (other @ other.T) @ one
            value = value + (one * product).sum()
        gradients.append((2 * product).view_as(t))
    return value, gradients


def moments(theta: Tensors, source: Tensors) -> Moments:
    """Return the sums of `Moments`, accumulated in float64."""
    rows = [
        [_dot(d, d), _dot(t, d), _dot(t, t), _dot(s, s)]
        for t, s in zip(theta, source, strict=True)
        for d in [t - s]
    ]
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return Moments(*table.unbind(1))


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())


def _with_gradient(theta: Tensors, source: Tensors, found: Value) -> tuple[Tensor, list[Tensor]]:
    gradients = [
        a * t + b * (t - s) for t, s, a, b in zip(theta, source, found.a, found.b, strict=True)
    ]
    return found.value, gradients
