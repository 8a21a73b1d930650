"""Where a model can be cut: below lies what is frozen, and is the same in every epoch.

A cut skips the frozen modules and lets stored tensors enter above them; analysis.py finds it,
replay.py works with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from hfft.errors import InputError
from hfft.features.calls import Call

MASK = "attention_mask"
"""The input (B, T) that says which positions are no padding; T varies from batch to batch."""

Autocast = Callable[[], AbstractContextManager[Any]]


class NoCutError(InputError):
    """The model can't be cut here; the message says why."""


@dataclass(frozen=True)
class Slot:
    """A tensor that enters the model from the store.

    Attributes:
        call: the call that it is an argument of, or the output of.
        argument: position or keyword of that argument; None: the output.
        leaf: which tensor of it, in torch's pytree order.
        shape: of one example, without the dimension that varies.
        dtype: as computed.
        varies: whether an example has as many rows as it has tokens.
        channels_last: how a batch of images lies in memory.
    """

    call: Call
    argument: int | str | None
    leaf: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    varies: bool
    channels_last: bool = False


@dataclass(frozen=True)
class Absent:
    """A tensor that is not computed: NaN of the right shape, without memory of its own."""

    shape: tuple[int | Literal["batch", "length"], ...]
    dtype: torch.dtype

    def make(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Return it for a batch of so many examples of so many tokens."""
        fill = math.nan if self.dtype.is_floating_point else 0
        sizes = {"batch": batch, "length": length}
        shape = [sizes[n] if isinstance(n, str) else n for n in self.shape]
        return torch.full((), fill, dtype=self.dtype, device=device).expand(shape)


@dataclass(frozen=True)
class Skipped:
    """What a call that is not run answers."""

    leaves: tuple[Any, ...]
    spec: TreeSpec

    def answer(self, stored: Mapping[int, Tensor], *sizes: Any) -> Any:
        """Return its output: stored tensors by their leaf, NaN for the others."""
        leaves = [
            stored[n] if n in stored else leaf.make(*sizes) if isinstance(leaf, Absent) else leaf
            for n, leaf in enumerate(self.leaves)
        ]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Cut:
    """A model cut in two.

    Attributes:
        slots: what enters above the cut.
        skipped: what is not run, in the order it would be.
        inputs: the model's inputs that only what is skipped would read, and that are costly.
        calls: how often each module that is named here is called in one forward pass.
        below: the model's inputs that what is skipped would read.
        flops: that are saved, an example: of linear layers and convolutions.
    """

    slots: tuple[Slot, ...]
    skipped: Mapping[Call, Skipped]
    inputs: Mapping[str, Absent]
    calls: Mapping[str, int] = field(compare=False)
    below: frozenset[str] = frozenset()
    flops: float = field(default=0.0, compare=False)

    @property
    def place(self) -> str:
        """Where the model is cut, as in `before head`; of each tower the last place."""
        last: dict[str, str] = {}
        for slot in self.slots:
            module = slot.call.module
            side = "behind" if slot.argument is None else "before"
            last[module.partition(".")[0]] = f"{side} {module}"
        return " and ".join(last.values())


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model itself is called with: the task has the labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def trimmed(batch: Mapping[str, Any], length: int = 16) -> dict[str, Any]:
    """Return a batch whose texts are at most so many tokens long: a cut does not depend on it.

    Padding on the left is taken off before tokens are.
    """
    mask = batch.get(MASK)
    if mask is None or mask.dim() != 2 or mask.shape[1] <= length:
        return dict(batch)
    whole = mask.shape[1]
    kept = slice(0, length) if mask[:, 0].all() else slice(whole - length, whole)
    return {
        name: value[:, kept]
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == whole
        else value
        for name, value in batch.items()
    }


def with_padding(stored: Tensor, mask: Tensor) -> Tensor:
    """Put back zeros where `mask` (B, T) has no token; `stored` is (tokens, ...) of the batch."""
    whole = stored.new_zeros(*mask.shape, *stored.shape[1:])
    whole[mask.bool()] = stored
    return whole


@contextmanager
def frozen_for_now(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Let the named parameters, and no others, be frozen."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in names)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
