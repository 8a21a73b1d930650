"""A model's own preparation of images, done on bytes.

What an image processor does, resize, crop, scale and normalise, is read from its attributes and
done here on uint8 tensors in the order that JPEGs are decoded in, several times faster. Nothing is
taken on trust: a preparation is handed out only if it returns what the processor itself returns
for two pictures of noise, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hfft.images import Picture, View, open_view

# torchvision and transformers are imported where they are used: tasks without images do without

Interpolation = Literal["bilinear", "bicubic"]
"""With antialiasing; torch does these on bytes, as Pillow does but for rounding."""


@dataclass(frozen=True)
class Preparation:
    """Prepares images for a model as its processor does.

    Attributes:
        size: length of the shorter side in pixels, or height and width.
        interpolation: between pixels.
        crop: uint8 pixels of shape (C, H, W) to their centre.
        mean: of each channel, in bytes.
        std: of each channel, in bytes.
    """

    size: int | tuple[int, int]
    interpolation: Interpolation
    crop: Callable[[Tensor], Tensor]
    mean: Tensor
    std: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 of shape (C, H, W), in memory as (H, W, C).

        Args:
            pixels: uint8 of shape (C, H, W).
        """
        size = self.resized(pixels.shape[2], pixels.shape[1])
        if pixels.shape[1:] != size:
            pixels = _resize(pixels, size, self.interpolation)
        rows = self.crop(pixels).permute(1, 2, 0)
        height, width, channels = rows.shape
        values = rows.to(torch.float32, memory_format=torch.contiguous_format)
        flat = values.view(height, width * channels)  # long rows, which vector instructions like
        flat.sub_(_tiled(self.mean, width)).div_(_tiled(self.std, width))
        return values.permute(2, 0, 1)

    def view(self, width: int, height: int) -> View:
        """Return the whole image, at the size that it is resized to."""
        rows, columns = self.resized(width, height)
        return View(0, 0, width, height, columns, rows)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the height and width in pixels that an image is resized to, before the crop."""
        if not isinstance(self.size, int):
            return self.size
        longer = int(self.size * max(width, height) / min(width, height))
        return (longer, self.size) if width <= height else (self.size, longer)


@lru_cache(maxsize=16)
def _tiled(values: Tensor, times: int) -> Tensor:
    return values.repeat(times)


def open_pixels(
    value: Mapping[str, Any], choose: Callable[[int, int], View], interpolation: Interpolation
) -> Tensor:
    """Open a view of an image, resized: uint8 of shape (C, rows, columns), in memory (H, W, C).

    Args:
        value: `{"path": ..., "bytes": ...}`, as for `hfft.images.open_image`.
        choose: is handed the image's width and height, upright, before its pixels are decoded.
        interpolation: between pixels.

    Raises:
        InputError: the image can't be decoded.
    """
    return _resized(open_view(value, choose), interpolation)


def _resized(picture: Picture, interpolation: Interpolation) -> Tensor:
    view = picture.view
    lengths = (view.left, view.top, view.left + view.width, view.top + view.height)
    left, top, right, bottom = (length / picture.divisor for length in lengths)
    if any(length % picture.divisor for length in lengths):  # Pillow alone resizes parts of pixels
        box = (left, top, right, bottom)
        size = (view.columns, view.rows)
        resampling = Image.Resampling[interpolation.upper()]
        return as_pixels(picture.image.resize(size, resampling, box))
    pixels = as_pixels(picture.image)[:, int(top) : int(bottom), int(left) : int(right)]
    return _resize(pixels, (view.rows, view.columns), interpolation)


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    mode = InterpolationMode(interpolation)
    return cast(Tensor, resize(pixels, list(size), mode, antialias=True))


def as_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 of shape (C, H, W), in memory (H, W, C)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def find_preparation(processor: Any) -> Preparation | None:
    """Return a processor's preparation of images, or None if it does anything out of the common."""
    from transformers import TimmWrapperImageProcessor

    timm = isinstance(processor, TimmWrapperImageProcessor)
    found = _of_timm(processor) if timm else _of_transformers(processor)
    return found if found is not None and _proves_itself(found, processor) else None


def _of_timm(processor: Any) -> Preparation | None:
    from torchvision import transforms

    steps = getattr(processor.val_transforms, "transforms", [])
    kinds = [type(step) for step in steps[:2]] + [type(step) for step in steps[3:]]
    if kinds != [transforms.Resize, transforms.CenterCrop, transforms.Normalize]:
        return None
    resize, crop, to_tensor, normalize = steps
    size = resize.size if isinstance(resize.size, int) else tuple(resize.size)
    if not isinstance(to_tensor, transforms.ToTensor) or resize.max_size is not None:
        return None
    kind = resize.interpolation.value
    return _preparation(size, kind, crop, 255, normalize.mean, normalize.std)


def _of_transformers(processor: Any) -> Preparation | None:
    def has(name: str) -> Any:
        return getattr(processor, name, None)

    needed = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean")
    if not all(map(has, (*needed, "image_std"))) or has("do_pad"):
        return None
    size, crop = (_lengths(has(name)) for name in ("size", "crop_size"))
    crop = crop if has("do_center_crop") else {}
    if size.keys() == {"height", "width"}:
        to: int | tuple[int, int] = (size["height"], size["width"])
    elif size.keys() == {"shortest_edge"}:
        to = size["shortest_edge"]
    else:
        return None
    if isinstance(to, int) and has("crop_pct"):  # ConvNeXT's way
        crop = {"height": to, "width": to} if to < 384 else {}
        to = int(to / has("crop_pct")) if to < 384 else (to, to)
    # one that is larger than what it cuts from is filled up, in ways that differ
    if crop and (crop.keys() != {"height", "width"} or max(crop.values()) > _shorter(to)):
        return None
    kind = {2: "bilinear", 3: "bicubic"}.get(has("resample"), "")

    def centre(pixels: Tensor) -> Tensor:
        height, width = crop["height"], crop["width"]
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        return pixels[:, top : top + height, left : left + width]

    scale = 1.0 / has("rescale_factor")
    cut = centre if crop else _uncut
    return _preparation(to, kind, cut, scale, has("image_mean"), has("image_std"))


def _lengths(sizes: Any) -> dict[str, int]:
    """Return the lengths in pixels that a processor's attribute gives, by their names."""
    from transformers.image_utils import SizeDict

    named = dict(sizes) if isinstance(sizes, Mapping | SizeDict) else {}
    return {name: length for name, length in named.items() if length}


def _shorter(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else min(size)


def _uncut(pixels: Tensor) -> Tensor:
    return pixels


def _preparation(
    size: int | tuple[int, ...],
    interpolation: str,
    crop: Callable[[Tensor], Tensor],
    scale: float,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
) -> Preparation | None:
    """Return None where a part is of a kind that is not done here."""
    mean, std = (torch.as_tensor(values, dtype=torch.float32) * scale for values in (mean, std))
    if interpolation not in ("bilinear", "bicubic") or mean.shape != (3,) or std.shape != (3,):
        return None
    if not isinstance(size, int):
        if len(size) != 2:
            return None
        size = (size[0], size[1])
    return Preparation(size, cast(Interpolation, interpolation), crop, mean, std)


def _proves_itself(preparation: Preparation, processor: Any) -> bool:
    """Compare with the processor on noise to make smaller, to make larger, and to cut only.

    In noise every pixel tells: a shift by one, a channel out of place or another filter differs by
    tens of values, rounding by less than one on average.
    """
    random = np.random.default_rng(0)
    rows, columns = preparation.resized(1, 1)
    sizes = [(rows * 5 // 4 + 3, columns * 3 // 2 + 1), (rows // 2 + 5, columns // 3 + 1)]
    # where the margin isn't even, halves round up, down or to even numbers
    sizes += [(rows, columns * 4 // 3 + odd) for odd in range(4)]
    for height, width in sizes:
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = processor(image, return_tensors="pt").get("pixel_values")
        found = preparation(as_pixels(image))
        if expected is None or found.shape != expected[0].shape:
            return False
        apart = (found - expected[0]).abs() * preparation.std.view(3, 1, 1)
        if apart.mean() > 0.5 or apart.max() > 3:
            return False
    return True
