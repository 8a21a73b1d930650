"""Write pairs of an image and a caption: characters in many fonts, and their Unicode names.

Contrastive training of images and texts needs thousands of pairs that no download stands in front
of. Fonts hold them: a letter or symbol as each of them draws it, and its name, such as ``greek
small letter alpha with tonos`` or ``downwards arrow with tip leftwards``. They are written as
Parquet, with the columns ``image`` (PNG, 32x32, grey, bright on dark), ``caption`` and ``font``::

    OUT_DIR/train.parquet        up to 6 drawings of a character
    OUT_DIR/validation.parquet   512 pairs, half as in seen and half as in unseen, of other captions
    OUT_DIR/seen.parquet         256 captions that occur in train, in fonts of makers that don't
    OUT_DIR/unseen.parquet       256 captions that don't occur in train, in any font
    OUT_DIR/about.json

A caption is taken if fonts by three makers have its character, and if its name has no number in it,
which is mostly a place in a table and says nothing of a shape. What counts as having is a glyph
other than the font's ``.notdef``, with ink; a drawing that stands for more than eight characters of
a font is taken for the box that fonts draw in place of what they lack.

Latin, Greek and Cyrillic A look the same. A drawing that stands for several characters of a font
is left in train, with all its captions, but no such caption is in a gallery, as it couldn't be told
from the others. This goes by equal pixels: look-alikes that differ by a pixel stay, and so do names
that no image tells (``canadian syllabics twoo``).

The fonts are matplotlib's DejaVu and STIX, and those that the system has. Other fonts make other
pairs, and scores on them don't compare; ``about.json`` counts them.

Usage:
    python scripts/make_glyph_captions.py data/glyph_captions
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from datasets import Dataset, Features, Image, Value, disable_progress_bars
from fontTools.ttLib import TTLibError  # type: ignore[import-untyped]
from glyph_images import (
    IMAGE_SIDE,
    MISLABELLED_FAMILIES,
    SYSTEM_FONT_FOLDERS,
    find_fonts,
    log,
    maker_of,
    read_font,
)
from made_folder import Counts, make_and_tell
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

BUNDLED = ("DejaVu*", "STIXGeneral*")
"""matplotlib's: two makers, so that fonts can be held out wherever the script runs."""
MAKERS = 3
"""Whose fonts must have a character; all of them, where there are fewer."""
HELD_OUT_MAKERS = 0.2
"""Share of the makers whose fonts are kept out of train."""
MOST_ALIKE = 8
"""Characters of a font that one drawing can stand for, before it is taken for a placeholder."""
DRAWINGS = 6
"""Of a caption in train: no letter outweighs a symbol that few fonts have."""
GALLERY = 256

# Larger than the text, that nothing is cut off; the baseline is at three quarters of the height,
# so that a comma and an apostrophe, or a small and a capital letter, keep their difference.
CANVAS, POINTS, BASELINE = 96, 22, 24


@dataclass(frozen=True)
class Font:
    """A font file.

    Attributes:
        path: Where it is.
        family: Name of its family, such as ``DejaVu Sans``.
        characters: What it has a glyph for, of what could be captioned.
    """

    path: Path
    family: str
    characters: tuple[str, ...]

    @property
    def maker(self) -> str:
        """Who made it, as far as its name tells."""
        return maker_of(self.family)


@dataclass(frozen=True)
class Glyph:
    """A character in a font.

    Attributes:
        font: The font.
        character: The character.
        digest: Tells its drawing from others.
    """

    font: Font
    character: str
    digest: bytes

    @property
    def caption(self) -> str:
        """What the character is called."""
        return caption_of(self.character)


def caption_of(character: str) -> str:
    """Return a character's name in lower case; "" where it has none, or one with a number."""
    name = unicodedata.name(character, "").lower()
    return "" if any(letter.isdigit() for letter in name) else name


def read_fonts(paths: Iterable[Path]) -> list[Font]:
    """Read which characters the fonts have; those that can't be read are passed over."""
    fonts = []
    for path in paths:
        try:
            family, covered = read_font(path)
        except (OSError, TTLibError, KeyError) as error:
            log(f"skipping {path.name}: {error}")
            continue
        if family in MISLABELLED_FAMILIES:
            continue
        named = (chr(code) for code, glyph in covered.items() if glyph != ".notdef")
        # Hangul's eleven thousand syllables would be a third of all pairs
        characters = (c for c in named if caption_of(c) and not "\uac00" <= c <= "\ud7a3")
        fonts.append(Font(path, family, tuple(sorted(characters))))
    return fonts


def shared(fonts: Sequence[Font]) -> list[Font]:
    """Return the fonts with only those characters that enough makers have drawn."""
    makers: dict[str, set[str]] = defaultdict(set)
    for font in fonts:
        for character in font.characters:
            makers[character].add(font.maker)
    enough = min(MAKERS, len({font.maker for font in fonts}))
    kept = {character for character, found in makers.items() if len(found) >= enough}
    return [
        Font(font.path, font.family, tuple(c for c in font.characters if c in kept))
        for font in fonts
    ]


def pen(font: Font) -> Callable[[str], Pillow.Image | None]:
    """Return what draws a font's characters; None stands for no ink, or what can't be drawn."""
    face = ImageFont.truetype(str(font.path), POINTS, layout_engine=ImageFont.Layout.BASIC)

    def draw(character: str) -> Pillow.Image | None:
        canvas = Pillow.new("L", (CANVAS, CANVAS))
        place = (CANVAS // 2, CANVAS // 2)
        try:
            ImageDraw.Draw(canvas).text(place, character, fill=255, font=face, anchor="ms")
        except OSError:  # an outline that FreeType can't fill
            return None
        ink = canvas.getbbox()
        return None if ink is None else fitted(canvas, ink)

    return draw


def fitted(canvas: Pillow.Image, ink: tuple[int, int, int, int]) -> Pillow.Image:
    """Cut out the square round the ink: in the middle across, on the baseline as far as it fits."""
    left, top, right, bottom = ink
    side = max(IMAGE_SIDE, right - left, bottom - top)
    corner_x = (left + right - side) // 2
    corner_y = CANVAS // 2 - BASELINE * side // IMAGE_SIDE
    corner_y = min(max(corner_y, bottom - side), top)
    square = canvas.crop((corner_x, corner_y, corner_x + side, corner_y + side))
    if side == IMAGE_SIDE:
        return square
    return square.resize((IMAGE_SIDE, IMAGE_SIDE), Pillow.Resampling.BOX)


def survey(fonts: Sequence[Font]) -> tuple[list[Glyph], set[str]]:
    """Draw everything once; return the glyphs with ink, and captions that share a drawing."""
    glyphs: list[Glyph] = []
    alike: set[str] = set()
    for font in fonts:
        draw = pen(font)
        drawn = ((character, draw(character)) for character in font.characters)
        own = [
            Glyph(font, character, hashlib.blake2b(image.tobytes(), digest_size=16).digest())
            for character, image in drawn
            if image is not None
        ]
        uses = Counter(glyph.digest for glyph in own)
        alike.update(glyph.caption for glyph in own if 1 < uses[glyph.digest] <= MOST_ALIKE)
        glyphs += [glyph for glyph in own if uses[glyph.digest] <= MOST_ALIKE]
    return glyphs, alike


def split(glyphs: Sequence[Glyph], alike: set[str], seed: int) -> dict[str, list[Glyph]]:
    """Choose what goes where.

    Args:
        glyphs: All there are.
        alike: Captions that no gallery can have.
        seed: Decides which makers and which captions are held out.

    Returns:
        The glyphs of each split.

    Raises:
        ValueError: If there are too few for the galleries.
    """
    chance = random.Random(seed)
    held_out = held_out_makers(glyphs, chance)
    by_caption: dict[str, dict[bytes, Glyph]] = defaultdict(dict)
    for glyph in glyphs:
        by_caption[glyph.caption].setdefault(glyph.digest, glyph)
    clear = sorted(by_caption.keys() - alike)
    chance.shuffle(clear)
    unseen, clear = clear[: 2 * GALLERY], clear[2 * GALLERY :]
    kept: dict[str, list[Glyph]] = {}
    spared: dict[str, list[Glyph]] = {}
    for caption in sorted(by_caption.keys() - set(unseen)):
        found = by_caption[caption].values()
        kept[caption] = [glyph for glyph in found if glyph.font.maker not in held_out]
        spared[caption] = [glyph for glyph in found if glyph.font.maker in held_out]
    seen = [caption for caption in clear if kept[caption] and spared[caption]][: 2 * GALLERY]
    if len(seen) < 2 * GALLERY:
        raise ValueError(
            f"the fonts found have {len(seen)} captions for galleries of {2 * GALLERY} in fonts "
            f"held out; install others, or name a folder of .ttf or .otf files with --fonts"
        )
    galleries = [
        [chance.choice(list(by_caption[caption].values())) for caption in unseen],
        [chance.choice(spared[caption]) for caption in seen],
    ]
    train = [
        glyph
        for found in kept.values()
        for glyph in chance.sample(found, min(DRAWINGS, len(found)))
    ]
    return {
        "train": train,
        "validation": [glyph for gallery in galleries for glyph in gallery[GALLERY:]],
        "seen": galleries[1][:GALLERY],
        "unseen": galleries[0][:GALLERY],
    }


def held_out_makers(glyphs: Sequence[Glyph], chance: random.Random) -> set[str]:
    """Draw the makers to hold out; never DejaVu, without which a bare system had few captions."""
    makers = sorted({glyph.font.maker for glyph in glyphs} - {maker_of("DejaVu")})
    count = min(len(makers), max(1, round(HELD_OUT_MAKERS * len(makers))))
    return set(chance.sample(makers, count))


def encoded(glyphs: Sequence[Glyph]) -> Iterator[tuple[Glyph, bytes]]:
    """Draw glyphs as PNG, font by font."""
    ordered = sorted(glyphs, key=lambda glyph: (str(glyph.font.path), glyph.character))
    for _, own in groupby(ordered, key=lambda glyph: glyph.font.path):
        found = list(own)
        draw = pen(found[0].font)
        for glyph in found:
            image = draw(glyph.character)
            assert image is not None
            file = io.BytesIO()
            image.save(file, "PNG")
            yield glyph, file.getvalue()


def write_split(path: Path, glyphs: Sequence[Glyph]) -> int:
    """Write one split; return how many pairs it has."""
    columns: dict[str, list[object]] = {"image": [], "caption": [], "font": []}
    for glyph, png in encoded(glyphs):
        columns["image"].append({"bytes": png, "path": None})
        columns["caption"].append(glyph.caption)
        columns["font"].append(glyph.font.family)
    text = Value("string")
    features = Features({"image": Image(), "caption": text, "font": text})
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return len(glyphs)


def write_folder(folder: Path, paths: Sequence[Path], seed: int) -> Counts:
    """Write the whole data set into ``folder``, which must not exist yet."""
    fonts = shared(read_fonts(paths))
    glyphs, alike = survey(fonts)
    splits = split(glyphs, alike, seed)
    used = {glyph.font.path for glyph in glyphs}
    families = {glyph.font.family for glyph in glyphs}
    captions = {glyph.caption for glyph in glyphs}
    held_out = {g.font.maker for g in glyphs} - {g.font.maker for g in splits["train"]}
    log(
        f"{len(used)} font files of {len(families)} families, {len(held_out)} makers not in train; "
        f"{len(captions)} captions, {len(alike)} of which share a drawing with another"
    )
    folder.mkdir()
    return {name: write_split(folder / f"{name}.parquet", own) for name, own in splits.items()}


def about(paths: Sequence[Path], seed: int) -> dict[str, object]:
    """Describe a folder by what it is made from, to recognise it when run again."""
    files = sorted((path.name, path.stat().st_size) for path in paths)
    return {
        "source": "names of characters, and fonts: matplotlib's and the system's",
        "font_files": len(files),
        "fonts": hashlib.blake2b(repr(files).encode(), digest_size=16).hexdigest(),
        "drawings": DRAWINGS,
        "gallery": GALLERY,
        "unicode": unicodedata.unidata_version,
        "seed": seed,
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Write characters in many fonts, captioned by their Unicode names, as Parquet."
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to make")
    parser.add_argument(
        "--fonts",
        type=Path,
        nargs="*",
        default=SYSTEM_FONT_FOLDERS,
        metavar="FOLDER",
        help="folders to search for fonts, besides matplotlib's (default: the system's)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is held out (default: 0)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    options = parse_arguments(arguments)
    disable_progress_bars()
    paths = find_fonts(options.fonts, BUNDLED)
    return make_and_tell(
        options.out_dir,
        about(paths, options.seed),
        lambda folder: write_folder(folder, paths, options.seed),
    )


if __name__ == "__main__":
    raise SystemExit(main())
