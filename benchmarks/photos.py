"""JPEGs drawn on the spot, and a ResNet-50 for them: what the image benchmarks share.

The network has random weights and BatchNorm statistics of the photos, so that its features tell
classes apart; timings depend on neither.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

CLASSES = ("bars", "discs", "boxes", "rings")
SIZE = (500, 375)


def draw_photos(folder: Path, per_class: dict[str, int], size: tuple[int, int] = SIZE) -> None:
    """Write SPLIT/CLASS/NUMBER.jpg: textured shapes over a noisy gradient, quality 90.

    Args:
        folder: where to.
        per_class: split to the number of images of each class.
        size: width and height in pixels.
    """
    for split, count in per_class.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                random = np.random.default_rng([len(split), label, number])
                photo = _photo(name, random, size)
                photo.save(folder / split / name / f"{number:03}.jpg", quality=90)


def save_resnet50(folder: Path, photos: Path) -> None:
    """Save a ResNet-50 of timm's that has seen some of the photos."""
    torch.manual_seed(0)
    made = timm.create_model("resnet50", num_classes=len(CLASSES))
    images = [Image.open(path).resize((224, 224)) for path in sorted(photos.rglob("*.jpg"))[::4]]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images[:32]])
    batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.45) / 0.225
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of what it sees
    with torch.no_grad():
        made.train()(batch)
    cfg = {**made.pretrained_cfg, "num_classes": len(CLASSES)}
    cfg |= {"crop_pct": 0.875, "interpolation": "bilinear"}  # as the classic loop resizes
    config = TimmWrapperConfig(architecture="resnet50", num_labels=len(CLASSES), pretrained_cfg=cfg)
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(made.state_dict())
    model.save_pretrained(folder)


def _photo(name: str, random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    mix = random.uniform(-1, 1, (3, 2))
    base = random.uniform(60, 190, 3) + 60 * np.stack([a * x + b * y for a, b in mix], -1)
    noise = random.normal(0, 12, (height, width, 3))
    picture = Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        colour = tuple(int(c) for c in random.integers(0, 255, 3))
        cx, cy = random.uniform(0, width), random.uniform(0, height)
        r = random.uniform(0.05, 0.12) * width
        box = (cx - r, cy - r, cx + r, cy + r)
        if name == "bars":
            draw.line((cx - r, cy - r, cx + r, cy + r), fill=colour, width=int(r / 4))
        elif name == "discs":
            draw.ellipse(box, fill=colour)
        elif name == "boxes":
            draw.rectangle(box, fill=colour)
        else:
            draw.ellipse(box, outline=colour, width=int(r / 4))
    return picture
