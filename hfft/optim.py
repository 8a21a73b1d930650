"""Parameter groups: weight decay, layer-wise decay and the head's multiplier; carried state.

Groups are made anew for each stage and never edited: an optimizer whose groups were edited can't
be loaded again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
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
    tower_rates: Mapping[str, float] = MappingProxyType({}),
    tower_decays: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Return each parameter's peak learning rate by name.

    A group d steps below the head learns at `learning_rate * layer_decay**d` (Howard & Ruder
    2018; Bao et al. 2021), the head at `learning_rate * head_multiplier`.

    Args:
        groups: of the model.
        learning_rate: of the head and, without decay, of all that is below it.
        layer_decay: each group's rate over that of the one above it; None: 1.
        head_multiplier: the head's rate over `learning_rate`; None: 1.
        tower_rates: of towers that have a rate of their own in the place of `learning_rate`.
        tower_decays: of those that have a decay of their own.

    Raises:
        InputError: a tower that there is not, or a decay without an order of layers.
    """
    decays = dict.fromkeys(groups.towers, layer_decay or 1.0) | dict(tower_decays)
    rates = dict.fromkeys(groups.towers, learning_rate) | dict(tower_rates)
    found = dict.fromkeys(groups.head.parameters, learning_rate * (head_multiplier or 1.0))
    distance = groups.distance_to_head()
    for tower in rates | decays:
        own = [name for group in groups.tower(tower) for name in group.parameters]
        decay, place = decays[tower], f"towers.{tower}." if tower in tower_decays else ""
        if decay != 1:
            groups.require_order(f"{place}layer_decay: {decay}")
        found |= {name: rates[tower] * decay ** distance[name] for name in own}
    return found


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
