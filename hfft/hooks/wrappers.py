"""What launchers lay around models, parameters' names and optimizers."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState

_IN_NAMES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def accelerator_state() -> AcceleratorState | None:
    """Return accelerate's state if there is one; AcceleratorState() alone would make it."""
    return AcceleratorState() if AcceleratorState._shared_state else None


def bare_name(name: str) -> str:
    """Return a parameter's name as the unwrapped model has it."""
    for wrapper in _IN_NAMES:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """Return torch's own optimizer from under accelerate's; None where there is another kind."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
