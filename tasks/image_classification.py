"""Image to class: any timm model and any transformers image classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import AfterValidator, Field, Strict
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
)

from hfft.registry import register
from hfft.task import (
    Collate,
    Column,
    InputError,
    ModelConfig,
    Preparation,
    Row,
    Section,
    Split,
    Task,
    Transform,
    View,
    as_pixels,
    draw_confusion,
    find_images,
    find_preparation,
    open_image,
    open_pixels,
    scores_by_class,
)


def _positive_and_rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"expected two numbers above 0, the smaller first, found {list(value)}")
    return value


Range = Annotated[  # YAML has lists, no tuples
    tuple[float, float], Strict(False), AfterValidator(_positive_and_rising)
]


class Augmentation(Section):
    """Random changes to training images, in the order they are made. Left out: no change."""

    scale: Range | None = Field(
        None, description="share of the image's area that a random crop covers, such as [0.35, 1]"
    )
    ratio: Range = Field((3 / 4, 4 / 3), description="aspect ratios of that crop")
    rotate: float = Field(0, ge=0, le=180, description="degrees, either way")
    translate: float = Field(0, ge=0, le=1, description="shift, as a share of the side")
    zoom: Range | None = Field(None, description="range of a rescaling factor")
    shear: float = Field(0, ge=0, lt=90, description="degrees, either way")
    horizontal_flip: float = Field(0, ge=0, le=1, description="probability")
    vertical_flip: float = Field(0, ge=0, le=1, description="probability")
    color_jitter: float = Field(0, ge=0, description="brightness, contrast and saturation")
    auto_augment: str | None = Field(
        None, description="a policy by timm's name: rand-m9-mstd0.5-inc1, trivialaugment …"
    )


DEFAULT_AUGMENTATION = Augmentation(scale=(0.35, 1.0), horizontal_flip=0.5)


class ImageOptions(Section):
    """The image task's own keys."""

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


@register("image-classification")
class ImageClassification(Task):
    """Image to one of several classes, by cross-entropy."""

    columns: Mapping[str, Column] = {
        "image": Column(
            "image", ("image", "img", "path", "file_name", "file", "filename", "image_path")
        ),
        "label": Column("label", ("label", "labels", "class", "target", "category")),
    }
    Options = ImageOptions
    metric_names = ("accuracy", "macro_f1")
    metric = "accuracy"
    auto_model = AutoModelForImageClassification
    model_suffix = "ForImageClassification"

    @property
    def _own(self) -> ImageOptions:
        """The options, of this task's type."""
        return cast(ImageOptions, self.options)

    @property
    def augments(self) -> bool:
        """Whether training images are changed at random."""
        chosen = self._own.augmentation
        if isinstance(chosen, Augmentation):
            return chosen != Augmentation(ratio=chosen.ratio)
        return chosen == "default"

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Name the classes and, where options ask for it, change the input size."""
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
        if isinstance(config, TimmWrapperConfig):
            config.label_names = list(labels)
            _adapt_timm(config, self._own)
            return config
        # models with a distillation head beside the head return no loss
        config.architectures = [
            name.removesuffix("WithTeacher") for name in config.architectures or []
        ]
        if (size := self._own.image_size) is not None:
            parts: tuple[Any, ...] = (config, getattr(config, "vision_config", None))
            for part in parts:
                if (own := getattr(part, "image_size", None)) is not None:
                    part.image_size = size if isinstance(own, int) else [size, size]
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the model's own image processor, at the size the options ask for."""
        if isinstance(config, TimmWrapperConfig):
            return TimmWrapperImageProcessor(config.pretrained_cfg, config.architecture)
        if self._own.crop_pct is not None:
            raise InputError("task.crop_pct: is for timm models; set task.image_size instead")
        try:
            processor = cast(Any, AutoImageProcessor).from_pretrained(
                source.name,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"model: {source.name} has no image processor (preprocessor_config.json): {error}"
            ) from error
        if self._own.image_size is not None:
            _resize(processor, self._own.image_size)
        return processor

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return image to `pixel_values` of shape (C, H, W) and its class number."""
        changes = _augmentation(self._own, processor) if training else []
        # the processor's own steps, where they are known well enough to be done otherwise
        known = find_preparation(processor) if self._own.decode == "fast" else None
        prepare = _exact(processor, changes) if known is None else _fast(known, changes)

        def inputs(row: Row) -> dict[str, Any]:
            return {"pixel_values": prepare(row["image"]), "labels": row["label"]}

        return inputs

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Stack to `pixel_values` of shape (B, C, H, W) and `labels` of shape (B,)."""
        return _stack

    def read_inputs(self, given: Sequence[str]) -> list[tuple[str, Any]]:
        """Open image files, and all images in folders."""
        files: list[Path] = []
        for path in map(Path, given):
            found = list(find_images(path)) if path.is_dir() else [path]
            if not found:
                raise InputError(f"{path}: the folder holds no images")
            files += found
        return [(str(path), open_image({"path": str(path), "bytes": None})) for path in files]

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Score logits of shape (N, classes): accuracy, and F1 averaged over the classes seen."""
        guesses = predictions.argmax(axis=-1)
        return {
            "accuracy": float(accuracy_score(labels, guesses)),
            "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0)),
        }

    def scores_by_label(
        self, predictions: Any, labels: np.ndarray, split: Split
    ) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of examples of each class."""
        return scores_by_class(labels, predictions.argmax(axis=-1), split.labels)

    def draw(self, folder: Path, predictions: Any, labels: np.ndarray, split: Split) -> list[Path]:
        """Draw the confusion matrix; beyond 40 classes without names and numbers."""
        return [draw_confusion(folder, labels, predictions.argmax(axis=-1), split.labels)]


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


def _stack(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pixels = [example["pixel_values"] for example in inputs]
    if torch.accelerator.is_available():
        batch = torch.stack(pixels)
    else:  # channels last in memory: convolutions on CPUs gain up to 1.4 times, nothing loses
        batch = torch.stack([one.permute(1, 2, 0) for one in pixels]).permute(0, 3, 1, 2)
    return {
        "pixel_values": batch,
        "labels": torch.tensor([example["labels"] for example in inputs]),
    }


Prepare = Callable[[Mapping[str, Any]], torch.Tensor]
"""Turns a value of an undecoded image column into `pixel_values` of shape (C, H, W)."""


def _exact(processor: Any, changes: Sequence[Any]) -> Prepare:
    """Decode all pixels, make random changes, and leave the rest to the processor."""
    from torchvision.transforms import v2

    change = v2.Compose(changes) if changes else None

    def prepare(value: Mapping[str, Any]) -> torch.Tensor:
        image = open_image(value)
        inputs = processor(image if change is None else change(image), return_tensors="pt")
        return cast(torch.Tensor, inputs["pixel_values"][0])

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

    def prepare(value: Mapping[str, Any]) -> torch.Tensor:
        if change is None or on_bytes:
            pixels = open_pixels(value, view, kind)
            return known(pixels if change is None else change(pixels))
        if crop is None:  # what others draw may depend on the image's size
            return known(as_pixels(change(open_image(value))))
        image = v2.functional.to_pil_image(open_pixels(value, view, kind))
        return known(as_pixels(change(image)))

    kind = known.interpolation if crop is None else "bicubic"
    return prepare


def _augmentation(options: ImageOptions, processor: Any) -> list[Any]:
    """Return the random changes; the processor's own resizing and normalisation come after."""
    if options.augmentation == "none":
        return []
    chosen = options.augmentation
    if chosen == "default":
        chosen = DEFAULT_AUGMENTATION
    from torchvision.transforms import v2

    height, width = _resized_size(processor)
    steps: list[Any] = []
    if chosen.scale is not None:
        steps.append(
            v2.RandomResizedCrop(
                (height, width),
                scale=chosen.scale,
                ratio=chosen.ratio,
                interpolation=v2.InterpolationMode.BICUBIC,
            )
        )
    if chosen.rotate or chosen.translate or chosen.zoom or chosen.shear:
        steps.append(
            v2.RandomAffine(
                chosen.rotate,
                translate=(chosen.translate, chosen.translate),
                scale=chosen.zoom,
                shear=chosen.shear or None,
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    steps += [v2.RandomHorizontalFlip(chosen.horizontal_flip)] if chosen.horizontal_flip else []
    steps += [v2.RandomVerticalFlip(chosen.vertical_flip)] if chosen.vertical_flip else []
    if chosen.color_jitter:
        steps.append(v2.ColorJitter(*[chosen.color_jitter] * 3))
    if chosen.auto_augment is not None:
        steps.append(_policy(chosen.auto_augment, height, width))
    return steps


def _policy(name: str, height: int, width: int) -> Any:
    from timm.data.transforms_factory import create_transform

    try:
        whole = create_transform(
            (3, height, width), is_training=True, auto_augment=name, separate=True
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(
            f"task.augmentation.auto_augment: timm knows no {name!r}: {error}"
        ) from error
    return whole[1]


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
