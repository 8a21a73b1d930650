"""Keeps a contrastive model's logit scale where CLIP keeps it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

MOST = math.log(100)
"""The greatest logarithm of the scale: logits stay below 100 (Radford et al. 2021, 2.3)."""


class LogitScaleCallback(TrainerCallback):
    """Clips a model's `logit_scale` to [0, ln 100] after every step of the optimizer.

    One that begins above, as SigLIP's may, is kept from growing; a frozen one is left as it is.

    Args:
        model: with a parameter of that name, unwrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._scale = model.get_parameter("logit_scale")
        self._most = max(MOST, self._scale.max().item())

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Clip it."""
        if self._scale.requires_grad:
            with torch.no_grad():
                self._scale.clamp_(0, self._most)
