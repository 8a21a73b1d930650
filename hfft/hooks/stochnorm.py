"""StochNorm: BatchNorm that trusts its running statistics, at random, while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfft.errors import InputError
from hfft.layers import frozen_modules


def chosen_by_channel(by_batch: Tensor, by_running: Tensor, p: float) -> Tensor:
    """Take each channel from `by_running` with probability p, and from `by_batch` otherwise.

    Args:
        by_batch: (B, C, ...), normalised with statistics of the mini-batch.
        by_running: (B, C, ...), normalised with running statistics.
        p: a probability. One draw a channel, for all of the batch, from the global generator of
            the device.
    """
    channels = by_batch.shape[1]
    running = torch.rand(channels, device=by_batch.device) < p  # [0, 1): all at 1, none at 0
    return torch.where(running.view(-1, *[1] * (by_batch.dim() - 2)), by_running, by_batch)


@contextmanager
def stochastically_normalised(model: nn.Module, p: float) -> Iterator[None]:
    """Normalise in training, channel by channel, with either mini-batch or running statistics.

    A channel takes its running statistics, as they are before the batch, with probability p, drawn
    anew in each forward pass (Kou, You, Long & Wang 2020, "Stochastic Normalization"). They are
    constants to the gradient, and move as BatchNorm moves them, whatever is drawn. 0 is BatchNorm,
    bit for bit; 1 trains as it evaluates. The authors' code counts p the other way round, as the
    probability of the mini-batch; their 0.5 is the same either way.

    Covers the BatchNorm layers (torch's, and timm's with an activation) that learn, as they stand
    on entry, and track statistics; of others with a forward of their own it knows nothing. As with
    BatchNorm, recomputation under gradient checkpointing moves the statistics a second time.

    Raises:
        InputError: p out of range, no layer to cover, SyncBatchNorm that learns.
    """
    covered = covered_layers(model, p)
    if p == 0:
        yield
        return
    with ExitStack() as changes:
        for module in covered:
            changes.callback(_restore, module, vars(module).get("forward"))
            module.forward = partial(_forward, module, module.forward, p)  # type: ignore[method-assign]
        yield


class StochNormCallback(TrainerCallback):
    """Train with StochNorm for the length of one `Trainer.train()`.

    Make it after the FreezeCallback, if there is one. Where `train()` raises, the Trainer tells no
    callback, and StochNorm lasts until the next `train()` or the callback's end.

    Args:
        model: the model the Trainer is given, unwrapped.
        p: the probability of running statistics, 0 <= p <= 1.

    Raises:
        InputError: p out of range, no BatchNorm layer that learns, SyncBatchNorm that learns.
    """

    def __init__(self, model: Any, p: float) -> None:
        covered_layers(model, p)
        self._model, self._p = model, p
        self._held = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Normalise stochastically from here on, once, even if an earlier training broke off."""
        self._held.close()
        self._held.enter_context(stochastically_normalised(self._model, self._p))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the layers their own forward back."""
        self._held.close()


def _forward(module: Any, usual: Callable[[Tensor], Tensor], p: float, input: Tensor) -> Tensor:
    """Stand in for the forward of a BatchNorm layer, on an input of (B, C, ...)."""
    if not module.training:
        return usual(input)
    # Copies: BatchNorm moves the statistics in place, unseen by autograd, which then would
    # compute this branch's gradient from those after the batch, without an error.
    mean, var = module.running_mean.clone(), module.running_var.clone()
    by_batch = _BatchNorm.forward(module, input)
    by_running = functional.batch_norm(
        input, mean, var, module.weight, module.bias, training=False, eps=module.eps
    )
    output = chosen_by_channel(by_batch, by_running, p)
    for name in ("drop", "act"):  # timm's BatchNormAct2d goes on with these
        if (layer := getattr(module, name, None)) is not None:
            output = layer(output)
    return output


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.forward
    else:  # an outer context's, or accelerate's
        module.forward = own


def covered_layers(model: nn.Module, p: float) -> list[_BatchNorm]:
    """Return the layers to change, or raise InputError."""
    from timm.layers.norm_act import BatchNormAct2d

    if not 0 <= p <= 1:
        raise InputError(
            f"stochnorm: p is {p}; give a number from 0 (BatchNorm) to 1 (running statistics "
            f"alone), such as 0.5"
        )
    kind = type(model).__name__
    frozen = {inside for module in frozen_modules(model) for inside in module.modules()}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    learning = [module for module in norms if module not in frozen]
    if any(isinstance(module, nn.SyncBatchNorm) for module in learning):
        raise InputError(
            f"stochnorm: {kind} has SyncBatchNorm layers, whose statistics are those of all "
            f"processes; leave BatchNorm layers as they are or leave StochNorm out"
        )
    forwards = (_BatchNorm.forward, BatchNormAct2d.forward)
    known = [module for module in learning if type(module).forward in forwards]
    covered = [module for module in known if module.running_mean is not None]
    if covered:
        return covered
    if known:
        why = f"no BatchNorm layer that learns in {kind} tracks running statistics"
    elif norms and not learning:
        why = f"all {len(norms)} BatchNorm layers of {kind} are frozen; thaw some"
    else:
        others = sorted({n for m in model.modules() if "norm" in (n := type(m).__name__).lower()})
        why = f"{kind} has no BatchNorm layers, only {', '.join(others) or 'ones without a norm'}"
    raise InputError(f"stochnorm: {why}, or leave StochNorm out")
