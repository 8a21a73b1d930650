"""Pretrain a small timm ResNet on rendered characters, with no digit among them.

The quickstart needs a pretrained network that is small enough to live in the repository, whose
origin is plain, and whose pretraining classes do not overlap with the digits it is fine-tuned on.
Letters and symbols drawn in whatever fonts a system has are such a source: strokes, loops and
corners transfer to handwriting, while the ten digits themselves are never seen.

The result is a folder that transformers loads like any timm checkpoint of the Hub::

    AutoModelForImageClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=10, ignore_mismatched_sizes=True
    )

The fonts are found and drawn by ``glyph_images.py``, beside this file.

Usage:
    python scripts/pretrain_glyphs.py --seed 0
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from glyph_images import (
    CLASSES,
    IMAGE_SIDE,
    MEAN,
    STD,
    SYSTEM_FONT_FOLDERS,
    Distorter,
    GlyphPool,
    RenderedFont,
    find_fonts,
    gather,
    log,
    maker_of,
    render_fonts,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

# The stem halves the image twice, as in any ResNet; at 32 px the last stages keep the resolution
# (output_stride) instead of shrinking to a single cell.
ARCHITECTURE = "resnet10t"
MODEL_ARGS = {"channels": [32, 64, 128, 256], "output_stride": 16}
PRETRAINED_CFG = {
    "input_size": [3, IMAGE_SIDE, IMAGE_SIDE],
    "fixed_input_size": False,
    "pool_size": [2, 2],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": MEAN,
    "std": STD,
    "first_conv": "conv1.0",
    "classifier": "fc",
}

HELD_OUT_FRACTION = 0.1
MAX_GRADIENT_NORM = 1.0


# --- held-out fonts -------------------------------------------------------------------------------


def split_fonts(fonts: Sequence[RenderedFont], seed: int) -> tuple[GlyphPool, GlyphPool]:
    """Hold out whole groups of families, so that no sibling of a held-out font is trained on.

    DejaVu is always trained on, being the one family that is there on every system.

    Args:
        fonts: All fonts.
        seed: Decides which are held out.

    Returns:
        The training pool and the held-out pool.

    Raises:
        ValueError: If there is nothing but DejaVu.
    """
    makers = sorted({maker_of(font.family) for font in fonts} - {maker_of("DejaVu")})
    if not makers:
        raise ValueError(
            "no usable font was found besides DejaVu, which leaves none to hold out: install "
            "others (on Debian and Ubuntu, `apt install fonts-liberation fonts-noto-core`), or "
            "name a folder of .ttf or .otf files with --fonts"
        )
    order = torch.randperm(len(makers), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(len(makers) * HELD_OUT_FRACTION))
    held_out = {makers[place] for place in order[:count]}
    kept = [font for font in fonts if maker_of(font.family) not in held_out]
    spared = [font for font in fonts if maker_of(font.family) in held_out]
    return gather(kept), gather(spared)


# --- training -------------------------------------------------------------------------------------


def build_model() -> TimmWrapperForImageClassification:
    """Make the untrained network in the wrapper that saves it in the Hub's form."""
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": ARCHITECTURE,
            "model_args": MODEL_ARGS,
            "pretrained_cfg": PRETRAINED_CFG,
            "num_classes": len(CLASSES),
            "label_names": list(CLASSES),
        }
    )
    return TimmWrapperForImageClassification(config)


def batches(pool: GlyphPool, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield full index batches for ever, each pass over the pool in a new order."""
    while True:
        order = torch.randperm(len(pool), generator=generator)
        whole = max(1, len(order) // size) * size
        yield from torch.split(order[:whole], size)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Exempt biases and normalisation from weight decay."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(network: nn.Module, pool: GlyphPool, options: argparse.Namespace) -> None:
    """Train in place with AdamW on a one-cycle schedule.

    Args:
        network: Maps images (B, 3, H, W) to logits (B, classes).
        pool: What to train on.
        options: The command line's steps, batch size, learning rate, weight decay and seed.
    """
    optimizer = torch.optim.AdamW(parameter_groups(network, options.weight_decay))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, total_steps=options.steps, pct_start=0.15
    )
    distort = Distorter(options.seed)
    network.train()
    start = time.monotonic()
    for step, chosen in enumerate(batches(pool, options.batch_size, distort.generator), start=1):
        images = distort(pool.images[chosen]).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(images), pool.labels[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == options.steps:
            elapsed = time.monotonic() - start
            log(f"step {step}/{options.steps}  loss {loss.item():.3f}  {elapsed:.0f} s")
        if step == options.steps:
            return


@torch.inference_mode()
def accuracy(network: nn.Module, pool: GlyphPool, seed: int) -> float:
    """Measure the share of distorted pool images that are named correctly.

    Args:
        network: The network to judge, in evaluation mode.
        pool: What to judge it on.
        seed: Seed of the distortions.

    Returns:
        A number from 0 to 1.
    """
    distort = Distorter(seed)
    order = torch.randperm(len(pool), generator=distort.generator)
    correct = 0
    for chosen in torch.split(order, 256):
        predicted = network(distort(pool.images[chosen])).argmax(1)
        correct += int((predicted == pool.labels[chosen]).sum())
    return correct / len(pool)


# --- saving ---------------------------------------------------------------------------------------

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags:
- image-classification
- timm
- glyphs
---

# glyph-resnet

A narrow `{architecture}` for 32x32 images, pretrained on rendered letters and symbols. It is small
enough to be kept in a source repository, and it has seen **no digit**, so that recognising
handwritten digits is an honest transfer task for it.

```python
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("models/glyph-resnet")
model = AutoModelForImageClassification.from_pretrained(
    "models/glyph-resnet", dtype=torch.float32, num_labels=10, ignore_mismatched_sizes=True
)
```

| | |
|---|---|
| Parameters | {parameters:,}, stored in half precision |
| Constructor arguments | `{model_args}` |
| Input | 3 x 32 x 32, grey levels repeated, mean 0.5, standard deviation 0.5 |
| Classes | {classes} letters and symbols |
| Training | {steps} steps of {batch_size} images, AdamW, learning rate {lr}, seed {seed} |
| Held-out fonts, distorted | **{score:.1%}** of {held_out_images:,} images |

## Training data

{classes} classes: `{characters}`

{images:,} images, one for each font and character, bright strokes on dark ground. In training they
are bent, sheared, thickened or thinned, mostly drawn at 8 to 12 pixels and enlarged again, turned,
scaled, moved, and made noisy; a tenth is inverted. The accuracy above is measured under the same
distortions, on font families that were not trained on, nor any whose name begins alike.

Many of the distorted characters are ambiguous, and the number only serves to compare runs: the
network is meant to be fine-tuned, not to read text.

## Make it again

```
python scripts/pretrain_glyphs.py --seed {seed}
```

The script draws on the fonts it finds, so other fonts give other weights. No font is included here.

Families trained on:

{families}

Families held out:

{held_out_families}
"""


def list_families(pool: GlyphPool) -> str:
    """Name a pool's font families in wrapped lines."""
    return textwrap.fill(", ".join(pool.families), width=100, break_on_hyphens=False)


def write_card(
    folder: Path,
    model: nn.Module,
    pools: tuple[GlyphPool, GlyphPool],
    score: float,
    options: argparse.Namespace,
) -> None:
    """Write the model card from what really happened.

    Args:
        folder: The model's folder.
        model: Counted for its parameters.
        pools: The training and the held-out pool.
        score: Accuracy on the held-out pool.
        options: The command line.
    """
    trained, held_out = pools
    card = CARD.format(
        architecture=ARCHITECTURE,
        model_args=", ".join(f"{name}={value}" for name, value in MODEL_ARGS.items()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=len(CLASSES),
        characters=" ".join(CLASSES),
        images=len(trained),
        held_out_images=len(held_out),
        families=list_families(trained),
        held_out_families=list_families(held_out),
        score=score,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def save(model: TimmWrapperForImageClassification, folder: Path) -> None:
    """Write weights in half precision, and a configuration that asks for single precision.

    Half precision is for the repository's sake only: training in it would fail, and recent
    transformers load a checkpoint in the type its configuration names.

    Args:
        model: A model in half precision.
        folder: Where to write ``config.json`` and ``model.safetensors``.
    """
    model.save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)


# --- command line ---------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Pretrain a small timm ResNet on rendered characters (no digits).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    models = Path(__file__).resolve().parents[1] / "models"
    parser.add_argument("--out", type=Path, default=models / "glyph-resnet", help="folder to write")
    parser.add_argument(
        "--fonts",
        type=Path,
        nargs="*",
        default=SYSTEM_FONT_FOLDERS,
        metavar="FOLDER",
        help="folders to search for fonts, besides matplotlib's DejaVu",
    )
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="AdamW's weight decay")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    fonts = render_fonts(find_fonts(options.fonts))
    try:
        trained, held_out = split_fonts(fonts, options.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log(
        f"{len(fonts)} fonts, {len(CLASSES)} classes: {len(trained)} images to train on, "
        f"{len(held_out)} held out"
    )
    model = build_model()
    model.timm_model.to(memory_format=torch.channels_last)
    train(model.timm_model, trained, options)
    model.timm_model.half()
    save(model, options.out)
    model.timm_model.float().eval()
    score = accuracy(model.timm_model, held_out, options.seed)
    write_card(options.out, model, (trained, held_out), score, options)
    log(f"wrote {options.out}")
    print(f"held-out-font accuracy {score:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
