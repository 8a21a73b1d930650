"""Which of a model's weights its outputs don't depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def unreached(
    model: Any, inputs: Mapping[str, Tensor], read: Callable[[Any], Tensor]
) -> frozenset[str]:
    """Return the names of parameters that get no gradient, whatever the inputs.

    Some classifiers of transformers pool otherwise than the model they are made of, and leave a
    last norm (CLIP), a pooling of its own (SigLIP) or a mask token (DINOv2) without use. They
    never learn, and distributed training waits for their gradients in vain.

    Args:
        model: without memory; left as it is.
        inputs: by name, of which the shapes count.
        read: returns what a loss is of, of the model's outputs.

    Returns:
        None, where a model can't be followed without its weights.
    """
    training = model.training
    model.eval()
    try:
        names, parameters = zip(*model.named_parameters(), strict=True)
        outputs = model(**{name: value.to("meta") for name, value in inputs.items()})
        found = torch.autograd.grad(read(outputs).sum(), parameters, allow_unused=True)
    except Exception:  # whatever a model makes of tensors without values
        return frozenset()
    finally:
        model.train(training)
    return frozenset(name for name, own in zip(names, found, strict=True) if own is None)
