"""Part of a model's weights in a file, under the names they have in memory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def save_weights(model: nn.Module, path: Path, leave_out: Collection[str]) -> None:
    """Write all tensors of a model but the named ones; of those that share memory, one."""
    state = model.state_dict()
    kept: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        if name not in leave_out:
            kept.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), name)
    save_file({name: state[name].contiguous() for name in kept.values()}, path)


def load_weights_of(model: nn.Module, path: Path) -> None:
    """Put back what `save_weights` wrote; the rest of the model stays as it is.

    Raises:
        RuntimeError: the file holds what the model does not have.
    """
    result = model.load_state_dict(load_file(path), strict=False)
    if result.unexpected_keys:
        raise RuntimeError(f"{path} holds {result.unexpected_keys[0]}, which the model lacks")
