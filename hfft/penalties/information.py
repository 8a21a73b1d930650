"""The diagonal of the Fisher information: how far each weight may move before predictions change.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from hfft.errors import InputError
from hfft.penalties.activations import precise
from hfft.penalties.attention import batch_size, inputs_of, loss_of, part, required
from hfft.penalties.penalty import Batches, LabelledBatches

IGNORED = -100
"""The label of a token that counts for nothing, in transformers."""


def diagonal_fisher(
    model: nn.Module,
    source: Mapping[str, Tensor],
    batches: Batches,
    *,
    examples: int,
    names: Collection[str] | None = None,
    labels: Literal["sampled", "given"] = "sampled",
) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradient of log p(y | x), for each weight.

    The model is in eval mode and computes with the source's weights meanwhile; it is left as it
    was, and so is the random state. The same examples give the same result, on any number of
    processes: every one must be given the same batches, takes its share, and gets the whole.

    Args:
        model: the model, on the device that is computed on.
        source: theta_s by name, parameters and buffers; what is not there is as in the model.
        batches: keyword arguments of the model's forward. A tensor as long as the batch is taken
            apart into examples; other things go along as they are.
        examples: how many at most.
        names: the parameters to measure; None: those in `source`.
        labels: `sampled` draws y from the model's own softmax over the last axis of `logits`,
            which makes it the Fisher information (Kunstner et al. 2019, "Limitations of the
            Empirical Fisher Approximation"); where there is one label a token, y is all tokens
            whose label is not -100. `given` takes the loss that the model computes for the
            batches' own labels, the empirical Fisher; for tokens that loss is a mean over them.

    Returns:
        Name to a tensor of the weight's shape, in float32 at least, on the model's device.

    Raises:
        InputError: there are no examples, the model's outputs have no loss or no classes, or all
            gradients are 0.
    """
    wanted = source if names is None else names
    theta = {
        name: source.get(name, parameter).detach().to(parameter).requires_grad_()
        for name, parameter in model.named_parameters()
        if name in wanted
    }
    others = {
        name: source[name].detach().to(own)
        for name, own in (*model.named_parameters(), *model.named_buffers())
        if name in source and name not in theta
    }
    found = {name: torch.zeros_like(precise(value.detach())) for name, value in theta.items()}
    device = next(model.parameters()).device
    several = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    count = 0
    with undisturbed(model), torch.enable_grad():
        for number, example in enumerate(islice(_one_by_one(batches, device), examples)):
            count += 1
            if number % world != rank:
                continue
            inputs = inputs_of(example, batches)
            outputs = functional_call(model, {**others, **theta}, kwargs=inputs)
            if labels == "given":
                log_p = -loss_of(outputs, example, batches)
            else:
                aligned = isinstance(batches, LabelledBatches)
                shifted = not aligned and getattr(model, "loss_type", None) == "ForCausalLM"
                log_p = _log_p_of_a_draw(outputs, example.get("labels"), shifted, seed=number)
            gradients = torch.autograd.grad(log_p, list(theta.values()), allow_unused=True)
            for total, gradient in zip(found.values(), gradients, strict=True):
                if gradient is not None:
                    total.add_(precise(gradient).square())
    if not count:
        raise InputError(
            "penalty.kind: fisher measures the source on examples, and there are none; give batches"
        )
    for name in found if several else ():
        found[name] = _summed(found[name])
    if not any(total.any() for total in found.values()):
        raise InputError(
            f"penalty.kind: fisher finds no information: all gradients on {count} examples are 0"
        )
    return {name: total / count for name, total in found.items()}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while, at a random state of its own."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(
        [] if on_cpu else [device], device_type="cuda" if on_cpu else device.type
    ):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach other devices too
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        elif not on_cpu:
            torch.get_device_module(device).manual_seed(0)
        try:
            for module, _ in modes:
                module.training = False  # not eval(): frozen modules may not listen
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _one_by_one(batches: Batches, device: torch.device) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for place in range(batch_size(batch)):
            yield part(batch, place, place + 1, device)


def _log_p_of_a_draw(outputs: Any, labels: Any, shifted: bool, seed: int) -> Tensor:
    """Return log p(y | x) of a y drawn from the model's own predictions.

    Args:
        outputs: with `logits`, of shape (1, K) or (1, T, K) for K classes.
        labels: what says where a label is wanted, of shape (1,) or (1, T); None: everywhere.
        shifted: whether position t predicts token t + 1.
        seed: of the draw; one an example, so that the number of processes makes no difference.
    """
    remedy = "set labels: given"
    log_p = precise(required(outputs, "logits", remedy)).log_softmax(-1)
    if shifted:
        log_p = log_p[:, :-1]
        labels = labels[:, 1:] if isinstance(labels, Tensor) else None
    if log_p.shape[-1] < 2 or (isinstance(labels, Tensor) and not _are_classes(labels, log_p)):
        raise InputError(
            f"penalty.labels: sampled draws one class for each label, which logits of shape "
            f"{tuple(log_p.shape)} don't fit; {remedy}"
        )
    flat = log_p.flatten(0, -2)
    draw = torch.multinomial(
        flat.detach().exp().cpu(), 1, generator=torch.Generator().manual_seed(seed)
    )
    drawn = flat.gather(1, draw.to(flat.device)).flatten()
    return drawn.sum() if labels is None else drawn[labels.flatten() != IGNORED].sum()


def _are_classes(labels: Tensor, logits: Tensor) -> bool:
    return labels.shape == logits.shape[:-1] and not labels.is_floating_point()


def _summed(total: Tensor) -> Tensor:
    """Add up over processes; NCCL wants it on its own device."""
    on_device = dist.get_backend() == "nccl" and total.device.type == "cpu"
    moved = total.to(torch.accelerator.current_accelerator()) if on_device else total
    dist.all_reduce(moved)
    return moved.to(total.device)
