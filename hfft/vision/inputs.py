"""An image as a model reads it: its size, its processor, random changes, and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    PretrainedConfig,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
)

from hfft.errors import InputError
from hfft.image_inputs import Preparation, as_pixels, find_preparation, open_pixels
from hfft.images import IMAGES, View, open_image
from hfft.models.timm_images import TimmImageProcessor
from hfft.roles import Column
from hfft.sections import ModelConfig, Section
from hfft.vision.augmentation import DEFAULT_AUGMENTATION, Augmentation, random_changes

IMAGE = Column(
    "image",
    (
        *("image", "img", "path", "file_name", "file", "filename", "image_path"),
        *("jpg", "jpeg", "png", "webp"),
    ),
)
"""The column of images; in tar files of them, it is named as they end."""
Prepare = Callable[[Mapping[str, Any]], Tensor]
"""Turns a value of an undecoded image column into `pixel_values` of shape (C, H, W)."""


class ImageOptions(Section):
    """Keys that tasks on images have in common."""

    image_size: int | None = Field(None, gt=0, description="pixels a side; default: the model's")
    crop_pct: float | None = Field(
        None, gt=0, le=1, description="share of the resized image that the centre crop keeps"
    )
    augmentation: Literal["none", "default"] | Augmentation = Field(
        "default", description="default: random resized crops and horizontal flips"
    )
    decode: Literal["fast", "exact"] = Field(
        "fast",
        description="fast: large JPEGs at reduced scale, resized as bytes, at most 1 of 255 off on "
        "average; exact: as transformers.pipeline does",
    )

    default_changes: ClassVar[Augmentation] = DEFAULT_AUGMENTATION
    """What `augmentation: default` is."""

    @property
    def augments(self) -> bool:
        """Whether training images are changed at random."""
        return self.changes is not None

    @property
    def changes(self) -> Augmentation | None:
        """The random changes to training images; None: there are none."""
        if self.augmentation == "default":
            return self.default_changes
        if self.augmentation == "none" or self.augmentation == Augmentation(
            ratio=self.augmentation.ratio  # of a crop that isn't made
        ):
            return None
        return self.augmentation


def adapt_config(config: PretrainedConfig, options: ImageOptions) -> None:
    """Write the input size that options ask for into a model's config, or its vision tower's.

    Raises:
        InputError: a timm model doesn't say how images are prepared.
    """
    size = options.image_size
    for part in (config, getattr(config, "vision_config", None)):
        if isinstance(part, TimmWrapperConfig):
            _adapt_timm(part, options)
        elif size is not None and (own := getattr(part, "image_size", None)) is not None:
            cast(Any, part).image_size = size if isinstance(own, int) else [size, size]


def load_image_processor(
    source: ModelConfig, config: PretrainedConfig, options: ImageOptions
) -> Any:
    """Return a model's own image processor, or its vision tower's, at the size options ask for.

    Args:
        source: where it is.
        config: of the model; `adapt_config` has been there.
        options: what they ask for.

    Raises:
        InputError: it has none, or can't do what is asked.
    """
    part = getattr(config, "vision_config", config)
    if isinstance(part, TimmWrapperConfig):
        kind = TimmWrapperImageProcessor if part is config else TimmImageProcessor
        return kind(part.pretrained_cfg, part.architecture)
    if options.crop_pct is not None:
        raise InputError("task.crop_pct: is for timm models; set task.image_size instead")
    source = source.tower("image")
    try:
        processor = cast(Any, AutoImageProcessor).from_pretrained(
            source.name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source.place}: {source.name} has no image processor (preprocessor_config.json): "
            f"{error}"
        ) from error
    if options.image_size is not None:
        _resize(processor, options.image_size)
    return processor


def image_transform(processor: Any, options: ImageOptions, *, training: bool) -> Prepare:
    """Return the function from an image to the model's pixels, changed at random in training."""
    changes: list[Any] = []
    if training and options.changes is not None:
        changes = random_changes(options.changes, *_resized_size(processor))
    # the processor's own steps, where they are known well enough to be done otherwise
    known = find_preparation(processor) if options.decode == "fast" else None
    return _exact(processor, changes) if known is None else _fast(known, changes)


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Stack images of shape (C, H, W) to (B, C, H, W)."""
    if torch.accelerator.is_available():
        return torch.stack(list(images))
    # channels last in memory: convolutions on CPUs gain up to 1.4 times, nothing loses
    return torch.stack([one.permute(1, 2, 0) for one in images]).permute(0, 3, 1, 2)


def given_images(given: Sequence[str]) -> list[Path]:
    """Return image files, and all images in folders.

    Raises:
        InputError: a folder holds none.
    """
    return IMAGES.given(given)


def read_images(given: Sequence[str]) -> list[tuple[str, Any]]:
    """Open image files, and all images in folders; return pairs of path and image.

    Raises:
        InputError: a folder holds none, or one can't be read.
    """
    files = given_images(given)
    return [(str(path), open_image({"path": str(path), "bytes": None})) for path in files]


def _adapt_timm(config: TimmWrapperConfig, options: ImageOptions) -> None:
    """Write the input size into a timm model's config, where its processor reads it."""
    # timm saves num_classes among the arguments too, where it would stand against the labels
    arguments = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
    if not getattr(config, "pretrained_cfg", None):
        raise InputError(
            f"model: {config.name_or_path}: its config.json lacks pretrained_cfg, which says how "
            f"images are prepared; save the model with timm.models.save_for_hf"
        )
    changed = dict(config.pretrained_cfg)
    if options.image_size is not None:
        changed["input_size"] = (changed["input_size"][0], options.image_size, options.image_size)
        if changed.get("fixed_input_size"):
            arguments["img_size"] = options.image_size
    if options.crop_pct is not None:
        changed["crop_pct"] = options.crop_pct
    config.pretrained_cfg, config.model_args = changed, arguments or None


def _resize(processor: Any, side: int) -> None:
    """Make a processor return squares of `side` pixels, keeping the form of its sizes.

    Where it crops after resizing, the crop goes on covering the same share of the image.
    """
    crop = getattr(processor, "crop_size", None)
    edge = side
    if crop and getattr(processor, "do_center_crop", False):
        edge = round(min(dict(processor.size).values()) * side / min(dict(crop).values()))
    for name, pixels in (("size", edge), ("crop_size", side)):
        if sizes := getattr(processor, name, None):
            setattr(processor, name, type(sizes)(**dict.fromkeys(dict(sizes), pixels)))


def _exact(processor: Any, changes: Sequence[Any]) -> Prepare:
    """Decode all pixels, make random changes, and leave the rest to the processor."""
    from torchvision.transforms import v2

    change = v2.Compose(changes) if changes else None

    def prepare(value: Mapping[str, Any]) -> Tensor:
        image = open_image(value)
        inputs = processor(image if change is None else change(image), return_tensors="pt")
        return cast(Tensor, inputs["pixel_values"][0])

    return prepare


def _fast(known: Preparation, changes: Sequence[Any]) -> Prepare:
    """Draw the crop first, and decode no more pixels than it needs."""
    from torchvision.transforms import v2

    crop = changes[0] if changes and isinstance(changes[0], v2.RandomResizedCrop) else None
    others = changes[1:] if crop is not None else changes
    change = v2.Compose(others) if others else None
    flips = (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)
    on_bytes = all(isinstance(other, flips) for other in others)

    def view(width: int, height: int) -> View:
        if crop is None:
            return known.view(width, height)
        size = torch.empty(1, height, width, device="meta")
        return View(**crop.make_params([size]), rows=crop.size[0], columns=crop.size[1])

    def prepare(value: Mapping[str, Any]) -> Tensor:
        if change is None or on_bytes:
            pixels = open_pixels(value, view, kind)
            return known(pixels if change is None else change(pixels))
        if crop is None:  # what others draw may depend on the image's size
            return known(as_pixels(change(open_image(value))))
        image = v2.functional.to_pil_image(open_pixels(value, view, kind))
        return known(as_pixels(change(image)))

    kind = known.interpolation if crop is None else "bicubic"
    return prepare


def _resized_size(processor: Any) -> tuple[int, int]:
    """Return the height and width in pixels that the processor resizes to, before it crops.

    A random crop of this size passes the processor's own resizing unchanged.
    """
    if isinstance(processor, TimmWrapperImageProcessor):
        _, height, width = processor.data_config["input_size"]
        crop = processor.data_config["crop_pct"]
        return math.floor(height / crop), math.floor(width / crop)
    size = processor.size
    if "height" in size:
        return size["height"], size["width"]
    edge = size["shortest_edge"]
    return edge, edge
