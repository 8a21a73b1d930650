"""A penalty on weights at work: a hook on the optimizer's own step.

That place settles the order of things for every loop that ends in `optimizer.step()`: gradients
are accumulated, averaged over processes, unscaled and clipped by then, so the penalty counts once
a step, is not clipped, and does not appear in the loss; and a step that fp16 scaling skips is no
step here either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfft.errors import InputError
from hfft.penalties.penalty import Attachment, Setting


class Bound(ABC):
    """A penalty on given tensors."""

    variables: Sequence[Tensor]
    """What learns."""

    @abstractmethod
    def value(self) -> float:
        """Return R."""

    @abstractmethod
    def add(self, targets: Sequence[Tensor | None], factors: Sequence[float], step: int) -> None:
        """Add `factors[i]` times R's gradient for variable i to target i, where there is one."""


class Pull(Attachment):
    """Adds penalties' gradients before each step of an optimizer.

    Args:
        bound: penalties, each with its strength.
        setting: where.

    Raises:
        InputError: the optimizer does not hold what is penalised.
    """

    def __init__(self, bound: Sequence[tuple[Bound, float]], setting: Setting) -> None:
        self._bound, self._setting = bound, setting
        groups = setting.optimizer.param_groups
        self._group_of = {id(p): group for group in groups for p in group["params"]}
        if not all(id(v) in self._group_of for one, _ in bound for v in one.variables):
            raise InputError(
                "penalty: the optimizer does not hold all that is penalised; a callback must be "
                "given the Trainer's own model, after it was frozen"
            )
        self._hook = setting.optimizer.register_step_pre_hook(self._before_step)

    def value(self) -> tuple[float, float]:
        """Return R, and the sum of strength times R."""
        factor = self._setting.factor()
        values = [(one.value(), strength) for one, strength in self._bound]
        return sum(v for v, _ in values), factor * sum(v * strength for v, strength in values)

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        factor = self._setting.factor() * _scale(optimizer, self._setting.mode)
        for one, strength in self._bound:
            if strength * factor == 0:
                continue
            has_gradient = [v.grad is not None for v in one.variables]
            if self._setting.mode == "coupled":
                targets = [v.grad for v in one.variables]
                factors = [strength * factor] * len(targets)
            else:
                targets = [
                    v.detach() if there else None
                    for v, there in zip(one.variables, has_gradient, strict=True)
                ]
                rates = [float(self._group_of[id(v)]["lr"]) for v in one.variables]
                factors = [-rate * strength * factor for rate in rates]
            one.add(targets, factors, self._setting.step())


def _scale(optimizer: torch.optim.Optimizer, mode: str) -> float:
    """Return what a fused optimizer under fp16 will do to the gradients itself.

    It takes them scaled, and divides (`grad_scale`) or leaves the step out (`found_inf`) in its
    kernel: then a coupled gradient must be scaled as they are, and a decoupled one left out too.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and float(found_inf) > 0:
        return 0.0
    grad_scale = getattr(optimizer, "grad_scale", None)
    return float(grad_scale) if grad_scale is not None and mode == "coupled" else 1.0
