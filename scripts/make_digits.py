"""Write scikit-learn's handwritten digits as an ordinary image folder.

The quickstart needs a small target task that no download stands in front of. scikit-learn ships
1797 handwritten digits of 8x8 pixels (from the UCI "Optical Recognition of Handwritten Digits"
data set, CC BY 4.0), so this script enlarges them and lays them out the way every image-folder
loader expects::

    OUT_DIR/{train,validation,test}/{0..9}/NNNN.png
    OUT_DIR/about.json

With ``--jitter`` (the default) each digit is also turned, scaled and shifted at random. The plain
digits are so well centred that a linear classifier on raw pixels does well; the jittered ones need
features that tolerate movement, which is what tells fine-tuning strategies apart.

Usage:
    python scripts/make_digits.py data/digits --per-class 10 --jitter --seed 0
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from made_folder import make_and_tell
from PIL import Image
from sklearn.datasets import load_digits

SOURCE_SIDE = 8
IMAGE_SIDE = 32
NUM_CLASSES = 10
VALIDATION_IMAGES = 300
TEST_IMAGES = 900

MAX_ROTATION_DEGREES = 25.0
SCALE_RANGE = (0.65, 1.0)
MAX_SHIFT_PIXELS = 4.0

Splits = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Recipe:
    """Everything the written bytes depend on, kept beside the images in ``about.json``.

    Attributes:
        per_class: Labelled training images for each of the ten digits.
        jitter: Whether each digit is turned, scaled and shifted at random.
        seed: Seed of the split and of the jitter.
    """

    per_class: int
    jitter: bool
    seed: int


def split_indices(labels: npt.NDArray[np.int64], recipe: Recipe) -> Splits:
    """Divide the digits into disjoint splits.

    Test and validation are drawn first, so that they stay the same whatever ``per_class`` is and
    scores for different amounts of training data can be compared.

    Args:
        labels: The class of every digit, shape (N,).
        recipe: Gives the seed and the number of training images per class.

    Returns:
        Ascending indices into ``labels`` for each split.

    Raises:
        ValueError: If a class has too few digits left for training.
    """
    order = np.random.default_rng(recipe.seed).permutation(len(labels))
    test, validation, rest = np.split(order, [TEST_IMAGES, TEST_IMAGES + VALIDATION_IMAGES])
    members = [rest[labels[rest] == digit] for digit in range(NUM_CLASSES)]
    most = min(len(member) for member in members)
    if not 1 <= recipe.per_class <= most:
        raise ValueError(f"--per-class must lie between 1 and {most}, not {recipe.per_class}")
    train = np.concatenate([member[: recipe.per_class] for member in members])
    return {
        "train": np.sort(train),
        "validation": np.sort(validation),
        "test": np.sort(test),
    }


def jitter_coefficients(
    rng: np.random.Generator, margin: int
) -> tuple[float, float, float, float, float, float]:
    """Draw a random similarity transform in the form that Pillow's ``Image.transform`` takes.

    Pillow maps each output pixel to the input, hence the inverse rotation and scale. Enlarging
    from the source's pixels is part of the same map, so each digit is resampled only once.

    Args:
        rng: Source of the rotation, scale and shift.
        margin: Empty source pixels around the digit.

    Returns:
        ``(a, b, c, d, e, f)`` with ``x_in = a x + b y + c`` and ``y_in = d x + e y + f``.
    """
    angle = math.radians(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    zoom = rng.uniform(*SCALE_RANGE) * IMAGE_SIDE / SOURCE_SIDE
    shift_x, shift_y = rng.uniform(-MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS, size=2)
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    target_x, target_y = IMAGE_SIDE / 2 + shift_x, IMAGE_SIDE / 2 + shift_y
    centre = margin + SOURCE_SIDE / 2
    return (
        cosine,
        sine,
        centre - cosine * target_x - sine * target_y,
        -sine,
        cosine,
        centre + sine * target_x - cosine * target_y,
    )


def draw_digit(pixels: npt.NDArray[np.float64], index: int, recipe: Recipe) -> Image.Image:
    """Enlarge one digit, and jitter it if the recipe says so.

    The jitter is seeded by the digit's own index, so a digit looks the same whichever split it
    falls in and however many others are written.

    Args:
        pixels: Grey levels from 0 to 16, shape (8, 8).
        index: The digit's place in scikit-learn's data set.
        recipe: Says whether to jitter, and from which seed.

    Returns:
        A grey-scale image of 32x32 pixels, bright strokes on dark ground.
    """
    grey = np.rint(pixels * (255 / 16)).astype(np.uint8)
    size = (IMAGE_SIDE, IMAGE_SIDE)
    if not recipe.jitter:
        return Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC)
    margin = SOURCE_SIDE
    coefficients = jitter_coefficients(np.random.default_rng([recipe.seed, index]), margin)
    return Image.fromarray(np.pad(grey, margin)).transform(
        size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )


def about(recipe: Recipe) -> dict[str, object]:
    """Describe a folder by what its bytes depend on, to recognise it when run again."""
    return {
        "source": "sklearn.datasets.load_digits (UCI optdigits, CC BY 4.0)",
        "image_side": IMAGE_SIDE,
        "validation_images": VALIDATION_IMAGES,
        "test_images": TEST_IMAGES,
        "max_rotation_degrees": MAX_ROTATION_DEGREES,
        "scale_range": list(SCALE_RANGE),
        "max_shift_pixels": MAX_SHIFT_PIXELS,
        **asdict(recipe),
    }


def write_folder(folder: Path, recipe: Recipe) -> Mapping[str, int]:
    """Write the whole data set into ``folder``, which must not exist yet.

    Args:
        folder: Where the splits go.
        recipe: What to write.

    Returns:
        The number of images in each split.
    """
    images, labels = load_digits(return_X_y=True)
    splits = split_indices(labels, recipe)
    for split, indices in splits.items():
        for digit in range(NUM_CLASSES):
            (folder / split / str(digit)).mkdir(parents=True)
        for index in indices.tolist():
            picture = draw_digit(images[index].reshape(SOURCE_SIDE, SOURCE_SIDE), index, recipe)
            picture.save(folder / split / str(labels[index]) / f"{index:04d}.png")
    return {split: len(indices) for split, indices in splits.items()}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Write scikit-learn's handwritten digits as an image folder."
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to make")
    parser.add_argument(
        "--per-class", type=int, default=10, help="training images per digit (default: 10)"
    )
    parser.add_argument(
        "--jitter",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="turn, scale and shift each digit at random (default: on)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of split and jitter (default: 0)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    options = parse_arguments(arguments)
    recipe = Recipe(per_class=options.per_class, jitter=options.jitter, seed=options.seed)
    return make_and_tell(
        options.out_dir, about(recipe), lambda folder: write_folder(folder, recipe)
    )


if __name__ == "__main__":
    raise SystemExit(main())
