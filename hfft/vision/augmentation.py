"""Random changes to training images."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict

from hfft.errors import InputError
from hfft.sections import Section


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


def random_changes(chosen: Augmentation, height: int, width: int) -> list[Any]:
    """Return the transforms of torchvision that make them, in order.

    Args:
        chosen: what is changed.
        height: of what a random crop is resized to, in pixels.
        width: of the same.

    Raises:
        InputError: timm doesn't know the policy.
    """
    from torchvision.transforms import v2

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
