"""Images: found in folders, opened with a message that names the file, checked before training.

A damaged file met in the middle of an epoch costs the hours before it. So every image is decoded
once beforehand, by the same code that opens it later, and all the bad ones are named at once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from hfft.columns import replace_column
from hfft.errors import InputError

if TYPE_CHECKING:
    import datasets

SPLIT_NAMES = frozenset({"train", "validation", "val", "valid", "dev", "test"})
"""Names by which a folder or a table says that it is a split."""

_STUBS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow names but can't decode by itself."""

_CHECKED = 16
"""Pixels a side of a check's view: a JPEG's bytes are all read, few of its pixels are made."""

_SPARE = 2
"""Decoded pixels a side for each one wanted, at least, where a JPEG is decoded at reduced scale.

Photos then stay within 0.2 to 0.8 of 255 of the whole decoding, on average; at 1, up to 3."""

_UPRIGHT, _TURNED = 1, frozenset({5, 6, 7, 8})
"""Orientation marks: of an image as it should be, and those that swap width and height."""

_ROWS_AT_ONCE = 256
"""Rows held in memory by the check, for data sets that keep the encoded images in their rows."""


@cache
def image_extensions() -> frozenset[str]:
    """File-name endings, lower case with the dot, of the formats that Pillow can decode."""
    known = Image.registered_extensions()
    return frozenset(
        ending for ending, form in known.items() if form in Image.OPEN and form not in _STUBS
    )


def visible_folders(folder: Path) -> list[Path]:
    """Folders directly in `folder`, by name, without the hidden ones and macOS's archive litter."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and _visible(entry.name))


def find_images(folder: Path) -> Iterator[Path]:
    """Images at any depth in `folder`, in a fixed order; links are followed, loops are not."""

    def stop(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(filter(_visible, folders))
        yield from (Path(root, name) for name in sorted(files) if _is_image(name))


def holds_images(folder: Path) -> bool:
    """Whether an image lies directly in `folder`, not in a folder further down."""
    return any(entry.is_file() and _is_image(entry.name) for entry in folder.iterdir())


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in {"__MACOSX", "__pycache__"}


def _is_image(name: str) -> bool:
    return _visible(name) and Path(name).suffix.lower() in image_extensions()


def image_splits(folder: Path) -> dict[str, Path]:
    """Split name to the folder that holds its class folders; empty if there isn't an image.

    A folder "train" or "test" is a split if it holds folders and no images; else it is a class,
    as it may well be among pictures of vehicles.
    """
    if next(find_images(folder), None) is None:
        return {}
    folders = visible_folders(folder)
    parted = any(
        child.name.lower() in SPLIT_NAMES and visible_folders(child) and not holds_images(child)
        for child in folders
    )
    if not parted:
        return {"train": folder}
    return {n: child for child in folders if (n := child.name.lower()) in SPLIT_NAMES}


def class_folders(folder: Path) -> dict[str, list[str]]:
    """Class name to the images in FOLDER/CLASS, at any depth; a class may have none.

    Raises:
        InputError: images lie in `folder` itself, so that their class is anybody's guess.
    """
    if holds_images(folder):
        raise InputError(
            f'images lie directly in "{folder}", outside any class; move each into the folder of '
            f"its class ({folder.name}/CLASS/IMAGE)"
        )
    return {entry.name: [str(p) for p in find_images(entry)] for entry in visible_folders(folder)}


def as_image_column(dataset: datasets.Dataset, column: str, base: Path | None) -> datasets.Dataset:
    """Turns paths, bytes or images into undecoded images: `{"path", "bytes"}` a row.

    Args:
        dataset: any.
        column: its column to turn.
        base: the folder that relative paths in a table are relative to.

    Raises:
        InputError: the column holds something else.
    """
    from datasets import Image as ImageFeature
    from datasets import Value

    feature, undecoded = dataset.features[column], ImageFeature(decode=False)
    if isinstance(feature, Value) and feature.dtype in {"string", "large_string", "null"}:
        paths = dataset.with_format(None)[:][column]
        rows = [{"path": _under(base, path), "bytes": None} for path in paths]
        return replace_column(dataset, column, rows, undecoded)
    binary = isinstance(feature, Value) and feature.dtype in {"binary", "large_binary"}
    struct = isinstance(feature, dict) and {"bytes", "path"} >= set(feature)
    if binary or struct or isinstance(feature, ImageFeature):
        return dataset.cast_column(column, undecoded)
    raise InputError(f"holds {getattr(feature, 'dtype', feature)}, not images or paths of images")


def _under(base: Path | None, path: str | None) -> str | None:
    return path if base is None or not path or "://" in path else str(base / path)


def image_files(dataset: datasets.Dataset, column: str) -> Iterator[tuple[str, os.stat_result]]:
    """Path and status of each image of an undecoded column that is a file, in row order."""
    rows = dataset.with_format(None).select_columns([column])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        for value in rows[start : start + _ROWS_AT_ONCE][column]:
            if value and value["path"] and value["bytes"] is None:
                with suppress(OSError, ValueError):
                    yield value["path"], os.stat(value["path"])


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
        raise InputError(f'image "{_name(value)}" can\'t be read: {reason}')
    return picture


def check_images(dataset: datasets.Dataset, column: str) -> list[tuple[int, str, str]]:
    """Decodes every image of a column, all of it, on as many threads as there are processors.

    To share the work among processes, give each its own `dataset.shard(...)`; the indices are
    then the shard's.

    Returns:
        (row, path, reason) of each image that can't be decoded, in row order.
    """
    rows = dataset.with_format(None).select_columns([column])
    bad: list[tuple[int, str, str]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            values = rows[start : start + _ROWS_AT_ONCE][column]
            reasons = pool.map(_flaw, values)
            bad.extend(
                (row, _name(value), reason)
                for row, value, reason in zip(count(start), values, reasons, strict=False)
                if reason
            )
    return bad


def _name(value: Mapping[str, Any] | None) -> str:
    return str((value or {}).get("path") or "(no file name)")


def _flaw(value: Mapping[str, Any] | None) -> str:
    """Why an image can't be decoded, or ""; lets go of the pixels at once."""
    return _attempt(value, lambda w, h: View(0, 0, w, h, _CHECKED, _CHECKED))[1]


def _whole(width: int, height: int) -> View:
    return View(0, 0, width, height, width, height)


def _attempt(
    value: Mapping[str, Any] | None, choose: Callable[[int, int], View]
) -> tuple[Picture | None, str]:
    """The image and "", or None and why not. Pillow's plug-ins raise errors of every kind."""
    path, data = str((value or {}).get("path") or ""), (value or {}).get("bytes")
    if data is None and not path:
        return None, "the row names no image"
    if data is None and "://" in path:
        return None, "it is a web address; download the images and name the files instead"
    if data is None and os.path.isdir(path):
        return None, "it is a folder"
    try:
        if not (os.path.getsize(path) if data is None else len(data)):
            return None, "the file is empty"
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            mark = _orientation(image)
            view = choose(*(image.size[::-1] if mark in _TURNED else image.size))
            divisor = _reduce(image, view, mark)
            image.load()
            return Picture(_to_rgb(_upright(image, mark)), view, divisor), ""
    except Exception as error:
        return None, _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "its content is not an image that Pillow knows"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"it has too many pixels, more than Pillow's guard against decompression bombs allows "
            f"({error}); make it smaller"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


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
