"""The exponential moving average of a model's weights while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfft.averaging import decay_at, load_weights_into, update_ema, weights_of
from hfft.errors import InputError

FILE = "ema.safetensors"
"""What holds the average, in each checkpoint, and in output_dir at the end."""


class EmaCallback(TrainerCallback):
    """Average what learns, and the buffers, over the optimizer steps of one `Trainer.train()`.

    The model itself trains on as ever. The average lies beside it in float32 or better, on its
    device. It is kept in every checkpoint, and a training resumed from one goes on with it bit for
    bit; at the end it is written to `output_dir/ema.safetensors`, and `copy_to` puts it in a model.

    Args:
        model: the model the Trainer is given, unwrapped.
        decay: what a step leaves of the average, 0 < decay < 1.
        warmup: let the decay grow to that as 1 - step^(-2/3).

    Raises:
        InputError: the decay is out of range; on resuming, the checkpoint has no average.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise InputError(f"decay: expected a number between 0 and 1, found {decay}")
        self._model, self._decay, self._warmup = model, decay, warmup
        self._average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # the model's own
        self._statistics: list[str] | None = None  # that each process gathers on its own data

    def copy_to(self, model: nn.Module) -> None:
        """Put the average in the place of a model's weights."""
        load_weights_into(model, self._average)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the weights as they are, or from a checkpoint's average."""
        # frozen parameters are equal to their average
        frozen = {name for name, p in self._model.named_parameters() if not p.requires_grad}
        every = weights_of(self._model)
        self._weights = {name: tensor for name, tensor in every.items() if name not in frozen}
        self._average = {n: _at_least_float32(t).clone() for n, t in self._weights.items()}
        if state.global_step > 0:
            self._resume(_checkpoint(args, state) / FILE)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a step's weights in."""
        if self._statistics is None:
            self._statistics = _moving_statistics(self._model)
        decay = decay_at(state.global_step, self._decay, warmup=self._warmup)
        update_ema(self._average, self._weights, decay)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the average into the checkpoint."""
        self._share(args)
        if args.should_save:
            self._save(_checkpoint(args, state) / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the average beside the checkpoints."""
        self._share(args)
        if args.should_save:
            folder = Path(args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{FILE}.partial"
            self._save(partial)
            partial.replace(folder / FILE)
        self._weights = {}

    def _save(self, path: Path) -> None:
        # weights in channels-last order are no contiguous tensors
        save_file({name: tensor.contiguous() for name, tensor in self._average.items()}, path)

    def _resume(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(
                f"{path}: is missing: the checkpoint was written without EmaCallback; go on "
                f"without it too, or begin anew"
            )
        for name, tensor in load_file(path).items():
            self._average[name].copy_(tensor)

    def _share(self, args: TrainingArguments) -> None:
        """Average running statistics over processes, which is the moving average of their mean."""
        if args.world_size > 1:
            for name in self._statistics or ():
                dist.all_reduce(self._average[name])
                self._average[name] /= args.world_size


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder that the Trainer writes, and resumes from, at a step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor that a thousandth of a difference can be added to."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _moving_statistics(model: nn.Module) -> list[str]:
    """Return the names of running statistics that move, of a model in training mode."""
    return [
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, _NormBase) and module.training
        for name in ("running_mean", "running_var")
        if getattr(module, name) is not None
    ]
