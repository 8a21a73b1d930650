"""Images are prepared on bytes as the model's own processor prepares them, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from hfft.errors import InputError
from hfft.image_inputs import Preparation, as_pixels, find_preparation, open_pixels
from hfft.images import View, open_image, open_view
from tests.test_images import photo, truncated_jpeg

SIZES = [(500, 375), (301, 433), (90, 71), (1001, 40)]


def of_timm(**changes: Any) -> TimmWrapperImageProcessor:
    config = timm.create_model("resnet10t").pretrained_cfg
    return TimmWrapperImageProcessor({**config, "crop_pct": 0.9, **changes}, "resnet10t")


PROCESSORS = {
    "timm bicubic": of_timm(interpolation="bicubic"),
    "timm bilinear": of_timm(interpolation="bilinear"),
    "timm squash": of_timm(crop_mode="squash"),
    "vit": ViTImageProcessor(),
    "vit pil": ViTImageProcessorPil(),
    "clip": CLIPImageProcessor(),
    "convnext 224": ConvNextImageProcessor(size={"shortest_edge": 224}),
    "convnext 384": ConvNextImageProcessor(),
}


def found(processor: Any) -> Preparation:
    preparation = find_preparation(processor)
    assert preparation is not None
    return preparation


def apart(preparation: Preparation, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Differences in values of 255."""
    assert one.shape == other.shape
    return (one - other).abs() * preparation.std.view(3, 1, 1)


@pytest.mark.parametrize("name", PROCESSORS)
def test_preparation_is_the_processors_own_but_for_rounding(name: str) -> None:
    preparation = found(PROCESSORS[name])
    for width, height in SIZES:
        image = photo(width, height)
        own = PROCESSORS[name](image, return_tensors="pt")["pixel_values"][0]
        difference = apart(preparation, preparation(as_pixels(image)), own)
        assert difference.mean() < 0.3
        assert difference.max() < 2.01


@pytest.mark.parametrize("name", ["vit", "clip", "convnext 224", "convnext 384"])
def test_where_the_processor_resizes_bytes_nothing_differs(name: str) -> None:
    image = photo(500, 375)
    own = PROCESSORS[name](image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(found(PROCESSORS[name])(as_pixels(image)), own)


@pytest.mark.parametrize(
    "processor",
    [
        of_timm(crop_mode="border"),
        of_timm(interpolation="lanczos"),
        of_timm(input_size=(3, 64, 96)),  # timm resizes these in a way of its own
        MobileViTImageProcessor(),  # blue first
        EfficientNetImageProcessor(),  # nearest neighbours
        ViTImageProcessor(do_resize=False),
        ViTImageProcessor(do_normalize=False),
    ],
)
def test_what_is_out_of_the_common_is_left_to_the_processor(processor: Any) -> None:
    assert find_preparation(processor) is None


def test_a_processor_that_does_more_than_it_says_is_found_out() -> None:
    class Mirrored(ViTImageProcessor):
        def __call__(self, images: Any, **options: Any) -> Any:
            made = super().__call__(images, **options)
            made["pixel_values"] = made["pixel_values"].flip(-1)
            return made

    assert find_preparation(Mirrored()) is None


@pytest.mark.parametrize("size", [(2000, 1504), (2003, 1501)])
@pytest.mark.parametrize("mark", range(1, 9))
def test_reduced_scale_shows_the_same_picture(
    size: tuple[int, int], mark: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = mark
    path = tmp_path / "a.jpg"
    photo(*size).save(path, quality=90, exif=exif)
    value = {"path": str(path), "bytes": None}
    preparation = found(PROCESSORS["timm bicubic"])
    picture = open_view(value, preparation.view)
    turned = size[0] % 2 and mark > 1  # part of a pixel would come first: decoded whole
    assert picture.divisor == (1 if turned else 2)
    reduced = preparation(open_pixels(value, preparation.view, "bicubic"))
    own = PROCESSORS["timm bicubic"](open_image(value), return_tensors="pt")["pixel_values"][0]
    difference = apart(preparation, reduced, own)
    assert difference.mean() < 0.4
    assert difference.max() < 6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True}),
        ("a.jpg", {"subsampling": 0}),
        ("a.jpg", {"keep_rgb": True}),
        ("a.png", {}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_whole_pixels_are_those_of_open_image(
    mode: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if mode == "CMYK" and name == "a.png":
        mode = "P"
    path = tmp_path / name
    options = options if mode == "RGB" or "keep_rgb" not in options else {}
    photo(333, 217).convert(mode).save(path, quality=90, **options)
    for value in ({"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}):
        pixels = open_pixels(value, whole, "bilinear")
        assert torch.equal(pixels, as_pixels(open_image(value)))


def whole(width: int, height: int) -> View:
    return View(0, 0, width, height, width, height)


def test_damaged_files_say_what_open_image_says(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("hello")
    for path in (truncated_jpeg(tmp_path / "a.jpg"), tmp_path / "notes.jpg", tmp_path / "no.jpg"):
        value = {"path": str(path), "bytes": None}
        with pytest.raises(InputError) as one:
            open_image(value)
        with pytest.raises(InputError) as other:
            open_pixels(value, whole, "bilinear")
        assert str(one.value) == str(other.value)


def test_part_of_a_view_is_the_same_part_at_reduced_scale(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    photo(2000, 1500).save(path, quality=90)
    value = {"path": str(path), "bytes": None}
    view = View(left=333, top=121, width=1201, height=1003, columns=120, rows=100)
    assert open_view(value, lambda *_: view).divisor == 4
    box = (333, 121, 333 + 1201, 121 + 1003)
    part = open_image(value).crop(box).resize((120, 100), Image.Resampling.BICUBIC)
    reduced = open_pixels(value, lambda *_: view, "bicubic").permute(1, 2, 0).numpy().astype(float)
    assert np.abs(reduced - np.asarray(part)).mean() < 0.6
