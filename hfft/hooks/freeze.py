"""Frozen means frozen: no gradient, eval mode, and nothing moves, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfft.layers import Freeze, find_layer_groups, frozen_modules


def _stay(module: nn.Module, _mode: bool = True) -> nn.Module:
    """Stand in for `module.train`, which returns the module."""
    return module


@contextmanager
def kept_in_eval(model: nn.Module, *, adapted: bool = False) -> Iterator[None]:
    """Hold the frozen modules of a model in eval mode, whoever calls `model.train()`.

    The Trainer calls it before every step; without this, BatchNorm statistics of a frozen
    backbone go on moving and its dropout stays on.

    Args:
        model: with `requires_grad` set.
        adapted: whether adapters learn beside frozen weights. Dropout and stochastic depth between
            adapted layers then regularise what learns, as in full fine-tuning, and stay on;
            modules without an adapter in them are frozen all the same.
    """
    held = list(dict.fromkeys(frozen_modules(model)))  # one that two parents share stands twice
    if adapted:
        held = [module for module in held if next(module.parameters(), None) is not None]
    for module in held:
        module.eval()
        module.train = partial(_stay, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in held:
            del module.train


class FreezeCallback(TrainerCallback):
    """Freeze part of a model for the length of one `Trainer.train()`.

    Give it to the Trainer when that is made: `requires_grad` is set then, before the optimizer
    and the distributed wrapper are, and both are right. What is frozen stays frozen afterwards;
    another FreezeCallback may set it anew.

    Args:
        model: the model the Trainer is given, unwrapped.
        freeze: `none`, `backbone`, a number of groups from the input, or name patterns.

    Raises:
        InputError: a pattern that matches nothing, or a number beyond the groups there are.
    """

    def __init__(self, model: Any, freeze: Freeze) -> None:
        frozen = find_layer_groups(model).frozen(freeze)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self._model = model
        self._held = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the frozen modules into eval mode."""
        self._held.enter_context(kept_in_eval(self._model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the modules follow `model.train()` again."""
        self._held.close()
