"""Images and texts that belong together: retrieval, and classes by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from pydantic import Field
from torch import Tensor
from transformers import PretrainedConfig

from hfft.contrastive.given import read_given
from hfft.contrastive_task import ContrastiveOptions, ContrastiveTask
from hfft.registry import register
from hfft.task import InputError, ModelConfig
from hfft.vision.augmentation import Augmentation
from hfft.vision.inputs import (
    IMAGE,
    ImageOptions,
    adapt_config,
    given_images,
    image_transform,
    load_image_processor,
    stack_pixels,
)


class ImageTextOptions(ImageOptions, ContrastiveOptions):
    """The task's own keys."""

    augmentation: Literal["none", "default"] | Augmentation = Field(
        "default",
        description="default: crops of nine tenths or more, which captions still describe",
    )
    default_changes = Augmentation(scale=(0.9, 1.0))  # as CLIP and open_clip crop; nothing mirrored


@register("zero-shot-image-classification")
class ZeroShotImageClassification(ContrastiveTask):
    """Images and texts to embeddings that are alike where they belong together."""

    Options = ImageTextOptions
    model_suffix = (
        *("CLIPModel", "SiglipModel", "MetaClip2Model", "AltCLIPModel"),
        "VisionTextDualEncoderModel",
    )
    other, other_config = "image", "vision_config"
    template = "a photo of a {}."
    column = IMAGE

    @property
    def _images(self) -> ImageTextOptions:
        """The options, of this task's type."""
        return cast(ImageTextOptions, self.options)

    @classmethod
    def takes(cls, config: PretrainedConfig) -> bool:
        """Say whether a finished model is of images and texts."""
        dual = config.model_type == "dual-encoder" and getattr(config, "vision_config", None)
        return bool(dual) or super().takes(config)

    @property
    def augments_other(self) -> bool:
        """Whether training images are changed at random."""
        return self._images.augments

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Name the classes and, where options ask for it, change the input size."""
        if config.model_type == "siglip2":  # fixed sizes are SiglipModels
            raise InputError(
                f"model: {config.name_or_path or config.model_type} is a NaFlex SigLIP 2, which "
                f"reads patches of any shape; take one of a fixed size, such as "
                f"google/siglip2-base-patch16-224"
            )
        adapt_config(config, self._images)
        return super().configure(config, labels)

    def load_other(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the image tower's processor."""
        return load_image_processor(source, config, self._images)

    def prepare(self, processor: Any, *, training: bool) -> Callable[[Any], dict[str, Any]]:
        """Return image to `pixel_values` of shape (C, H, W)."""
        transform = image_transform(processor, self._images, training=training)
        return lambda image: {"pixel_values": transform(image)}

    def stack(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Stack to `pixel_values` of shape (B, C, H, W)."""
        return {"pixel_values": stack_pixels([example["pixel_values"] for example in inputs])}

    def read_inputs(self, given: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield image files, those in folders, and records of an image and its candidates."""
        return read_given(given, "image", given_images)
