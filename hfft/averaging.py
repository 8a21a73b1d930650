"""Averages of weights, as functions of named tensors.

Buffers are treated by what they are. Floating-point ones are averaged as parameters are:
BatchNorm's running mean and variance are statistics of what the layers below put out, and with an
average of weights these lie nearer to the average of the statistics than to those of any one
member. Integer ones (how many batches were counted, positions) are copied: a mean of them would be
no such number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
"""Parameters and buffers by name; of those that modules share, one."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model and the buffers that are saved with it, not copied."""
    saved = model.state_dict().keys()
    every = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in every if name in saved}


@torch.no_grad()
def load_weights_into(model: nn.Module, weights: Weights) -> None:
    """Write weights into a model, in place; what they don't name stays as it is."""
    own: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    own |= model.named_parameters(remove_duplicate=False)
    for name, tensor in weights.items():
        own[name].copy_(tensor)


@torch.no_grad()
def interpolate(source: Weights, tuned: Weights, alpha: float) -> dict[str, Tensor]:
    """Return (1 - alpha) * source + alpha * tuned (WiSE-FT, Wortsman et al. 2022).

    What is not in the source, such as a new head, is as tuned at every alpha. What is equal in both
    is so in the result, bit for bit, and so are the ends.

    Args:
        source: on any device.
        tuned: on any device; the result is there.
        alpha: from 0 to 1.
    """
    return {
        name: _between(source[name].to(own), own, alpha) if name in source else own
        for name, own in tuned.items()
    }


@torch.no_grad()
def with_one_more(mean: Weights, weights: Weights, members: int) -> dict[str, Tensor]:
    """Return the mean of `members` weights and of one more."""
    share = 1 / (members + 1)
    return {name: _between(own, weights[name].to(own), share) for name, own in mean.items()}


def uniform(members: Iterable[Weights]) -> dict[str, Tensor]:
    """Return the mean of weights, read one after the other (model soups, Wortsman et al. 2022)."""
    mean: Weights = {}
    for number, weights in enumerate(members):
        mean = with_one_more(mean, weights, number) if number else weights
    return dict(mean)


def decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """Return what the average keeps of itself at an update.

    Args:
        step: of the update, from 1.
        decay: in the end.
        warmup: let it grow as 1 - step^(-2/3), timm's default, so that the average follows closely
            at first; the first update then forgets what training started from.
    """
    return min(decay, 1 - step ** (-2 / 3)) if warmup else decay


@torch.no_grad()
def update_ema(average: Weights, weights: Weights, decay: float) -> None:
    """Set an average to decay * average + (1 - decay) * weights, in place."""
    moving = [name for name, tensor in average.items() if tensor.is_floating_point()]
    if moving:
        held = [average[name] for name in moving]
        torch._foreach_lerp_(
            held,
            [weights[name].to(own.dtype) for name, own in zip(moving, held, strict=True)],
            1 - decay,
        )
    for name, tensor in average.items():
        if not tensor.is_floating_point():
            tensor.copy_(weights[name])


def _between(first: Tensor, second: Tensor, share: float) -> Tensor:
    return torch.lerp(first, second, share) if second.is_floating_point() else second
