"""The orthogonal penalty at work: R = sum over matrices of |theta^T source|_F^2.

Its cost is that of matrix products, a quarter of a small training step. So matrices take turns:
each is penalised in every `interval`-th step, `interval` times as strongly, which comes to the same
over a turn of plain gradient steps. (Adam's second moments see the strong steps: there it holds a
little less than at interval 1.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hfft.errors import InputError
from hfft.penalties.kinds import WeightPenalty
from hfft.penalties.low_rank import LowRank, Product
from hfft.penalties.penalty import register
from hfft.penalties.pull import Bound
from hfft.penalties.shards import local, summed
from hfft.penalties.spaces import Dense
from hfft.sections import Section


class _Matrices(Bound):
    """Whole weights, or their rows.

    With G = source source^T, (out, out), R = <theta, G theta>. G stands in for the source where it
    is the smaller of the two, and saves one of two products.
    """

    def __init__(self, space: Dense, interval: int) -> None:
        self.variables = space.variables
        self._kept: list[tuple[Tensor, bool]] = []  # the source (out, in), or G; whether it is G
        for n, weight in enumerate(space.variables):
            source = space.source[n]
            assert source is not None
            space.source[n] = None  # kept below, as it is or as G
            matrix = source.flatten(1)
            as_gram = weight.shape[0] <= math.prod(weight.shape[1:]) and not _is_cut(weight)
            self._kept.append((_gram(matrix) if as_gram else matrix, as_gram))
        self._turns = _turns([_cost(w) for w in self.variables], interval)

    def value(self) -> float:
        products = [self._product(n) for n in range(len(self._kept))]
        rows = torch.stack([(theta * product).sum().double() for theta, product in products])
        return float(summed(rows, self.variables).sum())

    def add(self, targets: Sequence[Tensor | None], factors: Sequence[float], step: int) -> None:
        for n in self._turns[step % len(self._turns)]:
            target = targets[n]
            if target is not None:
                _, product = self._product(n)
                target = local(target)
                target.add_(product.view_as(target), alpha=2 * len(self._turns) * factors[n])

    def _product(self, n: int) -> tuple[Tensor, Tensor]:
        """Return theta as a matrix, and G theta."""
        weight, (kept, is_gram) = self.variables[n], self._kept[n]
        theta = local(weight).flatten(1)
        if is_gram:
            return theta, kept.to(theta.dtype) @ theta
        kept = kept.to(theta.dtype)
        overlap = kept.T @ theta
        if _is_cut(weight):
            _sum_over_rows(overlap, weight)
        return theta, kept @ overlap


class _Products(Bound):
    """LoRA: theta = W0 + s B A, and R = |W0^T (W0 + s B A)|^2 without the dense product."""

    def __init__(self, space: LowRank, interval: int) -> None:
        self.variables, self._products = space.variables, space.products
        self._of_source = [_squared_gram(p.source) for p in space.products]
        self._turns = _turns([p.base.numel() * len(p.a) for p in space.products], interval)

    def value(self) -> float:
        total = 0.0
        for p, constant in zip(self._products, self._of_source, strict=True):
            a, s, base, t = p.a, p.scale, p.source, _overlap(p)
            cross = ((base @ a.T) * (base @ t)).sum()
            total += constant + 2 * s * float(cross) + s**2 * float(((t.T @ t) * (a @ a.T)).sum())
        return total

    def add(self, targets: Sequence[Tensor | None], factors: Sequence[float], step: int) -> None:
        for n in self._turns[step % len(self._turns)]:
            p, times = self._products[n], 2 * self._products[n].scale * len(self._turns)
            a, b, base, t = p.a, p.b, p.source, _overlap(p)
            bg = base @ t  # G B, (out, r)
            to_a = bg.T @ base + p.scale * (bg.T @ b) @ a
            to_b = base @ (base.T @ (base @ a.T)) + p.scale * bg @ (a @ a.T)
            for target, change, factor in zip(
                targets[2 * n : 2 * n + 2], (to_a, to_b), factors[2 * n : 2 * n + 2], strict=True
            ):
                if target is not None:
                    target.add_(change.view_as(target), alpha=times * factor)


def _overlap(p: Product) -> Tensor:
    """Return W0^T B, of shape (in, r)."""
    return p.source.T @ p.b


def _gram(matrix: Tensor) -> Tensor:
    precise = matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix
    return precise @ precise.T


def _squared_gram(base: Tensor) -> float:
    base = base.detach()
    gram = base @ base.T if len(base) <= base.shape[1] else base.T @ base
    return float(gram.double().square().sum())


def _cost(weight: Tensor) -> int:
    """Return the multiplications of one product with a weight's source."""
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    return rows * rows * columns if rows <= columns else 2 * rows * columns * columns


def _turns(costs: Sequence[int], interval: int) -> list[list[int]]:
    """Share matrices out to turns of about equal cost: the dearest first, to the cheapest turn."""
    turns: list[list[int]] = [[] for _ in range(interval)]
    totals = [0] * interval
    for n in sorted(range(len(costs)), key=lambda n: -costs[n]):
        cheapest = totals.index(min(totals))
        turns[cheapest].append(n)
        totals[cheapest] += costs[n]
    return turns


def _is_cut(weight: Tensor) -> bool:
    return isinstance(weight, DTensor) and any(p.is_shard() for p in weight.placements)


def _sum_over_rows(overlap: Tensor, weight: Tensor) -> None:
    """Add up what each process's rows give."""
    assert isinstance(weight, DTensor)
    for dimension, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            if placement.dim != 0:
                raise InputError("penalty.kind: orthogonal needs weights that are cut by rows")
            dist.all_reduce(overlap, group=weight.device_mesh.get_group(dimension))


@register("orthogonal")
class Orthogonal(WeightPenalty):
    """|theta^T theta_s|_F^2 for each weight matrix; convolutions are flattened to (out, rest)."""

    class Options(Section):
        """What stands beside `kind` and `strength`."""

        interval: int = Field(
            4, gt=0, description="each matrix is penalised every this many steps, as much stronger"
        )

    def covers(self, name: str, shape: Sequence[int]) -> bool:
        """Matrices and convolutions only."""
        return len(shape) > 1

    def bind(self, space: Dense | LowRank) -> Bound:
        """Return the penalty on a space."""
        options: Any = self.options
        if isinstance(space, LowRank):
            return _Products(space, options.interval)
        return _Matrices(space, options.interval)
