"""Parameter groups: weight decay, layer-wise decay and the head's multiplier; carried state.

Groups are made anew for each stage and never edited: an optimizer whose groups were edited can't
be loaded again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from hfft.layers import LayerGroups

OptimizerState = dict[str, dict[str, Any]]
"""An optimizer's state by parameter name instead of by position."""


def learning_rates(
    groups: LayerGroups,
    learning_rate: float,
    *,
    layer_decay: float | None = None,
    head_multiplier: float | None = None,
) -> dict[str, float]:
    """Return each parameter's peak learning rate by name.

    A group d steps below the head learns at `learning_rate * layer_decay**d` (Howard & Ruder
    2018; Bao et al. 2021), the head at `learning_rate * head_multiplier`.
    """
    if layer_decay is not None and layer_decay != 1:
        groups.require_order(f"layer_decay: {layer_decay}")
    decay, multiplier = layer_decay or 1.0, head_multiplier or 1.0
    return {
        name: learning_rate * (decay**distance if distance else multiplier)
        for name, distance in groups.distance_to_head().items()
    }


def parameter_groups(
    model: nn.Module, rates: Mapping[str, float], decayed: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Group the parameters that require gradients by learning rate and weight decay.

    Args:
        model: the model, unwrapped.
        rates: each parameter's peak learning rate.
        decayed: names of the parameters with weight decay. Vectors have none all the same: they
            are biases, scales and norms, and no list of names knows every norm (timm's `bn1`).
        weight_decay: their coefficient.

    Returns:
        One dict for each pair of rate and decay, in the model's own order; `params` are pairs of
        name and tensor, as torch's optimizers take them.
    """
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name in decayed and parameter.ndim > 1
        key = rates[name], weight_decay if decays else 0.0
        group = found.setdefault(key, {"params": [], "lr": key[0], "weight_decay": key[1]})
        group["params"].append((name, parameter))
    return list(found.values())


def state_by_name(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Return the optimizer's state by parameter name, sharing its tensors."""
    return {
        name: optimizer.state[parameter]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def carry_state(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Put an earlier stage's state in for the parameters that go on learning."""
    own = optimizer.state_dict()  # loading it back puts every tensor where the optimizer wants it
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    own["state"] = {place: state[name] for place, name in enumerate(names) if name in state}
    optimizer.load_state_dict(own)
