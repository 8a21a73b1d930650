"""Measure what it costs to turn JPEGs into model inputs, and what the fast way changes.

Photo-like JPEGs are rendered on the spot. Each goes through torchvision's ImageFolder with v1
transforms of the same sizes, and through the image task with `decode: fast` and `exact`; the three
take turns, image by image, and the medians of CPU milliseconds are compared. Then a small network
with random weights and a linear probe tell textures apart, with inputs from both ways.

Usage:
    OMP_NUM_THREADS=1 python benchmarks/image_pipeline.py
    OMP_NUM_THREADS=1 python benchmarks/image_pipeline.py --photos 24 --large 2 --no-accuracy
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import TimmWrapperImageProcessor, ViTImageProcessor

from hfft.tasks.image_classification import ClassificationOptions, ImageClassification

PEERS = ("torch", "torchvision", "timm", "transformers", "pillow")
CLASSES, PER_CLASS, SIDE = 8, 48, 96


@dataclass(frozen=True)
class Recipe:
    """A processor, and v1 transforms that do the same."""

    name: str
    processor: Any
    resize: transforms.Resize
    crop: int
    mean: Sequence[float]
    std: Sequence[float]

    def v1(self) -> transforms.Compose:
        """Return resize, centre crop, ToTensor and Normalize."""
        normalize = transforms.Normalize(self.mean, self.std)
        crop = transforms.CenterCrop(self.crop)
        return transforms.Compose([self.resize, crop, transforms.ToTensor(), normalize])

    def task(self, decode: str) -> Callable[[str], Tensor]:
        """Return a path to `pixel_values`, as hfft evaluates."""
        task = ImageClassification(ClassificationOptions.model_validate({"decode": decode}))
        transform = task.transform(self.processor, training=False)
        return lambda path: transform({"image": {"path": path, "bytes": None}, "label": 0})[
            "pixel_values"
        ]


def of_timm(name: str, **changes: Any) -> Recipe:
    """Return the recipe of a timm model's weights, by their name."""
    config = timm.get_pretrained_cfg(name).to_dict() | changes
    processor = TimmWrapperImageProcessor(config, name.split(".")[0])
    resize, crop, _, _ = processor.val_transforms.transforms
    data = processor.data_config
    text = f"timm {name}, {resize.size} {resize.interpolation.value}, crop {crop.size[0]}"
    return Recipe(text, processor, resize, crop.size[0], data["mean"], data["std"])


def recipes() -> list[Recipe]:
    """Return torchvision's own recipe, timm's newer one, and the ViT's of transformers."""
    half = (0.5, 0.5, 0.5)
    whole = transforms.Resize((224, 224))
    return [
        of_timm("resnet50.tv_in1k"),
        of_timm("resnet50.a1_in1k"),
        Recipe("transformers ViT, 224 x 224 bilinear", ViTImageProcessor(), whole, 224, half, half),
    ]


def photo(width: int, height: int, random: np.random.Generator) -> Image.Image:
    """Render gradients, texture at several scales, shapes with edges, and sensor noise."""
    layers = np.zeros((height, width, 3), np.float32)
    for cells, contrast in ((3, 60), (12, 40), (48, 40), (192, 40)):
        coarse = random.normal(128, contrast, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        layers += np.asarray(smooth, np.float32) / 4
    image = Image.fromarray(layers.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        corner = random.uniform(0, 0.9, 2) * (width, height)
        box = [*corner, *(corner + random.uniform(0.01, 0.2) * height)]
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        (draw.ellipse if random.random() < 0.5 else draw.rectangle)(box, fill=colour)
    noise = random.normal(0, 5, (height, width, 1)).astype(np.float32)
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def render(folder: Path, count: int, width: int, height: int) -> Path:
    """Save photos as an ImageFolder of one class."""
    random = np.random.default_rng(width)
    (folder / "photos").mkdir(parents=True)
    for number in range(count):
        photo(width, height, random).save(folder / "photos" / f"{number:03}.jpg", quality=90)
    return folder


def compare(recipe: Recipe, folder: Path, rounds: int) -> None:
    """Print the cost of the three ways, and how far their pixels are apart."""
    peer = ImageFolder(str(folder), transform=recipe.v1())
    fast, exact = recipe.task("fast"), recipe.task("exact")
    paths = [path for path, _ in peer.samples]
    ways: dict[str, Callable[[int], Tensor]] = {
        "ImageFolder, v1": lambda n: peer[n][0],
        "hfft fast": lambda n: fast(paths[n]),
        "hfft exact": lambda n: exact(paths[n]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    values = torch.tensor(recipe.std).view(3, 1, 1) * 255
    apart = {name: [0.0, 0.0] for name in ("ImageFolder, v1", "hfft exact")}
    for turn in range(rounds):
        for number in range(len(paths)):
            made: dict[str, Tensor] = {}
            for name, way in ways.items():
                started = time.process_time()
                made[name] = way(number)
                if turn or number:  # the first of all warms up
                    times[name].append(time.process_time() - started)
            for name, found in apart.items() if not turn else ():
                difference = (made["hfft fast"] - made[name]).abs() * values
                found[0] += float(difference.mean()) / len(paths)
                found[1] = max(found[1], float(difference.max()))
    base = statistics.median(times["ImageFolder, v1"])
    for name, measured in times.items():
        cost = statistics.median(measured)
        line = f"  {name:16}{cost * 1e3:8.2f} ms{base / cost:7.2f} x"
        if name in apart:
            mean, most = apart[name]
            line += f"   fast differs from it by {mean:.3f} of 255, at most {most:.0f}"
        print(line, flush=True)


def textures(folder: Path) -> tuple[list[str], np.ndarray]:
    """Render waves in noise; a class is a direction and a wavelength."""
    random = np.random.default_rng(7)
    paths, labels = [], np.repeat(np.arange(CLASSES), PER_CLASS)
    y, x = np.mgrid[0:768, 0:1024].astype(np.float32)
    for number, label in enumerate(labels):
        angle = np.pi * (label % 4) / 4 + random.normal(0, 0.2)
        length = (28, 44)[label // 4] * random.uniform(0.85, 1.15)
        phase = random.uniform(0, 2 * np.pi)
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / length + phase)
        noisy = np.asarray(photo(1024, 768, random), np.float32) + 12 * wave[..., None]
        path = folder / f"{number:04}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(str(path))
    return paths, labels


def accuracy(folder: Path) -> None:
    """Print a linear probe's accuracy with inputs made either way, and crossed."""
    paths, labels = textures(folder)
    recipe = of_timm("resnet10t.c3_in1k", input_size=(3, SIDE, SIDE), test_input_size=None)
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=0).eval()
    features = {}
    for decode in ("fast", "exact"):
        prepare = recipe.task(decode)
        with torch.inference_mode():
            batches = [
                network.forward_features(torch.stack([prepare(p) for p in paths[n : n + 32]]))
                for n in range(0, len(paths), 32)
            ]
        pooled = [torch.cat([b.mean((2, 3)), b.std((2, 3))], 1) for b in batches]
        features[decode] = torch.cat(pooled).numpy()
    train = np.arange(len(labels)) % 2 == 0
    print(
        f"\nLinear probe, {CLASSES} textures, {train.sum()} images for training and as many tests"
    )
    for learnt, scored in (("exact", "exact"), ("fast", "fast"), ("fast", "exact")):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        probe.fit(features[learnt][train], labels[train])
        score = probe.score(features[scored][~train], labels[~train])
        print(f"  trained {learnt:6} scored {scored:6} accuracy {score:.4f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description="Measure the image input pipeline.")
    parser.add_argument("--photos", type=int, default=96, help="of 500 x 375 (default: 96)")
    parser.add_argument("--large", type=int, default=8, help="of 4000 x 3000 (default: 8)")
    parser.add_argument("--rounds", type=int, default=2, help="over every file (default: 2)")
    parser.add_argument("--accuracy", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if min(options.photos, options.large, options.rounds) < 1:
        parser.error("--photos, --large and --rounds must be 1 or more")
    torch.set_num_threads(1)
    print(", ".join(f"{name} {version(name)}" for name in PEERS), "- one thread, CPU time")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = ((options.photos, 500, 375), (options.large, 4000, 3000))
        for count, width, height in sizes:
            rendered = render(folder / str(width), count, width, height)
            for recipe in recipes():
                print(f"\n{count} JPEGs of {width} x {height}; {recipe.name}", flush=True)
                compare(recipe, rendered, options.rounds)
        if options.accuracy:
            accuracy(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
