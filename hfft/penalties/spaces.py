"""Where the difference theta - source lives: whole tensors, parts of them, or low-rank products.

A space gives the sums that a penalty needs, and adds multiples of its gradient to whatever it is
told to: gradients, or the weights themselves. Work goes block by block, so that what is computed
in between never takes the memory of a second model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from hfft.penalties.shards import local, sharded_like, summed
from hfft.penalties.weights import ALL, Moments

# elements: on a CPU, what is made of a block is still in the cache when it is read again
_BLOCK = {"cpu": 2**17, "other": 2**25}


class Dense:
    """Weights and their source values, as they are or as this process's parts of them.

    Args:
        weights: the learning parameters.
        source: their source values, whole or cut as the weights are; None stands for zeros.
        importance: a factor for each element of the squared difference, as `source`; None: 1.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        source: Sequence[Tensor | None],
        importance: Sequence[Tensor] | None = None,
    ) -> None:
        self.variables = list(weights)
        self.source = [
            None if s is None else _beside(sharded_like(s, w), local(w))
            for w, s in zip(weights, source, strict=True)
        ]
        self.importance = [
            _beside(sharded_like(i, w), local(w))
            for w, i in zip(weights, importance or (), strict=importance is not None)
        ]
        self._ss: Tensor | None = None

    def moments(self, wanted: Collection[str] = ALL) -> Moments:
        """Return the sums, over all processes that hold parts; 0 for those that nobody wants."""
        own = [
            _sums(local(w), s, self.importance[n] if self.importance else None, wanted)
            for n, (w, s) in enumerate(zip(self.variables, self.source, strict=True))
        ]
        if self._ss is None:  # the source never changes
            pairs = zip(self.source, self.variables, strict=True)
            self._ss = summed(table_of([_size(s, w) for s, w in pairs], 1), self.variables)
        table = torch.cat([summed(table_of(own, 3), self.variables), self._ss], dim=1)
        return Moments(*table.unbind(1))

    def along(self) -> Tensor:
        """Return <gradient, theta - source> for each weight, 0 without one: of shape (N,)."""
        own = [
            _wide(torch.zeros(1, device=w.device))
            if w.grad is None
            else _along(local(w.grad), local(w), s)
            for w, s in zip(self.variables, self.source, strict=True)
        ]
        return summed(table_of(own, 1), self.variables).flatten()

    def add(self, targets: Sequence[Tensor | None], a: Sequence[float], b: Sequence[float]) -> None:
        """Add `a[i] * theta[i] + b[i] * (theta[i] - source[i])` to each target that is there."""
        for n, (weight, target) in enumerate(zip(self.variables, targets, strict=True)):
            if target is None or (a[n] == 0 and b[n] == 0):
                continue
            importance = self.importance[n] if self.importance else None
            _add(local(target), local(weight), self.source[n], importance, a[n], b[n])


def _beside(tensor: Tensor, weight: Tensor) -> Tensor:
    """Bring a tensor to a weight's device and memory layout; as it is where that is so already."""
    tensor = tensor.detach().to(weight.device)
    if tensor.stride() == weight.stride():
        return tensor
    return torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Cut tensors of one shape into blocks, flat where all lie in memory in one piece."""
    first = tensors[0]
    assert first is not None
    size = _BLOCK.get(first.device.type, _BLOCK["other"])
    if first.numel() <= size or not all(t is None or t.is_contiguous() for t in tensors):
        yield tensors
        return
    pieces = [None if t is None else torch.split(t.view(-1), size) for t in tensors]
    for n in range(-(-first.numel() // size)):
        yield tuple(None if p is None else p[n] for p in pieces)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _difference(weight: Tensor, source: Tensor | None) -> Tensor:
    weight = _precise(weight)
    return weight if source is None else weight - source


def _sums(
    weight: Tensor, source: Tensor | None, importance: Tensor | None, wanted: Collection[str]
) -> Tensor:
    """Return <d, d>, <theta, d> and <theta, theta>: float64, of shape (3,)."""
    found = []
    for w, s, i in _blocks(weight, source, importance):
        assert w is not None
        d, w = _difference(w, s).flatten(), _precise(w).flatten()
        weighted = d if i is None else d * i.flatten()
        pairs = {"dd": (weighted, d), "td": (w, d), "tt": (w, w)}
        found += [torch.dot(*pairs[k]) if k in wanted else d.new_zeros(()) for k in pairs]
    return _wide(torch.stack(found)).view(-1, 3).sum(0)


def _along(gradient: Tensor, weight: Tensor, source: Tensor | None) -> Tensor:
    """Return <gradient, d>: float64, of shape (1,)."""
    found = []
    for g, w, s in _blocks(gradient, weight, source):
        assert g is not None
        assert w is not None
        found.append(torch.dot(_precise(g).flatten(), _difference(w, s).flatten()))
    return _wide(torch.stack(found)).sum(0, keepdim=True)


def _size(source: Tensor | None, weight: Tensor) -> Tensor:
    """Return <source, source>: float64, of shape (1,)."""
    if source is None:
        return _wide(torch.zeros(1, device=weight.device))
    flat = [_precise(s).flatten() for (s,) in _blocks(source) if s is not None]
    return _wide(torch.stack([torch.dot(s, s) for s in flat])).sum(0, keepdim=True)


def _wide(sums: Tensor) -> Tensor:
    """Return float64, where the device has it (Apple's GPUs have not)."""
    return sums if sums.device.type == "mps" else sums.double()


def table_of(rows: Sequence[Tensor], width: int) -> Tensor:
    """Put rows together on the CPU: one wait for a device, however many rows."""
    if not rows:
        return torch.zeros(0, width, dtype=torch.float64)
    return torch.stack([row.to(rows[0].device) for row in rows]).cpu().double()


def _add(
    target: Tensor,
    weight: Tensor,
    source: Tensor | None,
    importance: Tensor | None,
    a: float,
    b: float,
) -> None:
    if target.numel() == 0:  # more processes than rows
        return
    is_move = a == 0 and importance is None and target.data_ptr() == weight.data_ptr()
    if is_move and source is not None and source.dtype == weight.dtype:
        target.lerp_(source, -b)  # reads and writes memory once
        return
    for out, w, s, i in _blocks(target, weight, source, importance):
        assert out is not None
        assert w is not None
        d = _difference(w, s)
        if i is not None:
            d = d * i
        if a == 0:
            out.add_(d, alpha=b)
        elif b == 0 or (s is None and i is None):  # then d is theta itself
            out.add_(_precise(w), alpha=a + b)
        else:  # target and weight may be the same tensor: read everything before writing
            out.add_(d.add_(_precise(w), alpha=a / b), alpha=b)
