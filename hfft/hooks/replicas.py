"""Replicas that are the same on every process, buffers included."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Make the running statistics of learning BatchNorm layers the mean over processes.

    DDP keeps parameters equal, but each process gathers BatchNorm statistics on its own part of
    the batch (with `broadcast_buffers` off; with it on, the main process's alone would count).
    Frozen layers are in eval mode and left alone, bit for bit.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    dist.all_reduce(buffer)
                    buffer /= dist.get_world_size()


class ReplicasCallback(TrainerCallback):
    """Average running statistics over processes before each evaluation and save, and at the end."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Before what the step that just ended asks for."""
        if control.should_evaluate or control.should_save:
            self._average(args, model)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Before what the epoch that just ended asks for."""
        self._average(args, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Before the next stage starts from this model."""
        self._average(args, model)

    def _average(self, args: TrainingArguments, model: nn.Module | None) -> None:
        if args.world_size > 1 and model is not None:
            average_statistics(model)
