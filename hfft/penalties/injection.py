"""A penalty on activations at work: a gradient that joins the loss's on its way back.

The identity in the forward pass, and `gradient + scale * dR/dfeatures` in the backward pass: the
penalty acts in any training loop, whatever computes the loss, and through anything that keeps
gradients in order (accumulation, DDP, gradient checkpointing). All is computed in the backward
pass, which runs once for each forward pass that is trained on. What a checkpoint recomputes only
for the sake of its tensors has none, and is not counted twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from hfft.errors import InputError
from hfft.penalties.activations import precise
from hfft.penalties.penalty import Attachment, Setting

Rule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Gives the value at activations, and the gradient with respect to them."""


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, rule: Rule, act: Any, copy: bool) -> Tensor:
        ctx.save_for_backward(features)
        ctx.rule, ctx.act = rule, act
        return features.clone() if copy else features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (features,) = ctx.saved_tensors
        with torch.autocast(features.device.type, enabled=False):
            value, own = ctx.rule(precise(features))
            scale = ctx.act(value)
            if scale == 0:
                return gradient, None, None, None
            # the sum is rounded once, where activations are in half precision
            return (precise(gradient) + scale * own).to(gradient.dtype), None, None, None


def inject(
    features: Tensor, rule: Rule, act: Callable[[Tensor], float], *, copy: bool = False
) -> Tensor:
    """Return the same activations, through which the penalty's gradient will be added.

    Without a gradient to come (evaluation, or nothing that learns below) nothing happens.

    Args:
        features: activations, of any shape.
        rule: the penalty; it is given them in float32 at least.
        act: told the value at every backward pass, gives what the gradient is multiplied by.
        copy: for activations that the next module may overwrite.
    """
    if not (torch.is_grad_enabled() and features.requires_grad):
        return features
    result: Tensor = _Inject.apply(features, rule, act, copy)
    return result


class Injection(Attachment):
    """Penalises activations at some places of a model; a subclass sets the hooks.

    Args:
        setting: where.
        places: how many places there are. R is the sum over them of means over the micro-batches.
    """

    def __init__(self, setting: Setting, places: int = 1) -> None:
        self._setting = setting
        self._strength = setting.parts[0].strength  # one for all: `by_pattern` is False
        self._sums: list[Tensor | None] = [None] * places
        self.hooks: list[RemovableHandle] = []
        # a module that works in place would overwrite what is kept for the backward pass
        self._copy = any(getattr(module, "inplace", False) for module in setting.model.modules())

    def inject(self, features: Tensor, rule: Rule, place: int = 0) -> Tensor:
        """Return the activations of a place, penalised."""

        def act(value: Tensor) -> float:
            weight = self._strength * self._setting.factor()
            row = torch.stack([torch.ones_like(value), value, weight * value])
            row = row.where(value.isfinite(), 0)  # steps that fp16 leaves out
            before = self._sums[place]
            self._sums[place] = row if before is None else before + row
            return weight * self._setting.loss_scale()

        return inject(features, rule, act, copy=self._copy)

    def value(self) -> tuple[float, float]:
        """Return R, and strength times R: means over micro-batches and processes since last time.

        Both are 0 where nothing was trained on.
        """
        device = next(self._setting.model.parameters()).device
        none = torch.zeros(3)
        rows = torch.stack(
            [(none if row is None else row).to(device, torch.float32) for row in self._sums]
        )
        self._sums = [None] * len(self._sums)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(rows)
        means = rows[:, 1:] / rows[:, :1].clamp(min=1)
        value, weighted = means.sum(0).tolist()
        return value, weighted

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self.hooks:
            self.hooks.pop().remove()


def refuse_replicas(module: nn.Module) -> None:
    """Raise InputError in a copy of the model that DataParallel made for one forward pass."""
    if getattr(module, "_is_replica", False):
        raise InputError(
            "penalty: penalties on activations don't work in torch's DataParallel, which the "
            "Trainer uses on several GPUs without a launcher; launch with torchrun or accelerate"
        )
