"""Images: found in folders, opened with a message that names the file, checked before training.

A damaged file met in the middle of an epoch costs the hours before it. So every image is decoded
once beforehand, by the same code that opens it later, and all the bad ones are named at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from hfft.errors import InputError
from hfft.media import Medium, cause, check, content_of, name_of

_STUBS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow names but can't decode by itself."""

_CHECKED = 16
"""Pixels a side of a check's view: a JPEG's bytes are all read, few of its pixels are made."""

_SPARE = 2
"""Decoded pixels a side for each one wanted, at least, where a JPEG is decoded at reduced scale.

Photos then stay within 0.2 to 0.8 of 255 of the whole decoding, on average; at 1, up to 3."""

_UPRIGHT, _TURNED = 1, frozenset({5, 6, 7, 8})
"""Orientation marks: of an image as it should be, and those that swap width and height."""


@cache
def image_extensions() -> frozenset[str]:
    """File-name endings, lower case with the dot, of the formats that Pillow can decode."""
    known = Image.registered_extensions()
    return frozenset(
        ending for ending, form in known.items() if form in Image.OPEN and form not in _STUBS
    )


IMAGES = Medium("image", "image", image_extensions, datasets.Image(decode=False))


def open_image(value: Mapping[str, Any]) -> Image.Image:
    """Opens one value of an undecoded image column as RGB, upright.

    The camera's orientation mark is applied, transparency is laid over white, and 16-bit grey is
    scaled to 8 bit rather than clipped, which is what Pillow alone would do.

    Args:
        value: `{"path": ..., "bytes": ...}`; `bytes`, where there are any, win.

    Raises:
        InputError: the image can't be decoded; the message names the file and says why.
    """
    return open_view(value, _whole).image


@dataclass(frozen=True)
class View:
    """A part of an image, in pixels of the whole upright image, and the size it is wanted at."""

    left: int
    top: int
    width: int
    height: int
    columns: int
    rows: int


@dataclass(frozen=True)
class Picture:
    """An image as `open_image` returns it, or smaller.

    Attributes:
        image: RGB, upright.
        view: what was asked for.
        divisor: 2, 4 or 8 where the sides were decoded at that fraction of their length, else 1.
    """

    image: Image.Image
    view: View
    divisor: int


def open_view(value: Mapping[str, Any], choose: Callable[[int, int], View]) -> Picture:
    """Opens an image as `open_image` does, at reduced scale where the view has pixels to spare.

    A JPEG of many pixels is decoded several times faster at a half, a quarter or an eighth of its
    size, which keeps all that a much smaller view shows.

    Args:
        value: as for `open_image`.
        choose: is handed the image's width and height, upright, before its pixels are decoded.

    Raises:
        InputError: as `open_image`.
    """
    picture, reason = _attempt(value, choose)
    if picture is None:
        raise InputError(f'image "{name_of(value)}" can\'t be read: {reason}')
    return picture


def check_images(dataset: datasets.Dataset, column: str) -> list[tuple[int, str, str]]:
    """Decodes every image of an undecoded column, all of it.

    Returns:
        (row, path, reason) of each image that can't be decoded, in row order.
    """
    return check(dataset, column, _flaw)


def _flaw(value: Mapping[str, Any] | None) -> str:
    """Why an image can't be decoded, or ""; lets go of the pixels at once."""
    return _attempt(value, lambda w, h: View(0, 0, w, h, _CHECKED, _CHECKED))[1]


def _whole(width: int, height: int) -> View:
    return View(0, 0, width, height, width, height)


def _attempt(
    value: Mapping[str, Any] | None, choose: Callable[[int, int], View]
) -> tuple[Picture | None, str]:
    """The image and "", or None and why not. Pillow's plug-ins raise errors of every kind."""
    try:
        with Image.open(content_of(value, "image")) as image:
            mark = _orientation(image)
            view = choose(*(image.size[::-1] if mark in _TURNED else image.size))
            divisor = _reduce(image, view, mark)
            image.load()
            return Picture(_to_rgb(_upright(image, mark)), view, divisor), ""
    except Exception as error:
        return None, _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its content is not an image that Pillow knows"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"it has too many pixels, more than Pillow's guard against decompression bombs allows "
            f"({error}); make it smaller"
        )
    return cause(error)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT))
    except Exception:
        return _UPRIGHT


def _reduce(image: Image.Image, view: View, mark: int) -> int:
    """Has a JPEG decoded at the smallest scale that serves the view; returns its divisor."""
    if image.format not in {"JPEG", "MPO"} or image.mode not in {"RGB", "L"}:
        return 1
    spare = min(view.width / view.columns, view.height / view.rows) / _SPARE
    width, height = image.size
    for divisor in (8, 4, 2):
        # a side that it doesn't divide ends in part of a pixel, which turning would put in front
        whole = width % divisor == height % divisor == 0
        if divisor <= spare and (whole or mark == _UPRIGHT):
            drafted = image.draft(None, (width // divisor, height // divisor))
            return divisor if drafted else 1
    return 1


def _upright(image: Image.Image, mark: int) -> Image.Image:
    """Applies the orientation mark; a damaged mark is no reason to lose the picture."""
    if mark == _UPRIGHT:  # where there is nothing to do, Pillow copies the image
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any of Pillow's modes.

    Raises:
        ValueError: 32-bit floating-point pixels, whose range nothing states.
    """
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow opens some as 32-bit integers
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
