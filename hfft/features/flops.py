"""What a model computes, counted layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D


@contextmanager
def multiplications(model: nn.Module, note: Callable[[float], None]) -> Iterator[None]:
    """Give `note` the floating-point operations of each linear layer and convolution that runs.

    Products of activations (attention) are left out: they are a small part unless texts are long.
    """

    def count(module: nn.Module, _args: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and isinstance(output, Tensor):
            each = weight.shape[0] if isinstance(module, _ConvNd) else output.shape[-1]
            note(2 * weight.numel() * output.numel() / each)

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D | _ConvNd)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
