"""Images are opened as people see them, and every one that can't be is named beforehand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hfft.errors import InputError
from hfft.images import Picture, View, check_images, open_image, open_view


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8), "red")).save(path, **options)
    return path


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Large and small shapes, gradients and a little noise, as a camera might have seen them."""
    random = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3), np.float32)
    for cells, contrast in ((4, 40), (16, 30), (64, 20)):
        coarse = random.normal(128, contrast, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        layers += np.asarray(smooth, np.float32) / 3
    layers += random.normal(0, 3, layers.shape)
    return Image.fromarray(layers.clip(0, 255).astype(np.uint8))


def opened(path: Path) -> Image.Image:
    return open_image({"path": str(path), "bytes": None})


def truncated_jpeg(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
    save(path, Image.fromarray(noise), format="JPEG")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def column(*paths: Path | None) -> datasets.Dataset:
    rows = [path and str(path) for path in paths]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": rows}, features=features)


def test_orientation_mark_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert opened(save(tmp_path / "a.jpg", Image.new("RGB", (8, 4)), exif=exif)).size == (4, 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert(mode)
    assert opened(save(tmp_path / "a.png", picture)).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 2), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((1, 1), 1)
    image = opened(save(tmp_path / "a.png", picture, transparency=0))
    assert [image.getpixel(at) for at in ((0, 0), (1, 1))] == [(255, 255, 255), (255, 0, 0)]


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    assert opened(save(tmp_path / "a.png", grey)).getpixel((0, 0)) == (128, 128, 128)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = opened(save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0))))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


def test_bytes_are_opened_without_a_file() -> None:
    buffer = io.BytesIO()
    Image.new("1", (3, 2)).save(buffer, "PNG")
    image = open_image({"path": None, "bytes": buffer.getvalue()})
    assert (image.size, image.mode) == ((3, 2), "RGB")


def test_open_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("hello")
    with pytest.raises(
        InputError, match=r'image ".*notes\.png" can\'t be read: its content is not'
    ):
        opened(tmp_path / "notes.png")


def test_float_pixels_are_refused_rather_than_guessed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", Image.new("F", (4, 4), 0.5))
    with pytest.raises(InputError, match="32-bit floats of unknown range"):
        opened(path)
    assert "32-bit floats" in check_images(column(path), "image")[0][2]


def test_too_many_pixels_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"too many pixels.*make it smaller"):
        opened(path)


def viewed(path: Path, columns: int, rows: int) -> Picture:
    """All of an image, wanted at this size."""
    return open_view(
        {"path": str(path), "bytes": None}, lambda w, h: View(0, 0, w, h, columns, rows)
    )


@pytest.mark.parametrize(
    ("columns", "divisor"), [(400, 1), (201, 1), (200, 2), (100, 4), (50, 8), (10, 8)]
)
def test_jpeg_is_decoded_at_a_scale_that_leaves_two_pixels_for_one(
    columns: int, divisor: int, tmp_path: Path
) -> None:
    picture = viewed(save(tmp_path / "a.jpg", photo(800, 600)), columns, columns * 3 // 4)
    assert picture.divisor == divisor
    assert picture.image.size == (800 // divisor, 600 // divisor)


def test_the_narrower_side_decides_the_scale(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", photo(1600, 200))
    assert viewed(path, 100, 100).divisor == 1
    assert viewed(path, 100, 50).divisor == 2


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.bmp"])
def test_other_formats_are_decoded_whole(name: str, tmp_path: Path) -> None:
    picture = viewed(save(tmp_path / name, photo(800, 600)), 50, 40)
    assert (picture.divisor, picture.image.size) == (1, (800, 600))


@pytest.mark.parametrize(
    ("mode", "options", "divisor"),
    [
        ("RGB", {"progressive": True}, 4),
        ("L", {}, 4),
        ("CMYK", {}, 1),
        ("RGB", {"subsampling": 0}, 4),
    ],
)
def test_every_kind_of_jpeg_looks_the_same_at_reduced_scale(
    mode: str, options: dict[str, Any], divisor: int, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.jpg", photo(800, 600).convert(mode), quality=90, **options)
    picture = viewed(path, 100, 75)
    assert (picture.divisor, picture.image.mode) == (divisor, "RGB")
    whole, reduced = (
        np.asarray(image.resize((100, 75), Image.Resampling.BICUBIC), float)
        for image in (opened(path), picture.image)
    )
    assert np.abs(whole - reduced).mean() < 0.6


def test_damaged_files_say_the_same_at_reduced_scale(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("hello")
    for path in (truncated_jpeg(tmp_path / "a.jpg"), tmp_path / "notes.jpg", tmp_path / "no.jpg"):
        with pytest.raises(InputError) as whole:
            opened(path)
        with pytest.raises(InputError) as reduced:
            viewed(path, 10, 10)
        assert str(reduced.value) == str(whole.value)


def test_check_finds_every_kind_of_bad_image_with_its_row(tmp_path: Path) -> None:
    good = save(tmp_path / "good.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    bad = check_images(
        column(
            good,
            truncated_jpeg(tmp_path / "short.jpg"),
            tmp_path / "empty.png",
            tmp_path / "folder.png",
            tmp_path / "absent.png",
            None,
            good,
        ),
        "image",
    )
    assert [row for row, _, _ in bad] == [1, 2, 3, 4, 5]
    assert [Path(path).name for _, path, _ in bad][:4] == [
        "short.jpg",
        "empty.png",
        "folder.png",
        "absent.png",
    ]
    for (_, _, reason), expected in zip(
        bad,
        ["truncated", "the file is empty", "it is a folder", "no such file", "names no image"],
        strict=True,
    ):
        assert expected in reason


def test_check_of_good_images_finds_nothing_past_one_batch(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    assert check_images(column(*[path] * 300), "image") == []


def test_check_numbers_rows_past_one_batch(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    found = check_images(column(*[path] * 299, tmp_path / "absent.png"), "image")
    assert [row for row, _, _ in found] == [299]
