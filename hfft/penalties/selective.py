"""Selective projection decay: weights are drawn back only where a step moved them away for nothing.

Tian, Huang, Kira 2024, "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfft.penalties.penalty import Attachment, Penalty, Setting, register
from hfft.penalties.spaces import Dense


def projected(
    theta: Tensor, before: Tensor, source: Tensor, gradient: Tensor, strength: float
) -> Tensor:
    """Return one tensor after selective projection decay; all are of theta's shape.

    Where the gradient points along the difference, <gradient, before - source> > 0, descent leads
    back to the source anyway. If the step led further away all the same, a share `strength` of
    its part in the distance is taken back: theta - strength * r * (theta - source), with r the
    growth of the distance over the distance, between 0 and 1.

    Args:
        theta: the weights after the optimizer's step.
        before: the weights before it.
        source: theta_s.
        gradient: the gradient that the step was made of.
        strength: 1 puts theta back at the distance it had.
    """
    if (gradient * (before - source)).sum() <= 0:
        return theta
    return theta - strength * growth((theta - source).norm(), (before - source).norm()) * (
        theta - source
    )


def growth(after: Tensor, before: Tensor) -> Tensor:
    """Return the share of the distance `after` that was not there `before`, between 0 and 1."""
    grown = (after - before) / torch.where(after > 0, after, 1)
    return grown.clamp(0, 1)


class Selection(Attachment):
    """Selective projection decay around each step of an optimizer."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._parts = [
            (Dense(part.weights, part.sources), part.strength)
            for part in setting.parts
            if part.weights
        ]
        self._leads_away: list[tuple[Tensor, Tensor]] = []
        optimizer = setting.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def value(self) -> tuple[float, float]:
        """Return the distance from the source, and 0: this is no term of the objective."""
        return sum(float(dense.moments().dd.sum()) for dense, _ in self._parts) ** 0.5, 0.0

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._leads_away = [
            (dense.along(), dense.moments(("dd",)).dd.sqrt()) for dense, _ in self._parts
        ]

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        factor = self._setting.factor()
        for (dense, strength), (along, before) in zip(self._parts, self._leads_away, strict=True):
            share = growth(dense.moments(("dd",)).dd.sqrt(), before) * (along > 0)
            back = (-strength * factor * share).tolist()
            dense.add([w.detach() for w in dense.variables], [0.0] * len(back), back)


@register("spd")
class SPD(Penalty):
    """Selective projection decay, inside the optimizer's step."""

    modes = ("coupled",)
    for_lora = False

    def attach(self, setting: Setting) -> Selection:
        """Start to draw back."""
        return Selection(setting)
