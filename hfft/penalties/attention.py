"""DELTA's channel attention: how much the loss would grow without each channel of a layer.

The authors switch channels off one after the other: as many passes over the examples as there are
channels, thousands for a ResNet-50. Here one backward pass gives all of them, to second order: an
example's loss changes by -p + q with p = <activations, gradient> of the channel, and q = 1/2 p^2
where the Hessian is replaced by the Fisher information (Theis et al. 2018, "Faster gaze prediction
with dense networks and Fisher pruning"). The mean of p vanishes where the loss has its minimum, for
a channel's scale is something that was learned; what remains of it is noise, and it is left out.
The tests compare both with switching channels off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfft.errors import InputError
from hfft.penalties.activations import channel_axis, precise
from hfft.penalties.penalty import Batches, LabelledBatches


def loss_increase(
    model: nn.Module, layers: Sequence[str], batches: Batches, *, examples: int
) -> dict[str, Tensor]:
    """Estimate the increase of the loss with each channel of each layer set to zero.

    It is 1/2 of the mean over examples of <activations, gradient of the example's loss>^2.

    Args:
        model: in eval mode, where examples know nothing of each other; left as it was. Its loss is
            a mean over examples.
        layers: paths of modules.
        batches: with labels, as its forward takes them.
        examples: how many are used at most.

    Returns:
        Path to a tensor of shape (C,): the mean over examples.

    Raises:
        InputError: there are no examples, the model gives no loss, or a layer no maps.
    """
    device, last = next(model.parameters()).device, has_channels_last(model)
    maps: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    count = 0
    hooks = [
        model.get_submodule(path).register_forward_hook(partial(_watch, maps, path))
        for path in layers
    ]
    try:
        for batch, size in limited(batches, examples, device):
            maps.clear()
            with torch.enable_grad():
                outputs = model(**inputs_of(batch, batches))
                reached = [path for path in layers if path in maps]
                gradients = torch.autograd.grad(
                    loss_of(outputs, batch, batches),
                    [maps[path] for path in reached],
                    allow_unused=True,
                )
            for path, gradient in zip(reached, gradients, strict=True):
                own = _increase(maps[path].detach(), gradient, size, last=last)
                total[path] = total[path] + own if path in total else own
            count += size
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise InputError(
            "penalty.attention: loss is measured on labelled examples, and there are none; give "
            "batches, or set attention: none"
        )
    if silent := [path for path in layers if path not in total]:
        raise InputError(f"penalty.layers: {', '.join(silent)} gave no maps")
    return {path: value / count for path, value in total.items()}


def has_channels_last(model: nn.Module) -> bool:
    """Whether a model's maps are (B, H, W, C), as timm's Swin has them."""
    return any(str(getattr(m, "output_fmt", "")).endswith("NHWC") for m in model.modules())


def _increase(maps: Tensor, gradient: Tensor | None, size: int, *, last: bool) -> Tensor:
    """Return the sum over examples of a channel's increase, of shape (C,).

    Args:
        maps: of shape (B, C, H, W), (B, T, C) or (B, C).
        gradient: of the mean loss, of the same shape; None: it does not depend on them.
        size: how many examples the mean is over.
        last: whether maps of four dimensions are (B, H, W, C).
    """
    product = precise(maps) * (0 if gradient is None else size * precise(gradient))
    if last and product.ndim == 4:
        product = product.movedim(-1, 1)
    places = [n for n in range(1, product.ndim) if n != channel_axis(product)]
    return 0.5 * (product.sum(places) if places else product).square().sum(0)


def _watch(maps: dict[str, Tensor], path: str, module: nn.Module, args: Any, output: Any) -> Any:
    found = first_tensor(output)
    # the frozen source computes without gradients up to the first of the layers
    maps[path] = found if found.requires_grad else found.detach().requires_grad_()
    return with_first(output, maps[path].clone())  # which the next module may overwrite


def limited(
    batches: Batches, examples: int, device: torch.device
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield batches on a device, with their sizes, until there were that many examples."""
    for batch in batches:
        if examples <= 0:
            return
        size = batch_size(batch)
        taken = min(size, examples)
        examples -= taken
        yield part(batch, 0, taken, device), taken


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of examples: the length of the labels, or of the first tensor."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim:
        return len(labels)
    return len(tensors[0]) if tensors else 0


def part(batch: Mapping[str, Any], start: int, stop: int, device: torch.device) -> dict[str, Any]:
    """Return examples of a batch; what is not as long as the batch goes along as it is."""
    size = batch_size(batch)
    return {
        name: (value[start:stop] if value.ndim and len(value) == size else value).to(device)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


def inputs_of(batch: Mapping[str, Any], batches: Batches) -> dict[str, Any]:
    """Return what the model is called with: the labels are perhaps its batches' own business."""
    own = isinstance(batches, LabelledBatches)
    return {name: value for name, value in batch.items() if not (own and name == "labels")}


def loss_of(outputs: Any, batch: Mapping[str, Any], batches: Batches) -> Tensor:
    """Return a batch's loss: as its batches say, else the model's own.

    Raises:
        InputError: the model has none.
    """
    if isinstance(batches, LabelledBatches):
        return batches.loss(outputs, batch["labels"])
    return required(outputs, "loss", "give the batches labels")


def required(outputs: Any, name: str, remedy: str) -> Tensor:
    """Return a tensor out of a model's outputs.

    Raises:
        InputError: it is not there.
    """
    found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    if not isinstance(found, Tensor):
        raise InputError(f"penalty: the model's outputs have no {name}; {remedy}")
    return found


def first_tensor(output: Any) -> Tensor:
    """Return a module's output, or the first of its outputs.

    Raises:
        InputError: that is no tensor.
    """
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise InputError("penalty.layers: a module that was named gives no feature maps")
    return output


def with_first(output: Any, tensor: Tensor) -> Any:
    """Return a module's output with another first tensor."""
    if isinstance(output, Mapping):
        return type(output)(**{**output, next(iter(output)): tensor})
    if isinstance(output, tuple | list):
        return type(output)([tensor, *output[1:]])
    return tensor
