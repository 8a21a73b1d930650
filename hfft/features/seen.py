"""What was seen of a model as it ran, and whether it is the same another time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


@dataclass
class Seen:
    """One tensor, or what else there was, as it was in the uncut model."""

    value: Any
    learned: bool = False
    stable: bool = True  # the same whenever the example is seen
    drawn: bool = False  # random numbers had been drawn before

    @property
    def can_be_stored(self) -> bool:
        """Whether it is a function of the example and of frozen weights."""
        return self.stable and not (self.learned or self.drawn)


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int | str, Any]]:
    """Name a call's arguments by position or keyword."""
    yield from enumerate(args)
    yield from kwargs.items()


def answers(output: Any) -> list[Tensor]:
    """Return the loss, the logits and the like; states and outputs of parts are by-products."""
    named = output.items() if isinstance(output, Mapping) else enumerate(output)
    return [
        value
        for name, value in named
        if isinstance(value, Tensor) and "hidden_state" not in str(name)
    ]


def copied(leaf: Any) -> Any:
    """Return a leaf as it is now, whatever is written over it later."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def has_nan(value: Any) -> bool:
    """Whether a tensor in it is NaN anywhere."""
    return any(
        isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(torch.isnan(leaf).any())
        for leaf in tree_flatten(value)[0]
    )


def same(new: Tensor, old: Tensor, mask: Tensor | None = None) -> bool:
    """Whether two tensors are bit-identical, where there are tokens."""
    if new.shape != old.shape or new.dtype != old.dtype:
        return False
    if mask is not None and new.shape[:2] == mask.shape:
        new, old = new[mask.bool()], old[mask.bool()]
    return torch.equal(torch.nan_to_num(new, nan=0.5), torch.nan_to_num(old, nan=0.5)) and bool(
        (torch.isnan(new) == torch.isnan(old)).all()
    )


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding at most, whatever computed them."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().float(), other.detach().float()
    return bool((one - other).norm() <= 1e-2 * other.norm() + 1e-6)


def generators(device: torch.device) -> list[Tensor]:
    """Return the states of torch's generators, which tell whether anything was drawn."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def other_weights(model: nn.Module) -> Iterator[None]:
    """Let all that learns be other than it is."""
    before = {p: p.data for p in model.parameters() if p.requires_grad}
    try:
        for parameter, data in before.items():
            parameter.data = data * 1.5 + 0.25
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Evaluate with a model; its modules have the modes again that they had, each its own."""
    modes = {module: module.training for module in model.modules()}
    cast(Any, model).eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back statistics and modes that running a model in training mode changes."""
    training = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for module, mode in training.items():
            module.training = mode
