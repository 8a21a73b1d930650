"""Tensors that are spread over processes (FSDP2's DTensors): this process's part, and sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharing its memory."""
    tensor = tensor.detach()
    return _part(tensor) if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, cut as `model` is; a copy where it is cut."""
    if not isinstance(model, DTensor):
        return local(tensor)
    if isinstance(tensor, DTensor):
        return _part(tensor)
    # every process holds the whole: nothing has to be sent
    cut = distribute_tensor(
        tensor.detach().to(model.device), model.device_mesh, model.placements, src_data_rank=None
    )
    return _part(cut).clone()


def _part(tensor: DTensor) -> Tensor:
    part: Tensor = tensor.to_local().detach()
    return part


def summed(rows: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add up each tensor's row over the processes that hold parts of it.

    Args:
        rows: sums over this process's parts, of shape (N, ...).
        tensors: the N tensors they belong to.
    """
    for like, places in _by_layout(tensors).items():
        index = torch.tensor(places, device=rows.device)
        part = rows.index_select(0, index)
        device = _part(like).device
        moved = part.to(device)
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(moved, group=like.device_mesh.get_group(dimension))
        rows = rows.index_copy(0, index, moved.to(rows.device))
    return rows


def _by_layout(tensors: Sequence[Tensor]) -> dict[DTensor, list[int]]:
    """Group the places of sharded tensors by mesh and placement; one tensor stands for each."""
    found: dict[object, tuple[DTensor, list[int]]] = {}
    for place, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            layout = (id(tensor.device_mesh), tuple(map(str, tensor.placements)))
            found.setdefault(layout, (tensor, []))[1].append(place)
    return dict(found.values())
