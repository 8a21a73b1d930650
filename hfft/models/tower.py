"""One of two towers: a model of transformers, and the vector that it makes of an example.

A copy of this file travels with the models that use it. It imports nothing of ours.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig

from .pooling import Pooling, pool, without_pooler

TowerPooling = Literal["pooler"] | Pooling
"""The tower's own pooled output, or a pooling of its hidden states."""
POOLINGS = ("pooler", *get_args(Pooling))


def make_tower(config: PretrainedConfig, pooling: TowerPooling) -> Any:
    """Return a tower with fresh weights: a model without a pooler it doesn't need, or an encoder.

    Args:
        config: of the model.
        pooling: how its output becomes a vector.
    """
    options = {} if pooling == "pooler" else without_pooler(config)
    dtype = torch.get_default_dtype()
    if type(config) not in MODEL_MAPPING:  # towers that AutoModel doesn't list, as MetaCLIP 2's
        name = type(config).__name__.removesuffix("Config") + "Model"
        if (kind := getattr(transformers, name, None)) is not None:
            return kind._from_config(config, dtype=dtype)
    return tower_of(cast(Any, AutoModel).from_config(config, dtype=dtype, **options))


def tower_of(model: Any) -> Any:
    """Return what of a model makes a tower: of Whisper and T5 the encoder.

    What stands for masked patches (DINOv2's) is left out: it would get no gradient, for which DDP
    waits.
    """
    tower = model.get_encoder() if model.config.is_encoder_decoder else model
    for module in tower.modules():
        if isinstance(getattr(module, "mask_token", None), nn.Parameter):
            module.mask_token = None
    return tower


def width_of(tower: Any, pooling: TowerPooling) -> int:
    """Return how many values a tower's pooled output has.

    Raises:
        ValueError: its config doesn't tell.
    """
    if (timm := getattr(tower, "timm_model", None)) is not None:
        return cast(int, timm.head_hidden_size if pooling == "pooler" else timm.num_features)
    names = ["output_hidden_size", "hidden_size", "hidden_sizes", "hidden_dim"]
    if pooling == "pooler":  # ViT's and SigLIP's map to a width of their own
        names = ["pooler_output_size", "projection_size", *names]
    config = tower.config.get_text_config()
    found = next((value for name in names if (value := getattr(config, name, None))), None)
    if found is None:
        raise ValueError(f"{type(tower).__name__}: its config doesn't say how wide its output is")
    return cast(int, found if isinstance(found, int) else found[-1])


def pooled(tower: Any, output: Any, mask: Tensor | None, pooling: TowerPooling) -> Tensor:
    """Return a tower's output as (B, D)."""
    if pooling == "pooler":
        if (own := output.get("pooler_output")) is None:
            raise ValueError(f"{type(tower).__name__} has no pooled output; take mean, or cls")
        return cast(Tensor, own.flatten(1))  # CNNs' are (B, D, 1, 1)
    hidden = output.last_hidden_state
    if hidden.dim() == 4:  # (B, D, H, W)
        hidden = hidden.flatten(2).transpose(1, 2)
    if mask is not None and mask.shape[1] != hidden.shape[1]:
        mask = _of_frames(tower, mask, hidden.shape[1])
    return pool(hidden, mask, pooling)


def _of_frames(tower: Any, mask: Tensor, frames: int) -> Tensor:
    """Return the mask (B, frames) of what a tower makes of samples, given theirs."""
    if hasattr(tower, "_get_feature_vector_attention_mask"):
        return cast(Tensor, tower._get_feature_vector_attention_mask(frames, mask))
    return functional.adaptive_max_pool1d(mask.float().unsqueeze(1), frames).squeeze(1).long()
