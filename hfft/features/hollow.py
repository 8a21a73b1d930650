"""A model without memory that computes all the same, to find cuts before a weight is loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hfft.source import initialise


def hollow_model(
    auto_model: Any, config: PretrainedConfig, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a model whose every parameter is one number, seen at all its places.

    Shapes, control flow and what depends on what are those of the model; values are finite, since
    each linear layer takes a mean. Parameters take no memory, whatever the model's size.
    """
    with init_empty_weights(include_buffers=False):
        model = initialise(auto_model, config, trust_remote_code)
    made: dict[int, nn.Parameter] = {}  # a tensor that two modules share stays one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_constant(parameter), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
    model.tie_weights()
    return model


def _constant(parameter: Tensor) -> Tensor:
    fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 1
    return torch.full((), 1 / max(1, fan_in), dtype=parameter.dtype).expand(parameter.shape)
