"""Images of letters and symbols: fonts are found, drawn into a pool, and distorted in batches.

Every (font, character) pair is rendered once into a pool of grey-scale images; all variation
(bending, stroke width, resolution, position, noise) is then made from the pool in batches of
tensors, which costs a small part of a training step. ``pretrain_glyphs.py`` trains on them.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from fontTools.ttLib import TTFont, TTLibError  # type: ignore[import-untyped]
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

# Lower-case letters that only differ from their capital in size are left out, as size is one of
# the things that vary. So are characters that some hand could mean as a digit, like Cyrillic Ze.
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijlmnqrty"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαγδεζηλμξπσφψω"
CYRILLIC = "БДЖИЦШЭЮЯЪ"
SYMBOLS = "!?#$%&@+=<>{}()[/*~^€§¶÷"
CLASSES = LATIN + GREEK + CYRILLIC + SYMBOLS

IMAGE_SIDE = 32
POOL_SIDE = 40
RENDER_POINTS = 64
SYSTEM_FONT_FOLDERS = (
    Path("/usr/share/fonts"),
    Path("/usr/local/share/fonts"),
    Path("/Library/Fonts"),
    Path("/System/Library/Fonts"),
    Path("C:/Windows/Fonts"),
    Path.home() / ".local/share/fonts",
    Path.home() / ".fonts",
    Path.home() / "Library/Fonts",
)
FONT_SUFFIXES = {".ttf", ".otf"}
# These draw ornaments or Greek under the codes of Latin letters.
MISLABELLED_FAMILIES = {"D050000L", "Standard Symbols PS"}

# What the network is given: grey levels, repeated three times and moved to [-1, 1].
MEAN = [0.5, 0.5, 0.5]
STD = [0.5, 0.5, 0.5]

# Each batch is cut into this many equal parts, drawn at these resolutions before they are enlarged
# to 32 px: half of it is as coarse as scikit-learn's 8x8 digits.
RESOLUTIONS = (8, 8, 12, 24)
INVERTED_FRACTION = 0.1


@dataclass(frozen=True)
class GlyphPool:
    """Rendered characters, bright on dark.

    Attributes:
        images: Grey levels as uint8, shape (N, 1, POOL_SIDE, POOL_SIDE).
        labels: Index into ``CLASSES``, shape (N,).
        families: The font families the images come from, sorted.
    """

    images: Tensor
    labels: Tensor
    families: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


@dataclass(frozen=True)
class RenderedFont:
    """The characters of one font.

    Attributes:
        family: Name of the family, such as ``DejaVu Sans``.
        glyphs: For each class the font has, a uint8 array (POOL_SIDE, POOL_SIDE).
    """

    family: str
    glyphs: dict[int, npt.NDArray[np.uint8]]


def log(message: str) -> None:
    """Report progress on stderr."""
    print(message, file=sys.stderr, flush=True)


# --- fonts and rendering --------------------------------------------------------------------------


def find_fonts(folders: Sequence[Path], bundled: Sequence[str] = ("DejaVu*",)) -> list[Path]:
    """List font files: some of matplotlib's own, then all below the given folders.

    Args:
        folders: Where to look, subfolders included; those that do not exist are passed over.
        bundled: Which fonts of matplotlib's are taken, as patterns of their names.

    Returns:
        Paths in an order that depends on the files' names only.
    """
    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    named = sorted(path for pattern in bundled for path in own.glob(f"{pattern}.ttf"))
    found = {path for folder in folders for path in folder.rglob("*")}
    system = (path for path in found if path.suffix.lower() in FONT_SUFFIXES)
    return named + sorted(system, key=lambda path: (path.name, path))


def maker_of(family: str) -> str:
    """Guess who made a font: the first letters of ``Noto Sans`` and ``Noto Serif`` agree."""
    return family[:4].lower()


def read_font(path: Path) -> tuple[str, dict[int, str]]:
    """Return a font's family, and its glyph for each code point that it has one for.

    Raises:
        OSError, TTLibError, KeyError: If the file cannot be read.
    """
    with TTFont(path, lazy=True) as tables:
        covered = tables.getBestCmap() or {}
        return tables["name"].getBestFamilyName() or path.stem, covered


def render_glyph(font: ImageFont.FreeTypeFont, character: str) -> npt.NDArray[np.uint8] | None:
    """Draw one character, cropped to its ink and fitted into the middle of the pool's square.

    Fitting the ink rather than the em square mirrors the target's digits, which fill their box.

    Args:
        font: The font at ``RENDER_POINTS``.
        character: The character to draw.

    Returns:
        Grey levels (POOL_SIDE, POOL_SIDE), or None if the font draws nothing for it.
    """
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    canvas = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
    ink = canvas.getbbox()
    if ink is None:
        return None
    glyph = canvas.crop(ink)
    ratio = IMAGE_SIDE / max(glyph.size)
    width, height = (max(1, round(side * ratio)) for side in glyph.size)
    square = Image.new("L", (POOL_SIDE, POOL_SIDE))
    corner = ((POOL_SIDE - width) // 2, (POOL_SIDE - height) // 2)
    square.paste(glyph.resize((width, height), Image.Resampling.BOX), corner)
    return np.asarray(square)


def is_usable(glyphs: dict[int, npt.NDArray[np.uint8]]) -> bool:
    """Tell whether a font really has a Latin alphabet of two cases.

    Fonts of other scripts lack Latin letters, placeholder fonts draw the same box for everything,
    and fonts of capitals only would teach that an ``a`` looks like an ``A``.
    """
    if any(index not in glyphs for index in range(len(LATIN))):
        return False
    probes = [glyphs[CLASSES.index(letter)].tobytes() for letter in "AaBbRr"]
    return len(set(probes)) == len(probes)


def render_font(path: Path) -> RenderedFont | None:
    """Draw every class that a font covers.

    Args:
        path: A TrueType or OpenType file.

    Returns:
        The drawn characters, or None if the font cannot be read or lacks the Latin letters.
    """
    try:
        family, covered = read_font(path)
        font = ImageFont.truetype(str(path), RENDER_POINTS)
        drawn = {
            index: render_glyph(font, character)
            for index, character in enumerate(CLASSES)
            if ord(character) in covered
        }
    except (OSError, TTLibError, KeyError) as error:
        log(f"skipping {path.name}: {error}")
        return None
    glyphs = {index: glyph for index, glyph in drawn.items() if glyph is not None}
    return RenderedFont(family, glyphs) if is_usable(glyphs) else None


def render_fonts(paths: Sequence[Path]) -> list[RenderedFont]:
    """Draw all usable fonts, each design once.

    Many fonts for other scripts carry the same Latin letters; repeats would weigh their design
    more and could leak it into the held-out fonts.

    Args:
        paths: Font files.

    Returns:
        The fonts in the order of their paths.
    """
    designs: dict[bytes, RenderedFont] = {}
    for path in paths:
        font = render_font(path)
        if font is not None and font.family not in MISLABELLED_FAMILIES:
            letters = b"".join(font.glyphs[index].tobytes() for index in range(len(LATIN)))
            designs.setdefault(hashlib.sha256(letters).digest(), font)
    return list(designs.values())


def gather(fonts: Sequence[RenderedFont]) -> GlyphPool:
    """Stack the characters of some fonts into one pool."""
    images = [glyph for font in fonts for glyph in font.glyphs.values()]
    labels = [index for font in fonts for index in font.glyphs]
    return GlyphPool(
        images=torch.from_numpy(np.stack(images)).unsqueeze(1),
        labels=torch.tensor(labels),
        families=tuple(sorted({font.family for font in fonts})),
    )


# --- augmentation ---------------------------------------------------------------------------------


class Distorter:
    """Turns pool images into training images, all randomness from one generator."""

    def __init__(self, seed: int) -> None:
        """Seed the generator."""
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw from [low, high)."""
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def affine(
        self,
        count: int,
        *,
        degrees: float,
        scale: tuple[float, float],
        squeeze: float,
        shear: float,
        shift: float,
    ) -> Tensor:
        """Draw random affine maps from output to input coordinates.

        Args:
            count: How many maps, B.
            degrees: Largest rotation either way.
            scale: Range of the size of what is drawn.
            squeeze: Largest log-ratio by which width and height part from the scale.
            shear: Largest horizontal shear.
            shift: Largest shift, in half widths of the image.

        Returns:
            Matrices of shape (B, 2, 3), as ``affine_grid`` takes them.
        """
        angle = self.uniform(-degrees, degrees, count) * (math.pi / 180)
        size = self.uniform(*scale, count)
        stretch = self.uniform(-squeeze, squeeze, count).exp()
        slant = self.uniform(-shear, shear, count)
        across, down = stretch / size, 1 / (stretch * size)
        cosine, sine = angle.cos(), angle.sin()
        rows = [
            torch.stack([across * (cosine + slant * sine), across * (slant * cosine - sine)], 1),
            torch.stack([down * sine, down * cosine], 1),
        ]
        return torch.cat([torch.stack(rows, 1), self.uniform(-shift, shift, count, 2, 1)], 2)

    def bend(self, count: int, side: int, strength: float) -> Tensor:
        """Draw smooth random displacements, the difference between a font and a hand.

        Args:
            count: How many, B.
            side: Height and width of the field.
            strength: Standard deviation at the knots, in half widths of the image.

        Returns:
            Displacements of shape (B, side, side, 2).
        """
        amount = self.uniform(0, strength, count, 1, 1, 1)
        knots = torch.randn((count, 2, 4, 4), generator=self.generator) * amount
        field = F.interpolate(knots, size=(side, side), mode="bicubic", align_corners=True)
        return field.permute(0, 2, 3, 1)

    def restroke(self, images: Tensor) -> Tensor:
        """Thicken or thin the strokes by up to a pixel or so.

        Args:
            images: Grey levels in [0, 1], shape (B, 1, H, W).

        Returns:
            Images of the same shape.
        """
        thick = F.max_pool2d(images, 3, stride=1, padding=1)
        thicker = F.max_pool2d(thick, 3, stride=1, padding=1)
        thin = -F.max_pool2d(-images, 3, stride=1, padding=1)
        amount = self.uniform(-0.5, 2.0, len(images), 1, 1, 1)
        grown = images.lerp(thick, amount.clamp(0, 1)).lerp(thicker, (amount - 1).clamp(0, 1))
        return torch.where(amount < 0, images.lerp(thin, -amount), grown)

    def tone(self, images: Tensor) -> Tensor:
        """Vary contrast, ground and polarity, and add noise.

        Thin strokes fade at a low resolution, hence each image is first brought to full contrast.

        Args:
            images: Grey levels, shape (B, 1, H, W).

        Returns:
            Grey levels in [0, 1] of the same shape.
        """
        count = len(images)
        ink = images.clamp(min=0)
        ink = ink / ink.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.1)
        toned = ink ** self.uniform(-0.5, 0.5, count, 1, 1, 1).exp()
        toned = toned * self.uniform(0.6, 1.1, count, 1, 1, 1)
        noise = torch.randn(images.shape, generator=self.generator)
        toned = (toned + noise * self.uniform(0, 0.05, count, 1, 1, 1)).clamp(0, 1)
        inverted = self.uniform(0, 1, count, 1, 1, 1) < INVERTED_FRACTION
        return torch.where(inverted, 1 - toned, toned)

    def __call__(self, images: Tensor) -> Tensor:
        """Distort a batch.

        The shape is bent first and drawn at a low resolution; only then is the coarse drawing
        enlarged, turned and moved. That is the order in which the target's digits come about.

        Args:
            images: Pool images, uint8, shape (B, 1, POOL_SIDE, POOL_SIDE).

        Returns:
            Normalised images of shape (B, 3, IMAGE_SIDE, IMAGE_SIDE).
        """
        count = len(images)
        drawn = self.restroke(images.float() / 255)
        shape = self.affine(
            count, degrees=8, scale=(0.95, 1.3), squeeze=0.25, shear=0.35, shift=0.08
        )
        grid = F.affine_grid(shape, [count, 1, IMAGE_SIDE, IMAGE_SIDE], align_corners=False)
        grid = grid + self.bend(count, IMAGE_SIDE, strength=0.14)
        drawn = F.grid_sample(drawn, grid, align_corners=False)
        place = self.affine(count, degrees=30, scale=(0.6, 1.05), squeeze=0.1, shear=0.1, shift=0.2)
        grid = F.affine_grid(place, [count, 1, IMAGE_SIDE, IMAGE_SIDE], align_corners=False)
        parts = [
            F.grid_sample(
                F.interpolate(part, size=(side, side), mode="area"),
                where,
                mode="bicubic",
                align_corners=False,
            )
            for part, where, side in zip(
                drawn.chunk(len(RESOLUTIONS)),
                grid.chunk(len(RESOLUTIONS)),
                RESOLUTIONS,
                strict=True,
            )
        ]
        return normalise(self.tone(torch.cat(parts)))


def normalise(images: Tensor) -> Tensor:
    """Map grey levels in [0, 1] to the network's input, as the image processor will.

    Args:
        images: Shape (B, 1, H, W).

    Returns:
        Shape (B, 3, H, W).
    """
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return (images - mean) / std
