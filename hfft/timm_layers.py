"""What timm's models say about their own layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def head_parameters(model: Any) -> set[str]:
    """Name the parameters of a timm model's head, and of one beside it (VOLO's for tokens)."""
    named = model.pretrained_cfg.get("classifier") or ()
    paths = (named,) if isinstance(named, str) else tuple(named)
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    modules = found if isinstance(found, tuple) else (found,)
    heads = {id(p) for m in modules if isinstance(m, nn.Module) for p in m.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in heads or name.startswith(tuple(f"{path}." for path in paths))
    }


def numbered_layers(model: Any) -> dict[int, list[str]] | None:
    """Return number to parameter names as a timm model's matcher has them; None without one."""
    from timm.models import group_parameters

    try:
        layers = dict(group_parameters(model, model.group_matcher(coarse=True)))
    except (AttributeError, AssertionError, NotImplementedError):  # none, or none by stages
        return None
    # CaiT's matcher lays these blocks over the last of the others, and they run after them all
    late = [n for names in layers.values() for n in names if n.startswith("blocks_token_only.")]
    if late:
        layers = {number: [n for n in names if n not in late] for number, names in layers.items()}
        layers[max(layers) - 1] += late
    return layers


def own_module(parameter: str, others: Sequence[str]) -> str:
    """Return the shortest module path above a parameter that holds none of the others."""
    parts = parameter.split(".")
    paths = [".".join(parts[:length]) for length in range(1, len(parts))]
    return next((p for p in paths if not any(o.startswith(f"{p}.") for o in others)), parameter)
