"""How hidden states become one vector.

A copy of this file travels with the models that use it. It imports nothing of ours.
"""

from __future__ import annotations

import inspect
from typing import Literal

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PretrainedConfig

Pooling = Literal["cls", "mean", "max", "last"]
"""Of the tokens that are no padding: the first, the mean, the greatest of each value, the last."""


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool hidden states (B, T, D) to (B, D), over the tokens that `mask` (B, T) lets through."""
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    mask = mask.long()
    padding = (mask == 0).unsqueeze(-1)
    if pooling == "mean":  # summed in float32: bfloat16 loses what long texts add
        total = hidden.float().masked_fill(padding, 0).sum(dim=1)
        return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden.dtype)
    if pooling == "max":
        return hidden.masked_fill(padding, torch.finfo(hidden.dtype).min).amax(dim=1)
    # argmax is the first of the greatest; padding may stand on either side
    places = mask if pooling == "cls" else mask * torch.arange(mask.shape[1], device=mask.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), places.argmax(dim=1)]


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Return what keeps a model from a pooler, which would get no gradient: DDP waits for it.

    Args:
        config: the model's.
    """
    kind = MODEL_MAPPING.get(type(config), None)
    known = inspect.signature(kind.__init__).parameters if inspect.isclass(kind) else ()
    return {"add_pooling_layer": False} if "add_pooling_layer" in known else {}
