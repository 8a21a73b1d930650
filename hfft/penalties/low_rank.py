"""The same for LoRA: theta = W0 + s B A, with W0 the frozen source, A (r, in), B (out, r).

theta - source is s B A, and every sum and gradient follows from products with A or B on one side:
none needs the dense (out, in) product, which is larger than the adapters by in / r.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfft.errors import InputError
from hfft.penalties.shards import is_sharded
from hfft.penalties.spaces import table_of
from hfft.penalties.weights import ALL, Moments


@dataclass(frozen=True)
class Product:
    """One adapted weight.

    Attributes:
        base: W0 as the matrix (out, in) that s B A is added to, frozen.
        learning: A and B as the parameters that learn; a convolution's have more dimensions.
        scale: s.
    """

    base: Tensor
    learning: tuple[Tensor, Tensor]
    scale: float

    @property
    def source(self) -> Tensor:
        """W0 in the precision of A and B, which peft keeps in float32 beside half precision."""
        return self.base.detach().to(self.learning[0].dtype)

    @property
    def a(self) -> Tensor:
        """A as a matrix, (r, in), sharing the parameter's memory."""
        return self.learning[0].detach().flatten(1)

    @property
    def b(self) -> Tensor:
        """B as a matrix, (out, r), sharing the parameter's memory."""
        return self.learning[1].detach().flatten(1)


class LowRank:
    """Adapted weights; `variables` are their A and B, in turn.

    Raises:
        InputError: the matrices are cut into shards.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        if any(is_sharded(one) for p in products for one in (p.base, *p.learning)):
            raise InputError(
                "penalty: LoRA's matrices are cut into shards (FSDP), and their product needs them "
                "whole; launch with DDP"
            )
        self.products = list(products)
        self.variables = [one for p in products for one in p.learning]
        self._ss: Tensor | None = None

    def moments(self, wanted: Collection[str] = ALL) -> Moments:
        """Return the sums of `Moments` for each adapted weight; all of them, whoever wants some.

        |s B A|^2 = s^2 tr((B^T B)(A A^T)) and <W0, s B A> = s tr((B^T W0) A^T).
        """
        rows = []
        for p in self.products:
            a, b, base = p.a, p.b, p.source
            dd = p.scale**2 * ((b.T @ b) * (a @ a.T)).sum()
            sd = p.scale * ((b.T @ base) * a).sum()
            rows.append(torch.stack([dd, sd]))
        dd, sd = table_of(rows, 2).unbind(1)
        if self._ss is None:  # the source never changes
            sizes = [p.source.square().sum().reshape(1) for p in self.products]
            self._ss = table_of(sizes, 1).flatten()
        return Moments(dd=dd, td=sd + dd, tt=self._ss + 2 * sd + dd, ss=self._ss)

    def add(self, targets: Sequence[Tensor | None], a: Sequence[float], b: Sequence[float]) -> None:
        """Add the gradients that `a[i] * theta + b[i] * d` has with respect to each A and B.

        With D = u W0 + v s B A the dense gradient: s B^T D for A and s D A^T for B. As for
        `Dense`, `a` and `b` have one number a variable: A's and B's may differ by learning rate.
        """
        for n, p in enumerate(self.products):
            own_a, own_b = p.a, p.b
            to_a, to_b = targets[2 * n], targets[2 * n + 1]
            changes: list[tuple[Tensor | None, Tensor]] = []
            if to_a is not None:
                along, across = _dense(a[2 * n], b[2 * n], p.scale)
                change = (own_b.T @ own_b) @ own_a * (across * p.scale)
                if along:
                    change.add_(own_b.T @ p.source, alpha=along * p.scale)
                changes.append((to_a, change))
            if to_b is not None:
                along, across = _dense(a[2 * n + 1], b[2 * n + 1], p.scale)
                change = own_b @ (own_a @ own_a.T) * (across * p.scale)
                if along:
                    change.add_(p.source @ own_a.T, alpha=along * p.scale)
                changes.append((to_b, change))
            for target, change in changes:  # both are computed before either weight moves
                assert target is not None
                target.add_(change.view_as(target))


def _dense(a: float, b: float, scale: float) -> tuple[float, float]:
    """Turn a theta + b d into multiples of W0 and of B A."""
    return a, (a + b) * scale
