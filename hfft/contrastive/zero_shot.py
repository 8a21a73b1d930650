"""A pair of towers as a classifier of images."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from hfft.errors import InputError
from hfft.models.zero_shot_head import ZeroShotHeadConfig


def with_zero_shot_head(config: PretrainedConfig, templates: Sequence[str]) -> PretrainedConfig:
    """Return the config of a pair's image tower with a head of its text tower's making.

    Args:
        config: of the pair; that of a model which has such a head already is returned as it is.
        templates: sentences for the classes' names.

    Raises:
        InputError: it is no pair of images and texts.
    """
    if isinstance(config, ZeroShotHeadConfig):
        return config
    for kind in ("text", "vision"):
        if getattr(config, f"{kind}_config", None) is None:
            raise InputError(
                f"task.head: zero-shot: {config.name_or_path or config.model_type} has no {kind} "
                f"tower; take a two-tower model (CLIP, SigLIP), or head: new"
            )
    return ZeroShotHeadConfig.of_pair(config, list(templates))
