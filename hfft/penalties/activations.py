"""Penalties on activations as pure functions: each gives its value and its gradient.

The gradient is with respect to the activations, in closed form, in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor


def batch_spectral_shrinkage(features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the k smallest singular values, and its gradient.

    Chen, Wang, Fu, Long, Wang 2019, "Catastrophic Forgetting Meets Negative Transfer: Batch
    Spectral Shrinkage for Safe Transfer Learning". With F = U S V^T the gradient is
    2 U_k S_k V_k^T = 2 U_k U_k^T F: no gap between singular values is divided by, so that equal
    ones and zeros do no harm. Where the k-th smallest equals the next, R has a kink, and this is
    one of its subgradients.

    The decomposition is that of F and not of F F^T, whose eigenvalues are squares: in float32 it
    loses every singular value below 3e-4 of the largest, and the smallest are what is wanted.

    Args:
        features: of shape (B, D). Where one is not finite, all that is returned is nan.
        k: of the min(B, D) singular values; all of them make the squared Frobenius norm.

    Returns:
        A scalar, and a tensor of shape (B, D).
    """
    features = precise(features)
    finite = features.isfinite().all()
    # the decomposition raises on inf, which fp16's loss scaling produces now and then
    u, s, vh = torch.linalg.svd(features.where(finite, 0), full_matrices=False)
    smallest = s[-k:]
    gradient = (u[:, -k:] * (2 * smallest)) @ vh[-k:]
    return smallest.square().sum().where(finite, torch.nan), gradient.where(finite, torch.nan)


def behaviour(maps: Tensor, source: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weighted squared distance of feature maps from the source's, and its gradient.

    Li, Xiong, Wang, Rao, Liu, Huan 2019, "DELTA: DEep Learning Transfer using Feature Map with
    Attention for Convolutional Networks". For one layer

        R = 1/B sum_b sum_j 1/2 C w_j ||maps[b, j] - source[b, j]||^2 / (H W)

    with weights that add up to 1, so that at w_j = 1/C every channel counts 1/2 of its mean square
    over places. The authors' code sums over the batch; the mean makes a strength mean the same at
    any batch size, as the mean in the loss does. For sequences T stands for H W; padding counts.

    Args:
        maps: of shape (B, C, H, W), (B, T, C) or (B, C).
        source: of the same shape.
        weights: w, of shape (C,); default: 1/C each.

    Returns:
        A scalar, and a tensor of the shape of `maps`.

    Raises:
        ValueError: the shapes differ.
    """
    if maps.shape != source.shape:  # they must not broadcast
        raise ValueError(f"maps of {tuple(maps.shape)}, the source's of {tuple(source.shape)}")
    maps, source = precise(maps), precise(source)
    axis = channel_axis(maps)
    channels = maps.shape[axis]
    each = channels / max(1, maps.numel())  # 1 / (B H W)
    difference = maps - source
    if weights is None:
        gradient = difference * each
    else:
        shape = [channels if n == axis else 1 for n in range(maps.ndim)]
        gradient = difference * (channels * each * weights.to(maps)).view(shape)
    return 0.5 * (gradient * difference).sum(), gradient


def attention(increase: Tensor) -> Tensor:
    """Return channels' weights in `behaviour`, from how much the loss grows without each.

    The paper takes a softmax over the increases. They are so small that its weights would all be
    1/C, so the authors' code standardises them and divides by 5 first, and so does this.

    Args:
        increase: of shape (C,).

    Returns:
        A tensor of shape (C,) that adds up to 1.
    """
    centred = increase - increase.mean()
    spread = centred.square().mean().sqrt()
    return (centred / torch.where(spread > 0, spread, 1) / 5).softmax(0)


def pooled(features: Tensor) -> Tensor:
    """Return the mean over all places: (B, C) of (B, C, H, W), (B, T, C) or (B, C)."""
    axes = _places(features)
    return features.mean(axes) if axes else features


def spread(gradient: Tensor, features: Tensor) -> Tensor:
    """Return the gradient with respect to `features`, given that to `pooled(features)`, (B, C)."""
    axes = _places(features)
    places = 1
    for axis in sorted(axes):
        gradient, places = gradient.unsqueeze(axis), places * features.shape[axis]
    return gradient.expand_as(features) / max(1, places)


def channel_axis(maps: Tensor) -> int:
    """Return which axis of (B, C, H, W), (B, T, C) or (B, C) counts channels."""
    return 1 if maps.ndim == 4 else maps.ndim - 1


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _places(features: Tensor) -> list[int]:
    """Return the axes that count neither examples nor channels."""
    return [axis for axis in range(1, features.ndim) if axis != channel_axis(features)]
