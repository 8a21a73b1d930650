"""timm's preparation of images, in a file of its own.

transformers reads it from the config of a timm model. A model that has a timm model inside has
another config, so it is written beside it, with a copy of this file and of its neighbours.
"""

from __future__ import annotations

import os
from typing import Any, cast

from transformers import AutoImageProcessor, BaseImageProcessor, TimmWrapperImageProcessor

from .dual_encoder import DualEncoderConfig


class TimmImageProcessor(TimmWrapperImageProcessor):
    """Prepares images as a timm model was pretrained, by its `preprocessor_config.json`.

    Args:
        pretrained_cfg: what timm knows of the model's pretraining.
        architecture: timm's name of the model.
        others: what every image processor has.
    """

    def __init__(
        self, pretrained_cfg: dict[str, Any], architecture: str | None = None, **others: Any
    ) -> None:
        super().__init__(pretrained_cfg, architecture, **others)
        self.pretrained_cfg = pretrained_cfg

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what `preprocessor_config.json` says, and the options that are left."""
        options.setdefault("image_processor_filename", "preprocessor_config.json")
        return super().get_image_processor_dict(pretrained_model_name_or_path, **options)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **options: Any
    ) -> Any:
        """Write `preprocessor_config.json` and a copy of this file."""
        return cast(Any, BaseImageProcessor).save_pretrained(self, save_directory, **options)


cast(Any, AutoImageProcessor).register(
    DualEncoderConfig, image_processor_classes={"torchvision": TimmImageProcessor}, exist_ok=True
)
cast(Any, TimmImageProcessor).register_for_auto_class("AutoImageProcessor")
