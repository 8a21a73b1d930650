"""Pairs of a character and its name, made of the fonts that matplotlib brings."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image

from hfft.data import load_split
from hfft.registry import get

from .test_scripts import contents, load_script

load_script("glyph_images")  # which it imports
glyphs = load_script("make_glyph_captions")
OWN = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
BUNDLED = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")
SPLITS = ("train", "validation", "seen", "unseen")


def make(folder: Path, *options: str) -> int:
    return int(glyphs.main([str(folder), "--fonts", *options]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three fonts, and galleries of 40."""
    folder = tmp_path_factory.mktemp("glyphs") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "BUNDLED", BUNDLED)
        patch.setattr(glyphs, "GALLERY", 40)
        assert make(folder) == 0
    return folder


@pytest.fixture(scope="module")
def splits(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    files = {split: str(made / f"{split}.parquet") for split in SPLITS}
    cache = str(tmp_path_factory.mktemp("cache"))
    found: Any = load_dataset("parquet", data_files=files, cache_dir=cache)
    return {split: found[split].to_dict() for split in SPLITS} | {"features": found["train"]}


def font(name: str) -> Any:
    return glyphs.read_fonts([OWN / f"{name}.ttf"])[0]


def test_an_image_is_a_small_grey_square_and_its_caption_the_characters_name(
    splits: dict[str, Any],
) -> None:
    assert isinstance(splits["features"].features["image"], ImageFeature)
    train = splits["train"]
    with Image.open(io.BytesIO(train["image"][0]["bytes"])) as image:
        assert (image.mode, image.size) == ("L", (32, 32))
    assert "greek small letter alpha with tonos" in train["caption"]
    assert all(unicodedata.lookup(caption) for caption in train["caption"])
    assert not any(letter.isdigit() for caption in train["caption"] for letter in caption)


def test_no_gallery_has_what_another_split_was_chosen_by(splits: dict[str, Any]) -> None:
    captions = {split: set(splits[split]["caption"]) for split in SPLITS}
    assert [len(captions[split]) for split in SPLITS[1:]] == [80, 40, 40]
    assert captions["seen"] < captions["train"]
    assert not captions["unseen"] & captions["train"]
    assert len(captions["validation"] & captions["train"]) == 40
    assert not captions["validation"] & (captions["seen"] | captions["unseen"])


def test_seen_captions_are_in_fonts_of_makers_that_train_has_none_of(
    splits: dict[str, Any],
) -> None:
    assert set(splits["seen"]["font"]) == {"STIXGeneral"}
    assert set(splits["train"]["font"]) == {"DejaVu Sans", "DejaVu Serif"}


def test_captions_that_share_a_drawing_are_in_train_and_in_no_gallery(
    splits: dict[str, Any],
) -> None:
    fonts = glyphs.shared([font(name) for name in BUNDLED])
    drawn, alike = glyphs.survey(fonts)
    assert {"latin capital letter a", "greek capital letter alpha"} <= alike
    assert alike < {glyph.caption for glyph in drawn}
    assert "greek capital letter alpha" in splits["train"]["caption"]
    for gallery in SPLITS[1:]:
        assert not alike.intersection(splits[gallery]["caption"])


def test_a_font_of_placeholders_has_no_glyphs() -> None:
    last_resort = font("LastResortHE-Regular")
    assert len(last_resort.characters) > 10_000
    drawn, _ = glyphs.survey([last_resort])
    assert len(drawn) < 100


def test_what_differs_by_its_place_on_the_line_looks_different() -> None:
    draw = glyphs.pen(font("DejaVuSans"))
    comma, apostrophe = (draw(character).getbbox() for character in ",'")
    assert comma[1] > 16 > apostrophe[1]
    small, capital = (draw(character).getbbox() for character in "oO")
    assert small[3] - small[1] < capital[3] - capital[1]


def test_what_is_too_wide_is_made_smaller_to_its_edges() -> None:
    canvas = Image.new("L", (glyphs.CANVAS, glyphs.CANVAS))
    canvas.paste(255, (10, 40, 74, 48))
    image = glyphs.fitted(canvas, canvas.getbbox())
    left, top, right, bottom = image.getbbox()
    assert (image.size, left, right, bottom - top) == ((32, 32), 0, 32, 4)


def test_a_character_without_ink_is_left_out() -> None:
    assert glyphs.pen(font("DejaVuSans"))("\u2003") is None


def test_hfft_reads_the_pairs(made: Path) -> None:
    kind = get("zero-shot-image-classification")
    rows = load_split(str(made), "unseen", kind(kind.Options()).needs, labels=[], chosen={})
    assert len(rows) == 40
    assert {"image", "caption"} <= set(rows.column_names)


def test_the_same_pairs_are_made_once_and_others_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(glyphs, "BUNDLED", BUNDLED)
    monkeypatch.setattr(glyphs, "GALLERY", 40)
    before = contents(made)
    assert make(made) == 0
    assert "up to date" in capsys.readouterr().err
    assert int(glyphs.main([str(made), "--seed", "1", "--fonts"])) == 2
    assert "was made differently" in capsys.readouterr().err
    assert contents(made) == before
    assert json.loads(before["about.json"])["font_files"] == 3


def test_too_few_fonts_are_refused_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(glyphs, "BUNDLED", ("DejaVuSansDisplay", "DejaVuSerifDisplay"))
    assert make(tmp_path / "glyphs") == 2
    assert "--fonts" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
